"""Throughput, memory and largest batches as tables and plots."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_pareprop.tools.contenders import CHECKPOINTING, COMPILED, COMPILED_WITHIN, OFFLOADING, SELECTIVE, STOCK
from hf_pareprop.tools.records import MB, aligned, number, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Part = dict[str, Any]
Row = dict[str, Any]

COLOURS = {
    STOCK.name: "#000000",
    CHECKPOINTING.name: "#e69f00",
    SELECTIVE.name: "#f0e442",
    OFFLOADING.name: "#999999",
    COMPILED.name: "#56b4e9",
    **dict(zip((way.name for way in COMPILED_WITHIN), ("#8888ff", "#ccbbff"), strict=True)),
    "autograd": "#009e73",
    "reprop": "#d55e00",
    "pareprop": "#0072b2",
}
MARKERS = ("o", "s", "^")
"""Of beta 1, of another one, and of what keeps something at either."""


def table(parts: Sequence[Part]) -> str:
    speed = [part for part in parts if part["kind"] == "speed"]
    limits = [part for part in parts if part["kind"] == "limits"]
    tables = "\n\n".join("\n".join(lines) for lines in (speed_lines(speed), limit_lines(limits)) if len(lines) > 1)
    checked = accuracy_of_prediction(speed)
    return tables + (f"\n\npredicted / measured peak: {checked[0]:.3f} to {checked[1]:.3f}" if checked else "")


def accuracy_of_prediction(parts: Sequence[Part]) -> tuple[float, float] | None:
    """The smallest and the largest ratio of predicted to measured peak."""
    found = [ratio(predicted_of(row), row.get("peak_bytes")) for part in parts for row in part["rows"]]
    known = [value for value in found if value is not None]
    return (min(known), max(known)) if known else None


def speed_lines(parts: Sequence[Part]) -> list[str]:
    """A line per contender and batch size."""
    head = [
        "size",
        "",
        "batch",
        "contender",
        "samples/s [slowest-fastest]",
        "to plain",
        "to checkpointing",
        "to reprop",
    ]
    lines = [[*head, "peak MB", "reserved MB", "predicted MB"]]
    for part in parts:
        for row in part["rows"]:
            speed = speed_of(row)
            peers = (STOCK.name, CHECKPOINTING.name, reprop_of(row["contender"]))
            lines.append(
                [
                    part["size"],
                    part["precision"],
                    str(part["batch_size"]),
                    row["contender"],
                    row["error"] or _with_spread(row),
                    *(number(ratio(speed, speed_of(row_of(part, name))), ".2f") for name in peers),
                    *(number(ratio(row.get(name), MB), ".0f") for name in ("peak_bytes", "reserved_bytes")),
                    number(ratio(predicted_of(row), MB), ".0f"),
                ]
            )
    return aligned(lines, left={0, 1, 3})


def limit_lines(parts: Sequence[Part]) -> list[str]:
    """A line per contender: the largest batch under each cap."""
    caps = list(dict.fromkeys(cap for part in parts for cap in part["caps"]))
    lines = [["size", "", "largest batch", *(f"{cap} GB" for cap in caps)]]
    for part in parts:
        for name, found in part["limits"].items():
            sizes = [found.get(str(cap)) for cap in caps]
            if any(size is not None for size in sizes):
                lines.append([part["size"], part["precision"], name, *(number(size, "d") for size in sizes)])
    return aligned(lines, left={0, 1, 2})


def row_of(part: Part, contender: str) -> Row | None:
    return next((row for row in part["rows"] if row["contender"] == contender), None)


def reprop_of(contender: str) -> str:
    """Serial reprop at the same beta, which keeps nothing."""
    return ", ".join(["reprop", *contender.split(", ")[1:2]])


def speed_of(row: Row | None) -> float | None:
    """Samples per second, by the median step."""
    return 1e3 * row["batch_size"] / statistics.median(row["ms"]) if row and row["ms"] else None


def predicted_of(row: Row) -> int | None:
    return sum(row["predicted"].values()) if row.get("predicted") else None


def _with_spread(row: Row) -> str:
    rates = [1e3 * row["batch_size"] / ms for ms in row["ms"]]
    return f"{speed_of(row):.2f} [{min(rates):.2f}-{max(rates):.2f}]"


# --- plots


def plot_throughput(parts: Sequence[Part]) -> "Figure | None":
    """Samples per second against batch size, one panel per model and precision."""
    parts = [part for part in parts if part["kind"] == "speed"]
    panels = list(dict.fromkeys((part["size"], part["precision"]) for part in parts))
    if not panels:
        return None
    figure, grid = _panels(len(panels), "throughput")
    for axes, panel in zip(grid, panels, strict=False):
        own = [part for part in parts if (part["size"], part["precision"]) == panel]
        for name in _contenders(own):
            rows = [row for part in own if (row := row_of(part, name)) and row["ms"]]
            axes.plot([row["batch_size"] for row in rows], [speed_of(row) for row in rows], label=name, **_look(name))
        axes.set(title=", ".join(panel), xlabel="batch size", ylabel="samples/s", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    _legend(figure, grid)
    return figure


def plot_memory(parts: Sequence[Part]) -> "Figure | None":
    """Peak memory of training against depth, by the accounting, above what weights and optimizer take anyway."""
    panels = [part for part in parts if part["kind"] == "depths"]
    if not panels:
        return None
    figure, grid = _panels(len(panels), "peak memory of a training step, by the accounting")
    for axes, part in zip(grid, panels, strict=False):
        for name, by_depth in part["depths"].items():
            depths = sorted(map(int, by_depth))
            axes.plot(depths, [sum(by_depth[str(d)].values()) / MB for d in depths], label=name, **_look(name))
        plain = part["depths"][STOCK.name]
        floor = [(plain[str(d)]["parameters"] + plain[str(d)]["optimizer"]) / MB for d in depths]
        axes.fill_between(depths, floor, color="#dddddd", label="weights and optimizer")
        axes.set(
            title=f"{part['size']}, {part['precision']}, batch {part['batch_size']}", xlabel="layers", ylabel="MB"
        )
        axes.set(xticks=depths, ylim=(0, None))
        axes.grid(alpha=0.3)
    _legend(figure, grid)
    return figure


def _panels(number: int, title: str) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    columns = min(2, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(5.5 * columns, 1 + 3.6 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(figure: "Figure", grid: "Sequence[Axes]") -> None:
    for axes in grid:
        if not axes.lines:
            axes.remove()
    handles, labels = grid[0].get_legend_handles_labels()
    columns = 4 if len(grid) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _contenders(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for part in parts for row in part["rows"]))


def _look(contender: str) -> dict[str, Any]:
    kind, _, rest = contender.partition(", beta ")
    beta, _, kept = rest.partition(", ")
    marker = MARKERS[2 if kept else 0 if beta in ("", "1") else 1]
    return {"color": COLOURS[kind], "marker": marker, "markersize": 4, "linestyle": "--" if beta == "1" else "-"}
