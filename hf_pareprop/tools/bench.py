"""`hf-pareprop bench`: what a user could train with, on the user's own model and machine, and what to choose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.initialization import no_init_weights

from .checkpoint import reversible_class
from .compare import Comparison, Row
from .contenders import (
    CHECKPOINTING,
    COMPILED,
    OFFLOADING,
    STOCK,
    WITHIN_GRADIENTS,
    Contender,
    Subject,
    reversible_contenders,
    with_free_budget,
)
from .families import library_class
from .inputs import random_batch, real_batches, with_targets
from .records import MB, aligned, number, ratio, size_in_words
from .source import CheckpointError, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.98
"""Plain training counts as fastest down to this share of the fastest: less is within what timings scatter."""


def contenders(beta: float, compiled: bool) -> list[Contender]:
    """The stock model's ways, and the reversible engines at ``beta`` and at 1, the coupling for training from scratch."""
    betas = dict.fromkeys((beta, 1.0))
    stock = [STOCK, CHECKPOINTING, OFFLOADING, *([COMPILED] if compiled else [])]
    return [*stock, *with_free_budget(reversible_contenders(list(betas), ("reprop", "pareprop")))]


def subject_of(source: Source) -> Subject:
    """What the configuration of a stock or reversible checkpoint describes; its weights are not read.

    Raises:
        ValueError: the architecture has no reversible twin.
    """
    if source.model_type.startswith("rev_"):
        cls: Any = reversible_class(source)
        return Subject(cls, cls.config_class.from_pretrained(source.folder))
    if own := library_class(source.config):
        config_class: Any = own.config_class
        return Subject(own, config_class.from_pretrained(source.folder))
    try:
        config = AutoConfig.from_pretrained(source.folder)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source.name} has a configuration that transformers does not know: {error}") from error
    return Subject.of(source.class_name, config)


def batch_for(source: Source, subject: Subject, data: Path | None, size: int, max_length: int) -> dict[str, Any]:
    """A batch with labels: of the texts or images in ``data``, or a random one."""
    with no_init_weights():
        model = subject.build(STOCK)  # says what its inputs look like
    if data is None:
        batch = random_batch(model, batch_size=1, length=max_length)
    else:
        batch = next(real_batches(source, model, data, batch_size=size, limit=size, max_length=max_length))
    return with_targets(batch, model)


def with_retention(comparison: Comparison, ways: Sequence[Contender], size: int) -> list[Contender]:
    """``ways``, and pareprop with the graphs of as many layers kept as fit, where that is some and not all of them."""
    plain_fits = comparison.predict(STOCK, size).total <= comparison.cap
    pareprop = next(way for way in ways if way.engine == "pareprop")
    kept = 0 if plain_fits else comparison.most_retained(pareprop, size)
    return [*ways, pareprop.retaining(kept)] if kept else list(ways)


def sizes_within(comparison: Comparison, ways: Sequence[Contender], size: int) -> dict[Contender, int]:
    """The batch size for each contender: the one asked for, or the largest that fits where that is less."""
    sizes = {}
    for way in ways:
        limit = size if way.compiled else comparison.predicted_limit(way, comparison.cap, at_most=size)
        sizes[way] = max(1, limit)
    return sizes


# --- what is said of it


def table(rows: Sequence[Row], limits: Mapping[str, int | None]) -> list[str]:
    """A line per contender, in columns."""
    plain = next(row for row in rows if row.contender == STOCK.name)
    lines = [["contender", "batch", "samples/s", "to plain", "peak", "predicted", "largest batch"]]
    for row in rows:
        speed, relative = row.samples_per_second, ratio(row.samples_per_second, plain.samples_per_second)
        lines.append(
            [
                row.contender,
                str(row.batch_size),
                row.error or number(speed, ".2f"),
                number(relative, ".2f"),
                "-" if row.peak_bytes is None else size_in_words(row.peak_bytes),
                "-" if row.predicted_bytes is None else size_in_words(row.predicted_bytes),
                number(limits.get(row.contender), "d"),
            ]
        )
    return aligned(lines, left={0})


def where_bytes_go(rows: Sequence[Row]) -> list[str]:
    """The accounting of each contender, in MB."""
    known = [row for row in rows if row.predicted]
    lines = [["at the peak, MB", *(known[0].predicted or {})]]
    lines += [[row.contender, *(f"{size / MB:.1f}" for size in (row.predicted or {}).values())] for row in known]
    return aligned(lines, left={0})


def recommend(rows: Sequence[Row], size: int, cap: int, overlaps: bool = True) -> str:
    """What to choose, in plain words.

    Args:
        rows: one per contender, at ``size`` or at the largest batch that fits, if that is less.
        size: the batch size that was asked for.
        cap: bytes that training may take.
        overlaps: whether pareprop has a lane of its own on this device.
    """
    sound = [row for row in rows if row.ms and (row.needed_bytes or 0) <= cap]
    within = f"within {size_in_words(cap)}"
    if not sound:
        return f"Nothing trains this model {within}, not even at batch 1: take a smaller model or shorter inputs."
    fastest = max(sound, key=_speed)
    plain = next((row for row in sound if row.contender == STOCK.name), None)
    if plain is not None and _speed(plain) >= LEVEL * _speed(fastest):
        fastest = plain
    text = [_choice(fastest), f"It is the fastest here {within}: {_said(fastest)}."]
    rebuilding = [row for row in sound if row.contender.startswith(("reprop", "pareprop"))]
    best = max((row for row in rebuilding if row.batch_size == size), key=_speed, default=None)
    if plain is None:
        text.append(f"Plain training does not fit {within}, not even at batch 1.")
    elif plain.batch_size < size and plain is not fastest:
        text.append(f"Plain training fits up to batch {plain.batch_size}: {_said(plain)}.")
    if fastest.batch_size < size:
        text.append(
            f"Accumulate gradients over {-(-size // fastest.batch_size)} steps for batch {size}. Where {size} samples "
            + (
                "have to be in one step, nothing fits."
                if not (whole := [row for row in sound if row.batch_size == size])
                else f"have to be in one step (contrastive losses), take {_said(max(whole, key=_speed))}."
            )
        )
    elif best is not None and fastest not in rebuilding and fastest.ms and best.needed_bytes and fastest.needed_bytes:
        text.append(
            f"Reversible training ({best.contender}) would take {size_in_words(best.needed_bytes)} instead of "
            f"{size_in_words(fastest.needed_bytes)} and {_speed(fastest) / _speed(best):.2f} times as long, as it "
            "computes layers once more to rebuild their inputs: it pays when you need a larger batch, longer inputs or a deeper model than fits."
        )
    if rebuilding and not overlaps:
        text.append("pareprop runs like reprop here: PyTorch's threads leave no core idle for the rebuilding.")
    return " ".join(text)


def _choice(row: Row) -> str:
    if row.contender == STOCK.name:
        return "Stay with plain training."
    if row.contender.startswith(("reprop", "pareprop")):
        engine, beta, *kept = row.contender.split(", ")
        settings = [f"backward_engine='{engine}'", beta.replace(" ", "=")]
        settings += [
            "memory_budget='gradients'" if what == WITHIN_GRADIENTS else f"memory_budget='{what.split()[0]} layers'"
            for what in kept
        ]
        return f"Train the reversible model with {', '.join(settings)}, batch size {row.batch_size}."
    return f"Use {row.contender} of the stock model, batch size {row.batch_size}."


def _said(row: Row) -> str:
    return f"{row.contender} at batch {row.batch_size}, {_speed(row):.2f} samples/s, {size_in_words(row.needed_bytes or 0)}"


def _speed(row: Row) -> float:
    return row.samples_per_second or 0.0


def plot(rows: Sequence[Row], title: str, cap: int) -> "Figure":
    """Samples per second and peak memory of each contender."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row.contender} ({row.batch_size})" for row in rows]
    left.barh(names, [_speed(row) for row in rows], color="#0072b2")
    left.set(xlabel="samples/s", title="throughput (batch size)")
    peaks = [(row.needed_bytes or 0) / MB for row in rows]
    right.barh(names, peaks, color="#d55e00")
    if max(peaks) > cap / MB / 4:  # a cap far away would leave no room for the bars
        right.axvline(cap / MB, color="black", linewidth=0.8, linestyle="--", label="cap")
        right.legend(frameon=False)
    right.set(xlabel="MB", title="peak memory of training")
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    return figure
