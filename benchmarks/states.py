"""Measure what fixed-point states cost: updating a state, undoing that, decoding a state, and checking a rebuilt state.

    python -m benchmarks.states [--device cuda] [--threads 1 2]

Every operation is timed as a step of a reversible layer runs it: in milliseconds, and as a multiple of the time to copy a
state into existing memory. The results of the operations go to new memory. An update at beta = 2^-m keeps m bits of every
element, packed into bytes, and undoing it reads them. PyTorch's operations take several passes over memory for each.
``fused`` means one kernel each, which is what the package uses on CUDA. A layer checks by a checksum, computed in the forward
pass and in the backward pass, that it has rebuilt the state with which it began.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
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
from hf_pareprop.tools.records import aligned, device_name, software
from hf_pareprop.tools.timing import milliseconds

from .options import Parser, positive, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {"8 x 128 x 384": (8, 128, 384), "32 x 512 x 768": (32, 512, 768)}
"""Batch, length and width."""

SIDE_BITS = (0, 1, 2, 5)
"""The values of ``m``. Converted models have 5 by default."""

COPY = "copy of a state"

Work = Callable[[], Any]
Row = dict[str, Any]


def works_on(shape: tuple[int, ...], device: torch.device) -> dict[str, Work]:
    """The operations to time, by name.

    Raises:
        RuntimeError: undoing an update does not return the original state.
    """
    torch.manual_seed(0)
    value = torch.randn(shape, device=device)
    state, peak = encode(torch.randn(shape, device=device), DEFAULT_GRID_BITS)
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
            following, sides, _ = update(value, state, plan, peak, keep=True)
            works[f"update, m = {m}{name}"] = partial(update, value, state, plan, peak, keep=True)
            works[f"undoing, m = {m}{name}"] = again = partial(undo, value, following, plan, sides)
            if not torch.equal(again(), state):
                raise RuntimeError(f"undoing an update, m = {m}{name}, gives another state.")
    return works


def measure(works: dict[str, Work], device: torch.device, repeats: int) -> list[Row]:
    """All samples of every operation, measured in rounds over all operations."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-1, repeats):  # the first round warms up
        for name, work in works.items():
            ms = milliseconds(work, device)
            if round_ >= 0:
                samples[name].append(round(ms, 4))
    copy = statistics.median(samples[COPY])
    return [{"work": name, "ms": own, "copies": statistics.median(own) / copy} for name, own in samples.items()]


def by_column(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows by column (the size, and on a CPU the number of threads), and then by operation."""
    columns: dict[str, dict[str, Row]] = {}
    for row in rows:
        threads = row["threads"] and f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        columns.setdefault(f"{row['size']}{threads or ''}", {})[row["work"]] = row
    return columns


def table(rows: Sequence[Row]) -> str:
    """A table with a line for each operation and a column for each size."""
    columns = by_column(rows)
    lines = [["ms (copies)", *columns]]
    for name in next(iter(columns.values())):
        found = [own[name] for own in columns.values()]
        lines.append([name, *(f"{statistics.median(row['ms']):.3f} ({row['copies']:.1f})" for row in found)])
    return "\n".join(aligned(lines, left={0}))


def plot(rows: Sequence[Row], title: str) -> "Figure":
    """Draw the times as multiples of a copy, with a group of bars for each operation."""
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
    parser = Parser(__doc__, device=True)
    parser.add_argument(
        "--threads", nargs="+", type=positive, help="numbers of PyTorch's threads on a CPU, one or more"
    )
    parser.add_argument(
        "--repeats", type=positive, default=21, help="timed runs of each operation; default: %(default)s"
    )
    args = parser.parsed()
    device = torch.device(args.device)
    name = device_name(device, threads=False)
    rows: list[Row] = []
    for threads in [None] if device.type == "cuda" else args.threads or [torch.get_num_threads()]:
        if threads is not None:
            torch.set_num_threads(threads)
        for label, shape in SIZES.items():
            found = measure(works_on(shape, device), device, args.repeats)
            rows += [{"size": label, "threads": threads, **row} for row in found]
    print(f"{name}\n\n{table(rows)}")
    found = {"benchmark": "states", "device": name, **software(), "times": rows}
    write_json(args.out / f"states-{args.device}.json", found)
    write_figure(args.out / f"states-{args.device}.png", plot(rows, name))


if __name__ == "__main__":
    main()
