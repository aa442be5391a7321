"""What a benchmark found: the machine it ran on, a table, a JSON file and a plot."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_pareprop.tools.records import MB, aligned, number, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = (
    {"color": "#000000", "marker": "o"},
    {"color": "#e69f00", "marker": "s"},
    {"color": "#56b4e9", "marker": "D"},
    {"color": "#d55e00", "marker": "^"},
    {"color": "#009e73", "marker": "v", "linestyle": "--"},
    {"color": "#cc79a7", "marker": "P"},
    {"color": "#0072b2", "marker": "X", "linestyle": "--"},
)
"""One per method. Okabe and Ito's colours, which the colour-blind can tell apart; dashes show a line beneath."""


@dataclass
class Result:
    """One case: a method on a family of models at a depth.

    Attributes:
        peak_bytes: memory of one step on top of what was allocated before it.
        reserved_bytes: the same as the CUDA allocator sees it, unused parts of its blocks included; CUDA only.
        ms: every sample of the time of one step.
        memory_error: why there is no peak.
        time_error: why there are no samples, or fewer than asked for.
    """

    family: str
    depth: int
    method: str
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    ms: list[float] = field(default_factory=list)
    memory_error: str | None = None
    time_error: str | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.ms) if self.ms else None

    @property
    def errors(self) -> list[str]:
        return list(dict.fromkeys(error for error in (self.memory_error, self.time_error) if error))


class Results(list[Result]):
    """All cases, in the order in which they are reported."""

    def of(self, family: str, method: str) -> list[Result]:
        """One method on one family, by depth."""
        return sorted((r for r in self if (r.family, r.method) == (family, method)), key=lambda r: r.depth)

    def at(self, family: str, depth: int, method: str) -> Result | None:
        return next((r for r in self.of(family, method) if r.depth == depth), None)

    def families(self) -> list[str]:
        return list(dict.fromkeys(r.family for r in self))

    def methods(self) -> list[str]:
        return list(dict.fromkeys(r.method for r in self))

    def bytes_per_layer(self, family: str, method: str, depths: Sequence[int] | None = None) -> float | None:
        """Slope of peak memory over depth, a least-squares fit; ``None`` with fewer than two depths measured."""
        points = [(r.depth, r.peak_bytes) for r in self.of(family, method) if depths is None or r.depth in depths]
        points = [(depth, peak) for depth, peak in points if peak is not None]
        if len(points) < 2:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def table(results: Results, references: Sequence[str]) -> str:
    """One line per case, then the errors.

    Args:
        references: methods that times are divided by; the first one's memory per layer is what others' is a share of.
    """
    head = ["family", "depth", "method", "ms [min-max]", *(f"x {name}" for name in references)]
    lines = [[*head, "peak MB", "MB/added layer", f"% of {references[0]}"]]
    for result in results:
        times = [results.at(result.family, result.depth, name) for name in references]
        per_layer, share = _growth(results, result, references[0])
        lines.append(
            [
                result.family,
                str(result.depth),
                result.method,
                _time(result),
                *(number(ratio(result.median_ms, t.median_ms if t else None), ".2f") for t in times),
                number(ratio(result.peak_bytes, MB), ".1f"),
                number(ratio(per_layer, MB), ".2f"),
                number(share, ".1f"),
            ]
        )
    errors = [f"{r.family}, depth {r.depth}, {r.method}: {error}" for r in results for error in r.errors]
    return "\n".join([*aligned(lines, left={0, 2}), *errors])


def _growth(results: Results, result: Result, reference: str) -> tuple[float | None, float | None]:
    """Bytes per layer added since the next smaller depth, and their percentage of the reference's."""
    smaller = [r.depth for r in results.of(result.family, result.method) if r.depth < result.depth]
    if not smaller:
        return None, None
    depths = (smaller[-1], result.depth)
    per_layer = results.bytes_per_layer(result.family, result.method, depths)
    share = ratio(per_layer, results.bytes_per_layer(result.family, reference, depths))
    return per_layer, share and 100 * share


def _time(result: Result) -> str:
    if not result.ms:
        return "-"
    return f"{result.median_ms:.1f} [{min(result.ms):.1f}-{max(result.ms):.1f}]"


def as_dicts(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def plot(results: Results, title: str) -> "Figure":
    """Memory and time against depth, one row of panels per family and one line per method."""
    from matplotlib.figure import Figure  # here, because it would slow down the start of every child

    families = results.families()
    figure = Figure(figsize=(11, 1.7 + 3.6 * len(families)), layout="constrained")
    rows = figure.subplots(len(families), 2, squeeze=False)
    for family, (memory, duration) in zip(families, rows, strict=True):
        own = [r for r in results if r.family == family]
        for axes, what, unit in ((memory, "activation memory", "MB"), (duration, "time of one step", "ms")):
            axes.set(title=f"{family}: {what}", xlabel="layers", ylabel=unit)
            axes.set_xticks(sorted({r.depth for r in own}))
            axes.grid(alpha=0.3)
        for method, look in zip(results.methods(), LOOKS, strict=False):
            cases, style = results.of(family, method), {"label": method, "markersize": 5, **look}
            peaks = [(r.depth, r.peak_bytes / MB) for r in cases if r.peak_bytes is not None]
            memory.plot([x for x, _ in peaks], [y for _, y in peaks], **style)
            _plot_times(duration, [r for r in cases if r.ms], style)
        memory.set_ylim(bottom=0)
        # One slow sample, which the bar of its case may leave the panel for, must not squeeze all lines.
        slowest = max((r.median_ms for r in own if r.median_ms is not None), default=1.0)
        duration.set_ylim(0, 1.25 * slowest)
        missing = [f"{r.method}, {r.depth} layers: {error[:60]}" for r in own for error in r.errors]
        memory.text(0.02, 0.97, "\n".join(missing), transform=memory.transAxes, va="top", fontsize=7)
    figure.suptitle(title, fontsize=10)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _plot_times(axes: Any, cases: Sequence[Result], style: dict[str, Any]) -> None:
    """Medians, with bars from the fastest to the slowest sample."""
    medians = [statistics.median(r.ms) for r in cases]
    below = [m - min(r.ms) for r, m in zip(cases, medians, strict=True)]
    above = [max(r.ms) - m for r, m in zip(cases, medians, strict=True)]
    axes.errorbar([r.depth for r in cases], medians, yerr=[below, above], capsize=2, elinewidth=0.8, **style)
