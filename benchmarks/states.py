"""What fixed-point states cost: one update of a state and its undoing, decoding a state, and the check of a rebuilt one.

    python -m benchmarks.states [--device cuda] [--threads 1 2]

Times them as every step of a reversible layer does them, in milliseconds and as multiples of a copy of a state into
memory that is there already, where their results go to new memory. An update at beta = 2^-m keeps m bits of every element,
packed into bytes; undoing it reads them. By PyTorch's operations both take several passes over memory; ``fused``, as the package does it on CUDA,
each is one kernel. A layer checks that it rebuilt the state that it began on with a checksum, taken in the forward pass
and in the backward pass.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_pareprop.coupling import (
    advance,
    advance_in_passes,
    checksum,
    decode,
    encode,
    retreat,
    retreat_in_passes,
    runs_fused,
)
from hf_pareprop.plan import DEFAULT_GRID_BITS, plan_layers
from hf_pareprop.tools.records import aligned, cpu_model, save, software
from hf_pareprop.tools.timing import milliseconds

from .options import choose_device, positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {"8 x 128 x 384": (8, 128, 384), "32 x 512 x 768": (32, 512, 768)}
"""Batch, length and width."""

SIDE_BITS = (0, 1, 2, 5)
"""``m``; 5 is that of the default of converted models."""

COPY = "copy of a state"

Work = Callable[[], Any]
Row = dict[str, Any]


def works_on(shape: tuple[int, ...], device: torch.device) -> dict[str, Work]:
    """What is timed, by name.

    Raises:
        RuntimeError: undoing an update does not give back the state.
    """
    torch.manual_seed(0)
    value = torch.randn(shape, device=device)
    state, _ = encode(torch.randn(shape, device=device), DEFAULT_GRID_BITS)
    works: dict[str, Work] = {
        COPY: partial(torch.empty_like(state).copy_, state),
        "decode": partial(decode, state, DEFAULT_GRID_BITS, torch.float32),
        "checksum": partial(checksum, state),
    }
    for m in SIDE_BITS:
        plan = plan_layers(2.0**-m, 1)[0]
        ways = {"": (advance_in_passes, retreat_in_passes)}
        if runs_fused(value, state, plan):
            ways[", fused"] = (advance, retreat)
        for name, (update, undo) in ways.items():
            following, sides, _ = update(value, state, plan, keep=True)
            works[f"update, m = {m}{name}"] = partial(update, value, state, plan, keep=True)
            works[f"undoing, m = {m}{name}"] = again = partial(undo, value, following, plan, sides)
            if not torch.equal(again(), state):
                raise RuntimeError(f"undoing an update, m = {m}{name}, gives another state.")
    return works


def measure(works: dict[str, Work], device: torch.device, repeats: int) -> list[Row]:
    """Every sample, in rounds over all works."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-1, repeats):  # the first one warms up
        for name, work in works.items():
            ms = milliseconds(work, device)
            if round_ >= 0:
                samples[name].append(round(ms, 4))
    copy = statistics.median(samples[COPY])
    return [{"work": name, "ms": own, "copies": statistics.median(own) / copy} for name, own in samples.items()]


def by_column(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """From the size, and the threads of a CPU, to rows by what was timed."""
    columns: dict[str, dict[str, Row]] = {}
    for row in rows:
        threads = row["threads"] and f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        columns.setdefault(f"{row['size']}{threads or ''}", {})[row["work"]] = row
    return columns


def table(rows: Sequence[Row]) -> str:
    """A line for everything that was timed, a column per size."""
    columns = by_column(rows)
    lines = [["ms (copies)", *columns]]
    for name in next(iter(columns.values())):
        found = [own[name] for own in columns.values()]
        lines.append([name, *(f"{statistics.median(row['ms']):.3f} ({row['copies']:.1f})" for row in found)])
    return "\n".join(aligned(lines, left={0}))


def plot(rows: Sequence[Row], title: str) -> "Figure":
    """Multiples of a copy, a group of bars for everything that was timed."""
    from matplotlib.figure import Figure

    columns = by_column(rows)
    names = [name for name in next(iter(columns.values())) if name != COPY]
    figure = Figure(figsize=(7, 1 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for i, (column, own) in enumerate(columns.items()):
        axes.barh([y + height * i for y in range(len(names))], [own[n]["copies"] for n in names], height, label=column)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times a copy of a state")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if present")
    parser.add_argument("--threads", nargs="+", type=positive, help="PyTorch's on a CPU, one or more numbers of them")
    parser.add_argument("--repeats", type=positive, default=21, help="samples of each time; default: %(default)s")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="directory of the results; default: %(default)s")
    args = parser.parse_args()
    try:
        choose_device(args)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else cpu_model()
    rows: list[Row] = []
    for threads in [None] if cuda else args.threads or [torch.get_num_threads()]:
        if threads is not None:
            torch.set_num_threads(threads)
        for label, shape in SIZES.items():
            found = measure(works_on(shape, device), device, args.repeats)
            rows += [{"size": label, "threads": threads, **row} for row in found]
    print(f"{name}\n\n{table(rows)}")
    args.out.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"benchmark": "states", "device": name, **software(), "times": rows}, indent=1) + "\n"
    save(args.out / f"states-{args.device}.json", lambda file: file.write_text(whole))
    save(args.out / f"states-{args.device}.png", lambda file: plot(rows, name).savefig(file, dpi=110, format="png"))


if __name__ == "__main__":
    main()
