"""What the command `hf-pareprop` does: convert, export, verify, bench, plan. Its options are defined in :mod:`cli`."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PreTrainedModel

from ..lanes import side_lane
from ..plan import converted_beta, parse_size
from .bench import (
    batch_for,
    check_size,
    choose,
    code_for,
    contenders,
    limits_of,
    plot,
    recommend,
    sizes_within,
    subject_of,
    table,
    where_bytes_go,
    with_retention,
)
from .budget import bit_budget
from .cards import model_card
from .checkpoint import load_reversible, load_stock, plan_stock
from .companions import Copied, copy_companions
from .compare import Comparison, memory_of
from .contenders import to_plain
from .conversion import Conversion
from .convert import architecture_behind, to_reversible
from .decoder_plan import TOKENS, configuration, explained, needs_by_way
from .decoder_plan import table as table_of_plan
from .decoders import TRAININGS, depth_of
from .fidelity import fidelity, grid_bits_for
from .inputs import random_batch, real_batches
from .memory import memory_growth
from .output import Output
from .records import aligned, device_name, layers_in_words, pick_device, size_in_words, software, width_of
from .source import CheckpointError, open_source, quoted
from .timing import OUT_OF_MEMORY
from .verify import verify as verify_step
from .weights import check_shard_size

TIMING_SECONDS = 120.0
"""Seconds after which `bench` begins no further round."""


def convert(
    src: str,
    out: Path,
    beta: float | None,
    steps: str | None,
    layers: str | None,
    grid_bits: int | None,
    dtype: str,
    data: Path | None,
    allow_pickle: bool,
    overwrite: bool,
    max_shard_size: str,
) -> None:
    check_shard_size(max_shard_size)
    with Output(out, overwrite) as output:
        source = open_source(src)
        output.keep(source.folder)
        plan = plan_stock(source, allow_pickle=allow_pickle)
        batches = None if data is None else list(real_batches(source, plan.model, data))
        given = (("beta", beta), ("steps", steps), ("grid_bits", grid_bits))
        fields = {name: value for name, value in given if value is not None}
        conversion = Conversion.of(plan, **fields)
        model: Any = conversion.twin
        depth = sum(model.config.stage_depths)
        if layers is not None and len(chosen := _layers(layers, depth)) < depth:
            model.set_beta([model.config.beta if i in chosen else 0.0 for i in range(depth)])
        _say("from", f"{src}: {_describe(plan.model, model.config, plan.weights.dtype(plan.model.config))}")
        _say("to", f"{type(model).__name__}, {len(model.state_dict())} tensors mapped")
        if rows := conversion.architecture.reserved_rows(plan.model.config):
            _say("", f"positions moved by {rows} rows: RoBERTa counts them from the padding token")
        for note in (*output.notes, *source.notes, *plan.notes):
            _say("", note)
        if plan.left_out:
            _say("left out", f"{', '.join(plan.left_out)} ({type(plan.model).__name__} has no place for them)")
        measured = None
        if batches is not None:
            stock = load_stock(source, allow_pickle=allow_pickle).model
            twin = to_reversible(stock, **{**fields, "beta": model.config.beta})
            bits, largest = grid_bits_for(twin, batches)
            if grid_bits is None:
                model.config.grid_bits = twin.config.grid_bits = bits
            _say(
                "grid",
                f"{model.config.grid_bits} bits; states reach {largest:.3g} on {data}, for which {bits} are the finest",
            )
            measured = fidelity(stock, twin, batches)
            _say("fidelity", f"{measured} ({data}, against {src})")
        for line in bit_budget(model.config.layer_plans()):
            _say("coupling", line)
        with output.writing() as folder:
            copied = copy_companions(source, folder, plan.model.config.model_type, allow_pickle)
            conversion.write(folder, max_shard_size, dtype)
            note = "converted, not trained since" + (f"; on {measured} against the base model" if measured else "")
            base = Path(src).resolve().name if Path(src).exists() else src
            card = model_card(
                model,
                model_name=out.name,
                base_model=base,
                training=note,
                left_out=plan.left_out,
                base_card=source.plain_file("README.md"),
            )
            card.save(folder / "README.md")
    _say_copied(copied)
    _say("wrote", f"{out}")


def export(src: str, out: Path, dtype: str, data: Path | None, overwrite: bool, max_shard_size: str) -> None:
    check_shard_size(max_shard_size)
    with Output(out, overwrite) as output:
        source = open_source(src)
        output.keep(source.folder)
        model: Any = load_reversible(source, dtype=dtype).model
        if data is not None:
            batches, where = list(real_batches(source, model, data)), str(data)
        else:
            batches, where = [random_batch(model)], "random inputs; give real ones with --data"
        library = architecture_behind(type(model), model.config).library
        stock = to_plain(model)
        _say("from", f"{src}: {_describe(model)}")
        target = type(stock).__name__ if library is None else f"{library.name}'s {library.model_name(model)}"
        _say("to", f"{target}, {len(stock.state_dict())} tensors mapped")
        for note in output.notes:
            _say("", note)
        _say("fidelity", f"{fidelity(model, stock, batches)} ({where})")
        if any(plan.reversible for plan in model.config.layer_plans()):
            _say(
                "",
                "the weights were trained with a beta above 0, but the stock model has beta=0: see BetaSchedule.anneal",
            )
        with output.writing() as folder:
            copied = copy_companions(source, folder, stock.config.model_type)
            if library is None:
                stock.save_pretrained(folder, max_shard_size=max_shard_size)
            else:
                library.save(model, folder, source.folder / "preprocessor_config.json")
    _say_copied(copied)
    _say("wrote", f"{out}")


def verify(
    model_name: str, data: Path | None, batch_size: int, max_length: int, engine: str, autocast: str, device: str
) -> None:
    source = open_source(model_name)
    model: Any = load_reversible(source).model
    model.to(pick_device(device)).train()
    model.set_backward_engine(engine)
    inputs = (
        random_batch(model, batch_size=batch_size, length=max_length)
        if data is None
        else next(real_batches(source, model, data, batch_size=batch_size, limit=batch_size, max_length=max_length))
    )
    _say("model", f"{model_name}: {_describe(model)}, on {model.device}")
    _say(
        "inputs",
        f"{'random' if data is None else data}, " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items()),
    )
    for line in bit_budget(model.config.layer_plans()):
        _say("coupling", line)
    if not any(plan.reversible for plan in model.config.layer_plans()):
        raise CheckpointError("no layer of the model is reversible: there is nothing to verify.")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast == "bf16"):
        try:
            report = verify_step(model, inputs)
        except RuntimeError as error:  # the check that every training step makes
            _say("step", f"FALLS SHORT: {error}")
            raise typer.Exit(1) from None
        growth = memory_growth(model, inputs)
    checks = (
        ("step", report.exact and report.gradients_equal, str(report)),
        ("memory", growth.flat, str(growth)),
    )
    for name, holds, found in checks:
        _say(name, f"{'holds' if holds else 'FALLS SHORT'}: {found}")
    if not all(holds for _, holds, _ in checks):
        raise typer.Exit(1)


def bench(
    model_name: str,
    data: Path | None,
    batch_size: int,
    max_length: int,
    memory_cap: str | None,
    beta: float | None,
    autocast: str,
    device: str,
    compiled: bool,
    rounds: int,
    out: Path | None,
    overwrite: bool,
) -> None:
    where = pick_device(device)
    cap = memory_of(where) if memory_cap is None else _bytes(memory_cap)
    with nullcontext() if out is None else Output(out, overwrite) as output:
        source = open_source(model_name, weights=False)
        if output is not None:
            output.keep(source.folder)
        subject = subject_of(source)
        bf16 = autocast == "bf16" or (autocast == "auto" and where.type == "cuda")
        check_size(source, subject, memory_of(where))
        batch = batch_for(source, subject, data, batch_size, max_length)
        comparison = Comparison(subject, batch, where, bf16, cap)
        title = (
            f"{Path(model_name).name}: {subject.model_class.__name__}, {layers_in_words(subject.config)} layers, on "
            f"{device_name(where)}, {'bf16 autocast' if bf16 else 'fp32'}, "
            + ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in batch.items() if value.dim() > 1)
        )
        _say("model", title)
        _say("inputs", f"{'random' if data is None else data}; memory: {size_in_words(cap)}")
        beta = converted_beta(subject.config.steps) if beta is None else beta
        ways = with_retention(comparison, contenders(beta, compiled, where), batch_size)
        sizes = sizes_within(comparison, ways, batch_size)
        rows = comparison.measure(sizes, rounds, lambda line: typer.echo(line, err=True), seconds=TIMING_SECONDS)
        errors = [row.error for row in rows if row.error not in (None, OUT_OF_MEMORY)]
        if errors and not any(row.ms for row in rows):
            raise CheckpointError(f"no way to train {model_name} runs: {errors[0]}. Is its config.json right?")
        limits = limits_of(comparison, ways)
        said = recommend(rows, batch_size, cap, side_lane(where).overlaps)
        chosen = choose(rows, batch_size, cap)
        code = [] if chosen is None else code_for(chosen, model_name, batch_size)
        for part in (table(rows, limits), where_bytes_go(rows), [said], code):
            typer.echo("\n" + "\n".join(part))
        if output is None:
            return
        found = {"title": title, "memory_cap": cap, "recommendation": said, "code": code}
        found |= {"rows": [row.as_dict() | {"largest_batch": limits[row.contender]} for row in rows], **software()}
        with output.writing() as folder:
            (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
            try:
                plot(rows, title, cap).savefig(folder / "bench.png", dpi=110)
            except ImportError:
                _say("", "no plot: that needs matplotlib (pip install matplotlib)")
    _say("wrote", f"{out}")


def plan(
    model_name: str, beta: float | None = None, max_length: int | None = None, memory_cap: str | None = None
) -> None:
    config = configuration(model_name)
    tokens = TOKENS if max_length is None else (max_length,)
    cap = None if memory_cap is None else _bytes(memory_cap)
    _say("model", f"{model_name}: {depth_of(config)} layers, {config.hidden_size} wide; one text in a step")
    for training in TRAININGS:
        found = needs_by_way(config, beta, training)
        lines = aligned(table_of_plan(found, tokens, cap), left={0})
        typer.echo("\n" + "\n".join([training.name, *lines, explained(found, tokens)]))


def _bytes(text: str) -> int:
    """The bytes in a text such as ``16GB`` or ``800 MB``. A GB is 2**30."""
    if not (size := parse_size(text)):
        raise CheckpointError(f"--memory-cap {text}: not an amount of memory, such as 16GB or 800MB.")
    return size


def _layers(text: str, depth: int) -> set[int]:
    """The layers in a text such as ``4-11`` or ``0-3,8,10-11``."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < depth:
            raise CheckpointError(
                f"--layers {quoted(text)}: {quoted(part)} is not a range of layers from 0 to {depth - 1}, such as 2-{depth - 1}."
            )
        chosen |= set(range(first, last + 1))
    return chosen


def _describe(model: PreTrainedModel, config: Any = None, dtype: torch.dtype | None = None) -> str:
    """A model in words: its class, size and dtype.

    Args:
        model: a reversible model or a stock one.
        config: the configuration of the reversible twin, if ``model`` is a stock model. It has the number of layers.
        dtype: the dtype of the weights, if ``model`` is a plan without weights.
    """
    config, millions = config or model.config, sum(p.numel() for p in model.parameters()) / 1e6
    size = f"{layers_in_words(config)} layers, {width_of(config)} wide, {millions:.1f} M"
    return f"{type(model).__name__}, {size}, {str(dtype or model.dtype).removeprefix('torch.')}"


def _say_copied(copied: Copied) -> None:
    _say("copied", ", ".join(copied.names) or "no tokenizer or image processor: there was none")
    for note in copied.notes:
        _say("", note)
    if copied.left:
        _say("not copied", ", ".join(copied.left))


def _say(what: str, text: str) -> None:
    typer.echo(f"{what:>9}  {text}")
