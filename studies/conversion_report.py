"""Tables and a plot of the conversion study."""

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_pareprop.tools.records import fraction, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

NEAR = 0.003
"""Conversion may cost this many points of accuracy."""


def name_of(row: Row) -> str:
    """The variant of a case in words."""
    name = _variant(row)
    return f"{name}, {row['steps']} steps" if row.get("steps") else name


def _variant(row: Row) -> str:
    beta = row["beta"]
    if beta is None:
        return "stock"
    if isinstance(beta, list):
        kept = beta.count(0.0)
        which = "first" if beta[0] == 0 else "last"
        name = f"beta {fraction(max(beta))}, {which} {f'{kept} layers' if kept > 1 else 'layer'} conventional"
    else:
        name = f"beta {fraction(beta)}"
    if row.get("grid_bits"):
        name += f", grid of {row['grid_bits']} bits"
    if row.get("granularity"):
        name += ", coupled by layer"
    if row.get("predictor"):
        name += ", calibrated predictor"
    if row.get("schedule"):
        name += ", annealed to 0" if row["schedule"][-1][1] == 0 else ", grown from 1/16"
    if row.get("adapted"):
        name += f", {row['adapted']} steps of self-distillation"
    return name


def names_of(rows: Sequence[Row]) -> list[str]:
    """Every variant once: the stock model, the plain betas from large to small, then the special variants by kind."""

    def order(row: Row) -> tuple[str, bool, float]:
        kind = name_of(row).partition(",")[2]
        beta = row["beta"]
        return kind, beta is not None, -max(beta) if isinstance(beta, list) else -(beta or 0)

    return list(dict.fromkeys(name_of(row) for row in sorted(rows, key=order)))


def table(results: Sequence[Row]) -> str:
    return "\n\n".join(part for part in (_before(results), _after(results)) if part)


def _before(results: Sequence[Row]) -> str:
    rows = [r for r in results if "model" in r]
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = [["before any training", *(f"{m}: cosine (score), step" for m in models)]]
    for name in names_of(rows):
        found = {r["model"]: r for r in rows if name_of(r) == name}
        lines.append([name, *(_fidelity(found.get(m)) for m in models)])
    first = {
        (r["model"], what): r[what] for r in rows for what in ("stock_score", "stock_peak_mb") if r[what] is not None
    }
    stock = ("1.000" + _score(first.get((m, "stock_score"))) + _peak(first.get((m, "stock_peak_mb"))) for m in models)
    lines.insert(1, ["stock", *stock])
    return "\n".join(markdown(lines)) if rows else ""


def _fidelity(row: Row | None) -> str:
    return "" if row is None else f"{row['cosine']:.3f}" + _score(row["score"]) + _peak(row["peak_mb"])


def _score(score: float | None) -> str:
    return "" if score is None else f" ({100 * score:.1f} %)"


def _peak(peak_mb: float | None) -> str:
    return "" if peak_mb is None else f", {peak_mb:.0f} MB"


def _after(results: Sequence[Row]) -> str:
    """A table of the mean over seeds, with range and number of seeds in brackets; the difference to the stock model over the
    same seeds; and the same for the result as a stock model."""
    rows = [r for r in results if "task" in r]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    lines = [["after fine-tuning: accuracy, difference to stock", *tasks]]
    for name in names_of(rows):
        lines.append([name, *(_accuracy(rows, name, task) for task in tasks)])
    return "\n".join(markdown(lines)) if rows else ""


def of(rows: Sequence[Row], name: str, task: str) -> dict[int, Row]:
    """The cases of a variant on a task, by seed."""
    return {r["seed"]: r for r in rows if r.get("task") == task and name_of(r) == name}


def stock_for(rows: Sequence[Row], name: str) -> str:
    """The name of the stock model with which a variant is compared: the one with the same number of steps."""
    steps = next(r.get("steps") for r in rows if name_of(r) == name)
    return name_of({"beta": None, "steps": steps})


def difference(rows: Sequence[Row], name: str, task: str, what: str = "accuracy") -> float | None:
    """The mean difference in points to the stock model with the same number of steps, over the seeds that both have."""
    found, stock = of(rows, name, task), of(rows, stock_for(rows, name), task)
    pairs = [(found[s][what], stock[s]["accuracy"]) for s in found.keys() & stock.keys()]
    return 100 * statistics.mean(a - b for a, b in pairs) if pairs and pairs[0][0] is not None else None


def _accuracy(rows: Sequence[Row], name: str, task: str) -> str:
    found = of(rows, name, task)
    if not found:
        return ""
    scores = [100 * r["accuracy"] for r in found.values()]
    spread = f"[{min(scores):.1f}, {max(scores):.1f}] {len(scores)} seeds" if len(scores) > 1 else "1 seed"
    text = f"{statistics.mean(scores):.1f} ({spread})"
    if name == stock_for(rows, name):
        return text
    for what, words in (("accuracy", ""), ("accuracy_as_stock", "; as stock ")):
        points = difference(rows, name, task, what)
        text += "" if points is None else f"{words or ', '}{points:+.1f}"
    quarters = reached(rows, name, task)
    return text + ("" if quarters is None else f"; level after {quarters}/4")


def reached(rows: Sequence[Row], name: str, task: str) -> int | None:
    """After how many quarters of the budget the mean curve reaches the final value of the stock model; ``None`` if never."""
    curves = [[r["curve"] for r in of(rows, n, task).values()] for n in (name, stock_for(rows, name))]
    if not all(curves):
        return None
    own, stock = ([statistics.mean(points) for points in zip(*c, strict=True)] for c in curves)
    return next((i for i, point in enumerate(own, 1) if point >= stock[-1] - NEAR), None)


def plot(results: Sequence[Row]) -> "Figure":
    """Draw the difference to the stock model after fine-tuning against beta, with a line per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    betas = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    for task in dict.fromkeys(r["task"] for r in results if "task" in r):
        names = [(b, f"beta {fraction(b)}") for b in betas]
        points = [(b, difference(results, n, task)) for b, n in names if of(results, n, task)]
        points = [(b, d) for b, d in points if d is not None]
        axes.plot([b for b, _ in points], [d for _, d in points], marker="o", label=task)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhspan(-100 * NEAR, 100 * NEAR, alpha=0.15, color="gray")
    axes.set_xscale("log", base=2)
    axes.set_xticks(betas, [fraction(b) for b in betas])
    axes.set(xlabel="beta", ylabel="accuracy after fine-tuning, points above stock")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Print the tables of a results file: ``python -m studies.conversion_report RESULTS.json``."""
    import sys

    with open(sys.argv[1], encoding="utf-8") as file:
        print(table(json.load(file)["results"]))


if __name__ == "__main__":
    main()
