"""Tables and plots of throughput, memory and largest batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_pareprop.tools.compare import Row
from hf_pareprop.tools.contenders import (
    CHECKPOINTING,
    COMPILED,
    COMPILED_WITHIN,
    OFFLOADING,
    SELECTIVE,
    STOCK,
    Contender,
)
from hf_pareprop.tools.records import MB, aligned, number, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Part = dict[str, Any]
"""The results of one process, as in the JSON file."""

COLOURS = {
    STOCK: "#000000",
    CHECKPOINTING: "#e69f00",
    SELECTIVE: "#f0e442",
    OFFLOADING: "#999999",
    COMPILED: "#56b4e9",
    **dict(zip(COMPILED_WITHIN, ("#8888ff", "#ccbbff"), strict=True)),
}
ENGINE_COLOURS = {"autograd": "#009e73", "reprop": "#d55e00", "pareprop": "#0072b2"}
MARKERS = ("o", "s", "^")
"""The markers of beta 1, of another beta, and of contenders that keep something at either."""


def rows_of(part: Part) -> dict[Contender, Row]:
    """The rows of a part of the kind `speed` or `trainer`."""
    return {row.contender: row for row in map(Row.from_dict, part["rows"])}


def found_of(part: Part, what: str) -> dict[Contender, Mapping[str, Any]]:
    """The results of a part of another kind: by cap if ``what`` is `limits`, by depth if it is `depths`."""
    return {Contender.from_dict(found["contender"]): found[what] for found in part["found"]}


def table(parts: Sequence[Part]) -> str:
    speed, trainer, limits = (
        [part for part in parts if part["kind"] == kind] for kind in ("speed", "trainer", "limits")
    )
    found = (speed_lines(speed), speed_lines(trainer, "size, with Trainer"), limit_lines(limits))
    tables = "\n\n".join("\n".join(lines) for lines in found if len(lines) > 1)
    checked = accuracy_of_prediction(speed)
    return tables + (f"\n\npredicted / measured peak: {checked[0]:.3f} to {checked[1]:.3f}" if checked else "")


def accuracy_of_prediction(parts: Sequence[Part]) -> tuple[float, float] | None:
    """The smallest and the largest ratio of predicted to measured peak."""
    rows = (row for part in parts for row in rows_of(part).values())
    known = [row.predicted_bytes / row.peak_bytes for row in rows if row.predicted_bytes and row.peak_bytes]
    return (min(known), max(known)) if known else None


def speed_lines(parts: Sequence[Part], size: str = "size") -> list[str]:
    """The table of speeds: a line per contender and batch size."""
    head = f"{size}||batch|contender|samples/s [slowest-fastest]|to plain|to checkpointing|to reprop"
    lines = [f"{head}|peak MB|reserved MB|predicted MB".split("|")]
    for part in parts:
        rows = rows_of(part)
        for way, row in rows.items():
            peers = (STOCK, CHECKPOINTING, Contender("reprop", way.beta))  # the last of these keeps nothing
            rates = [rows[peer].samples_per_second if peer in rows else None for peer in peers]
            sizes = (row.peak_bytes, row.reserved_bytes, row.predicted_bytes)
            lines.append(
                [
                    *(part["size"], part["precision"], str(row.batch_size), way.name),
                    row.error or row.rate,
                    *(number(ratio(row.samples_per_second, rate), ".2f") for rate in rates),
                    *(number(ratio(size, MB), ".0f") for size in sizes),
                ]
            )
    return aligned(lines, left={0, 1, 3})


def limit_lines(parts: Sequence[Part]) -> list[str]:
    """The table of limits: a line per contender with the largest batch under each cap."""
    caps = list(dict.fromkeys(cap for part in parts for cap in part["caps"]))
    lines = [["size", "", "largest batch", *(f"{cap} GB" for cap in caps)]]
    for part in parts:
        for way, found in found_of(part, "limits").items():
            sizes = [found.get(str(cap)) for cap in caps]
            if any(size is not None for size in sizes):
                lines.append([part["size"], part["precision"], way.name, *(number(size, "d") for size in sizes)])
    return aligned(lines, left={0, 1, 2})


# --- plots


def plot_throughput(parts: Sequence[Part]) -> "Figure | None":
    """Draw samples per second against batch size, with one panel per model and precision."""
    parts = [part for part in parts if part["kind"] == "speed"]
    panels = list(dict.fromkeys((part["size"], part["precision"]) for part in parts))
    if not panels:
        return None
    figure, grid = _panels(len(panels), "throughput")
    for axes, panel in zip(grid, panels, strict=False):
        own = [part for part in parts if (part["size"], part["precision"]) == panel]
        measured = [rows_of(part) for part in own]
        for way in dict.fromkeys(way for rows in measured for way in rows):
            rows = [found[way] for found in measured if way in found and found[way].ms]
            rates = [row.samples_per_second for row in rows]
            axes.plot([row.batch_size for row in rows], rates, label=way.name, **_look(way))
        axes.set(title=", ".join(panel), xlabel="batch size", ylabel="samples/s", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    _legend(figure, grid)
    return figure


def plot_memory(parts: Sequence[Part]) -> "Figure | None":
    """Draw the predicted peak memory of training against depth, above what weights and optimizer take."""
    panels = [part for part in parts if part["kind"] == "depths"]
    if not panels:
        return None
    figure, grid = _panels(len(panels), "peak memory of a training step, by the accounting")
    for axes, part in zip(grid, panels, strict=False):
        predicted = found_of(part, "depths")
        for way, by_depth in predicted.items():
            depths = sorted(map(int, by_depth))
            axes.plot(depths, [sum(by_depth[str(d)].values()) / MB for d in depths], label=way.name, **_look(way))
        plain = predicted[STOCK]
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


def _look(way: Contender) -> dict[str, Any]:
    colour = ENGINE_COLOURS[way.engine] if way.engine else COLOURS[replace(way, graphed=False)]
    marker = MARKERS[2 if way.budget else 0 if way.beta in (0, 1) else 1]
    return {"color": colour, "marker": marker, "markersize": 4, "linestyle": "--" if way.beta == 1 else "-"}
