"""Write the tables of `docs/results.md` from the results of `python -m benchmarks.throughput`.

    python -m benchmarks.results_page [--check]

A table stands between `<!-- from benchmarks/results/throughput-NAME.json -->` and `<!-- end -->`. ``--check`` writes nothing and fails
if a table says something else than the results, or if results have no table.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_pareprop.tools.contenders import STOCK
from hf_pareprop.tools.records import MB, ratio, save

from .measure import ROOT
from .throughput_report import Part, accuracy_of_prediction, row_of, speed_of

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- from (benchmarks/results/throughput-[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)

Column = tuple[str, str]
"""A size and a precision."""


def throughput(file: Path) -> Iterator[str]:
    """A table of one machine: a line per contender, a column per model and precision."""
    parts = json.loads(file.read_text())["parts"]
    speed = {column: max(own, key=_batch) for column, own in _by_column(parts, "speed").items()}
    limits = {column: own[0] for column, own in _by_column(parts, "limits").items()}
    yield "| | " + " | ".join(f"{', '.join(column)}, batch {_batch(part)}" for column, part in speed.items()) + " |"
    yield "|---|" + "---|" * len(speed)
    for name in dict.fromkeys(row["contender"] for part in speed.values() for row in part["rows"]):
        yield f"| {name} | " + " | ".join(_cell(part, name) for part in speed.values()) + " |"
    known = accuracy_of_prediction([part for part in parts if part["kind"] == "speed"])
    if known:
        yield ""
        yield (
            f"Wherever the peak was measured, the accounting that predicts it was within "
            f"{100 * max(abs(1 - value) for value in known):.1f} % of it."
        )
    if limits:
        yield ""
        yield from _limits(limits, predicted=next(iter(limits.values()))["device"] == "cpu")


def _limits(limits: dict[Column, Part], predicted: bool) -> Iterator[str]:
    """The largest batches, of what has any."""
    caps = next(iter(limits.values()))["caps"]
    yield f"The largest batch within {', '.join(map(str, caps))} GB" + (
        ", **predicted** by the accounting, as there is no such memory here to fill:" if predicted else ":"
    )
    yield ""
    yield "| | " + " | ".join(", ".join(column) for column in limits) + " |"
    yield "|---|" + "---|" * len(limits)
    for name in next(iter(limits.values()))["limits"]:
        found = [[part["limits"][name].get(str(cap)) for cap in caps] for part in limits.values()]
        if any(size is not None for sizes in found for size in sizes):
            yield f"| {name} | " + " | ".join(" / ".join(map(str, sizes)) for sizes in found) + " |"


def filled(text: str) -> str:
    """``text`` with its tables as the results have them."""
    return TABLE.sub(lambda found: found[1] + "\n".join(throughput(ROOT / found[2])) + "\n" + found[3], text)


def without_table(text: str) -> list[str]:
    """The results that the page has no table of."""
    shown = {found[2] for found in TABLE.finditer(text)}
    return sorted({path.relative_to(ROOT).as_posix() for path in RESULTS.glob("throughput-*.json")} - shown)


def _by_column(parts: Sequence[Part], kind: str) -> dict[Column, list[Part]]:
    columns: dict[Column, list[Part]] = {}
    for part in parts:
        if part["kind"] == kind:
            columns.setdefault((part["size"], part["precision"]), []).append(part)
    return columns


def _batch(part: Part) -> int:
    return part["batch_size"]


def _cell(part: Part, name: str) -> str:
    row = row_of(part, name)
    if row is None:
        return ""
    if row["error"]:
        return row["error"]
    speed = speed_of(row)
    relative = ratio(speed, speed_of(row_of(part, STOCK.name)))
    shown = f"{speed:.2f}" + ("" if relative is None else f" ({relative:.2f})")
    return shown + _peak(row)


def _peak(row: dict[str, Any]) -> str:
    if row.get("peak_bytes"):
        return f", {row['peak_bytes'] / MB:.0f} MB"
    return f", [{sum(row['predicted'].values()) / MB:.0f} MB]" if row.get("predicted") else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = PAGE.read_text()
    if missing := without_table(text):
        print(f"{PAGE} has no table of {', '.join(missing)}: add the two marks where it belongs.", file=sys.stderr)
        return 1
    if (new := filled(text)) == text:
        return 0
    if args.check:
        print(f"{PAGE} does not show the results: run python -m benchmarks.results_page", file=sys.stderr)
        return 1
    save(PAGE, lambda file: file.write_text(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
