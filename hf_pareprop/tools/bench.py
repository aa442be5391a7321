"""`hf-pareprop bench`: compare ways to train the user's own model on the user's machine, and recommend one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from ..modeling_reversible import ReversiblePreTrainedModel
from .checkpoint import reversible_class, stock_class
from .compare import Comparison, Row
from .configuration import check_buildable, config_of
from .contenders import (
    EXPENSIVE,
    STOCK,
    Contender,
    Subject,
    reversible_contenders,
    stock_contenders,
    with_free_budget,
)
from .inputs import random_batch, real_batches, with_targets
from .records import MB, aligned, number, ratio, size_in_words
from .source import CheckpointError, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.98
"""Plain training counts as fastest if it reaches this fraction of the highest speed, because timings scatter that much."""


def contenders(beta: float, compiled: bool, device: torch.device) -> list[Contender]:
    """Ways to train the stock model; and the reversible engines, at ``beta`` and at 1, the coupling for training from scratch.

    Offloading to the CPU is left out if the model is on the CPU already. On CUDA ``compiled`` adds what trains fastest there:
    CUDA graphs, those of the reversible engines with compiled steps.
    """
    betas = dict.fromkeys((beta, 1.0))
    stock = [way for way in stock_contenders(device) if compiled or not way.compiled]
    ours = reversible_contenders(list(betas), ("reprop", "pareprop"))
    graphed = [way.as_graph() for way in (STOCK, *ours)] if compiled and device.type == "cuda" else []
    return [*stock, *with_free_budget(ours), *graphed]


def subject_of(source: Source) -> Subject:
    """The model that the configuration of a stock or reversible checkpoint describes. The weights are not read.

    Raises:
        CheckpointError: the configuration is not usable.
        ValueError: the architecture has no reversible twin.
    """
    if source.model_type.startswith("rev_"):
        own = reversible_class(source)
        own_config = config_of(source, own.config_class)
        check_buildable(source, own, own_config)
        return Subject(own, own_config)
    found, config = stock_class(source)
    check_buildable(source, found, config)
    if issubclass(found, ReversiblePreTrainedModel):  # models of timm have no stock class in transformers
        return Subject(found, config)
    return Subject.of(source.class_name, config)


def check_size(source: Source, subject: Subject, cap: int) -> None:
    """Raise CheckpointError if the weights of the configuration take more than ``cap`` bytes. No weights are allocated."""
    with FakeTensorMode(), no_init_weights():
        size = sum(parameter.nbytes for parameter in subject.build(STOCK).parameters())
    if size > cap:
        raise CheckpointError(
            f"the model that config.json of {source.name} describes has weights of {size_in_words(size)}, more than the "
            f"{size_in_words(cap)} of memory: is every size in it right?"
        )


def batch_for(source: Source, subject: Subject, data: Path | None, size: int, max_length: int) -> dict[str, Any]:
    """A batch with labels, from the texts or images in ``data``; without ``data`` a random one."""
    with no_init_weights():
        model = subject.build(STOCK)  # needed to know what the inputs look like
    if data is None:
        batch = random_batch(model, batch_size=1, length=max_length)
    else:
        batch = next(real_batches(source, model, data, batch_size=size, limit=size, max_length=max_length))
    return with_targets(batch, model)


def with_retention(comparison: Comparison, ways: Sequence[Contender], size: int) -> list[Contender]:
    """``ways``, and pareprop once more, keeping the graphs of as many layers as fit, if that is some but not all layers."""
    plain_fits = comparison.predict(STOCK, size).total <= comparison.cap
    pareprop = next(way for way in ways if way.engine == "pareprop")
    kept = 0 if plain_fits else comparison.most_retained(pareprop, size)
    return [*ways, pareprop.retaining(kept)] if kept else list(ways)


def sizes_within(comparison: Comparison, ways: Sequence[Contender], size: int) -> dict[Contender, int]:
    """The batch size for each contender: the one asked for, or the largest that fits if that is smaller.

    A CUDA graph takes a little more memory than what it captures, so it gets a tenth less of such a batch.
    """
    sizes = {}
    for way in ways:
        like = replace(way, graphed=False, compiled=False) if way.graphed else way
        limit = size if not like.predictable else comparison.predicted_limit(like, comparison.cap, at_most=size)
        if way.graphed and limit < size:
            limit = int(0.9 * limit)
        sizes[way] = max(1, limit)
    return sizes


def limits_of(comparison: Comparison, ways: Sequence[Contender]) -> dict[Contender, int | None]:
    """The largest batch of each contender within the cap; ``None`` for CUDA graphs, which would be captured for every try."""
    return {way: None if way.graphed else comparison.largest_batch(way, comparison.cap) for way in ways}


# --- the text that users see


def table(rows: Sequence[Row], limits: Mapping[Contender, int | None]) -> list[str]:
    """A table with a line per contender: medians, and in brackets the slowest and the fastest step."""
    plain = next(row for row in rows if row.contender == STOCK)
    lines = [["contender", "batch", "samples/s", "to plain", "activations", "peak", "predicted", "largest batch"]]
    for row in rows:
        relative = ratio(row.samples_per_second, plain.samples_per_second)
        sizes = (row.activation_bytes, row.peak_bytes, row.predicted_bytes)
        lines.append(
            [
                row.contender.name,
                str(row.batch_size),
                row.error or row.rate,
                number(relative, ".2f"),
                *("-" if size is None else size_in_words(size) for size in sizes),
                number(limits.get(row.contender), "d"),
            ]
        )
    return aligned(lines, left={0})


def where_bytes_go(rows: Sequence[Row]) -> list[str]:
    """A table with the accounting of each contender, in MB."""
    known = [row for row in rows if row.predicted]
    lines = [["at the peak, MB", *(known[0].predicted or {})]]
    lines += [[row.contender.name, *(f"{size / MB:.1f}" for size in (row.predicted or {}).values())] for row in known]
    return aligned(lines, left={0})


def choose(rows: Sequence[Row], size: int, cap: int) -> Row | None:
    """The fastest way that fits. If timings cannot tell others from it, plain training, or else the one that needs least memory.

    Args:
        rows: one per contender, at ``size`` or at the largest batch that fits, if that is smaller.
        size: the batch size that was asked for.
        cap: the bytes that training may take.

    Returns:
        The chosen row; ``None`` if nothing fits.
    """
    level = _level(rows, cap)
    plain = next((row for row in level if row.contender == STOCK), None)
    return plain or min(level, key=lambda row: (-min(row.batch_size, size), row.needed_bytes or 0), default=None)


def _sound(rows: Sequence[Row], cap: int) -> list[Row]:
    return [row for row in rows if row.ms and (row.needed_bytes or 0) <= cap]


def _level(rows: Sequence[Row], cap: int) -> list[Row]:
    """The fastest row, and the rows that are as fast: their ranges of times overlap with it, or differ by less than `LEVEL`."""
    sound = _sound(rows, cap)
    if not sound:
        return []
    fastest = max(sound, key=_speed)
    return [row for row in sound if _overlap(row, fastest) or _speed(row) >= LEVEL * _speed(fastest)]


def _overlap(a: Row, b: Row) -> bool:
    return a.range[0] <= b.range[1] and b.range[0] <= a.range[1]


def recommend(rows: Sequence[Row], size: int, cap: int, overlaps: bool = True) -> str:
    """The choice of :func:`choose` for the same rows, in plain words.

    Args:
        overlaps: whether pareprop has a lane of its own on this device.
    """
    sound, chosen = _sound(rows, cap), choose(rows, size, cap)
    within = f"within {size_in_words(cap)}"
    if chosen is None:
        return f"Nothing trains this model {within}, not even at batch 1: take a smaller model or shorter inputs."
    plain = next((row for row in sound if row.contender == STOCK), None)
    others = [row.contender.name for row in _level(rows, cap) if row is not chosen]
    level = (
        f"Equally fast, as far as these timings tell: {'; '.join(others)}."
        if others
        else f"It is the fastest here {within}."
    )
    text = [_choice(chosen), f"{level} {_said(chosen)}.".replace("..", ".")]
    rebuilding = [row for row in sound if row.contender.engine]
    best = max((row for row in rebuilding if row.batch_size == size), key=_speed, default=None)
    if plain is None:
        text.append(f"Plain training does not fit {within}, not even at batch 1.")
    elif plain.batch_size < size and plain is not chosen:
        text.append(f"Plain training fits up to batch {plain.batch_size}: {_said(plain)}.")
    if chosen.batch_size < size:
        text.append(
            f"Accumulate gradients over {-(-size // chosen.batch_size)} steps for batch {size}. If {size} samples "
            + (
                "have to be in one step, nothing fits."
                if not (whole := [row for row in sound if row.batch_size == size])
                else f"have to be in one step (contrastive losses), take {_said(max(whole, key=_speed))}."
            )
        )
    elif best is not None and chosen not in rebuilding and best.needed_bytes and chosen.needed_bytes:
        longer = (
            "about as long"
            if _overlap(best, chosen)
            else f"{_speed(chosen) / _speed(best):.2f} times as long, because it computes layers once more to rebuild their inputs"
        )
        text.append(
            f"Reversible training ({best.contender.name}) would take {size_in_words(best.needed_bytes)} instead of "
            f"{size_in_words(chosen.needed_bytes)} and {longer}: choose it if you need a larger batch, longer inputs or a "
            "deeper model than fits."
        )
    if rebuilding and not overlaps:
        text.append("pareprop runs like reprop here: PyTorch's threads leave no core idle for the rebuilding.")
    return " ".join(text)


def _settings(way: Contender) -> str:
    """The fields of the configuration of a reversible contender, as keyword arguments."""
    settings = [f"backward_engine='{way.engine}'", f"beta={way.beta:g}"]
    if way.budget:
        settings.append(f"memory_budget='{way.budget}'")
    if way.compiled:
        settings.append("compile_steps=True")
    return ", ".join(settings)


def _choice(row: Row) -> str:
    if row.contender == STOCK:
        return "Stay with plain training."
    if row.contender.engine:
        graphs = ", and GraphedTrainer" if row.contender.graphed else ""
        return f"Train the reversible model with {_settings(row.contender)}{graphs}, batch size {row.batch_size}."
    if row.contender.graphed:
        return f"Train the stock model with GraphedTrainer, batch size {row.batch_size}."
    return f"Use {row.contender.name} of the stock model, batch size {row.batch_size}."


def code_for(row: Row, model_name: str, size: int) -> list[str]:
    """The lines of a training script that apply what :func:`choose` chose.

    Args:
        row: the row that was chosen.
        model_name: the name of the checkpoint that was compared.
        size: the batch size that was asked for.
    """
    way, arguments = row.contender, [f"per_device_train_batch_size={row.batch_size}"]
    if row.batch_size < size:
        arguments.append(f"gradient_accumulation_steps={-(-size // row.batch_size)}")
    if way.checkpointing:
        arguments.append("gradient_checkpointing=True")
    if way.selective:
        arguments.append("gradient_checkpointing_kwargs={'use_reentrant': False, 'context_fn': selective}")
    if way.compiled and not way.engine:
        arguments.append("torch_compile=True")
    if way.graphed:
        arguments.append("dataloader_drop_last=True")
    lines = [f"args = TrainingArguments(..., {', '.join(arguments)})"]
    if way.selective:
        kept = ", ".join(f"torch.ops.{op}" for op in EXPENSIVE)
        lines.insert(
            0, f"selective = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [{kept}])"
        )
    if way.activation_budget < 1:
        lines.append(
            f"torch._functorch.config.activation_memory_budget = {way.activation_budget:g}  # before training"
        )
    if way.engine:
        lines.insert(0, f"model = hf_pareprop.to_reversible({model_name!r}, {_settings(way)})")
    if way.offload:
        lines.append("with torch.autograd.graph.save_on_cpu(pin_memory=True):  # around the forward pass")
    if way.graphed:
        lines.append(
            "trainer = hf_pareprop.GraphedTrainer(model, args, ...)  # in place of Trainer; all batches of one shape"
        )
    return lines


def _said(row: Row) -> str:
    return f"{row.contender.name} at batch {row.batch_size}, {_speed(row):.2f} samples/s, {size_in_words(row.needed_bytes or 0)}"


def _speed(row: Row) -> float:
    return row.samples_per_second or 0.0


def plot(rows: Sequence[Row], title: str, cap: int) -> "Figure":
    """Draw the samples per second and the peak memory of each contender."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row.contender.name} ({row.batch_size})" for row in rows]
    left.barh(names, [_speed(row) for row in rows], color="#0072b2")
    left.set(xlabel="samples/s", title="throughput (batch size)")
    peaks = [(row.needed_bytes or 0) / MB for row in rows]
    right.barh(names, peaks, color="#d55e00")
    if max(peaks) > cap / MB / 4:  # a much higher cap would leave no room for the bars
        right.axvline(cap / MB, color="black", linewidth=0.8, linestyle="--", label="cap")
        right.legend(frameon=False)
    right.set(xlabel="MB", title="peak memory of training")
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    return figure
