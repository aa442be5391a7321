"""Write the tables of `docs/results.md` from the results of `python -m benchmarks.throughput` and of `python -m benchmarks.host`.

    python -m benchmarks.results_page [--check]

A table is between `<!-- from benchmarks/results/throughput-NAME.json -->` and `<!-- end -->`; with `: trainer` after the name
it shows the steps of Trainer. ``--check`` writes nothing. It fails if a table does not show the results, or if there are
results without a table.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from hf_pareprop.tools.compare import Row
from hf_pareprop.tools.contenders import STOCK, Contender
from hf_pareprop.tools.records import MB, markdown, ratio

from . import host
from .measure import ROOT
from .options import RESULTS
from .pages import TABLE, parser, update
from .throughput_report import Part, accuracy_of_prediction, found_of, rows_of

PAGE = ROOT / "docs" / "results.md"

Column = tuple[str, str]
"""A size and a precision."""


def lines_of(file: Path, what: str | None = None) -> Iterator[str]:
    """The table of one machine: a line per contender, a column per model and precision; or that of the host's work."""
    if file.name == host.FILE.name:
        yield from host.lines_of(file)
        return
    parts = json.loads(file.read_text())["parts"]
    shown = _by_column(parts, what or "speed")
    speed = {column: max(own, key=itemgetter("batch_size")) for column, own in shown.items()}
    head = ["", *(f"{', '.join(column)}, batch {part['batch_size']}" for column, part in speed.items())]
    measured = [rows_of(part) for part in speed.values()]
    ways = dict.fromkeys(way for rows in measured for way in rows)
    yield from markdown([head, *([way.name, *(_cell(rows, way) for rows in measured)] for way in ways)])
    if what:
        return
    known = accuracy_of_prediction([part for part in parts if part["kind"] == "speed"])
    if known:
        yield ""
        yield (
            f"Wherever the peak was measured, the accounting that predicts it was within "
            f"{100 * max(abs(1 - value) for value in known):.1f} % of it."
        )
    if limits := {column: own[0] for column, own in _by_column(parts, "limits").items()}:
        yield ""
        yield from _limits(limits, predicted=next(iter(limits.values()))["device"] == "cpu")


def _limits(limits: dict[Column, Part], predicted: bool) -> Iterator[str]:
    """The table of the largest batches, if there are any."""
    caps = next(iter(limits.values()))["caps"]
    yield f"The largest batch within {', '.join(map(str, caps))} GB" + (
        ", **predicted** by the accounting, as there is no such memory here to fill:" if predicted else ":"
    )
    yield ""
    lines = [["", *(", ".join(column) for column in limits)]]
    columns = [found_of(part, "limits") for part in limits.values()]
    for way in columns[0]:
        found = [[of[way].get(str(cap)) for cap in caps] for of in columns]
        if any(size is not None for sizes in found for size in sizes):
            lines.append([way.name, *(" / ".join(map(str, sizes)) for sizes in found)])
    yield from markdown(lines)


def without_table(text: str) -> list[str]:
    """The results for which the page has no table."""
    shown = {found["file"] for found in TABLE.finditer(text)}
    return sorted({path.relative_to(ROOT).as_posix() for path in RESULTS.glob("throughput-*.json")} - shown)


def _by_column(parts: Sequence[Part], kind: str) -> dict[Column, list[Part]]:
    columns: dict[Column, list[Part]] = {}
    for part in parts:
        if part["kind"] == kind:
            columns.setdefault((part["size"], part["precision"]), []).append(part)
    return columns


def _cell(rows: Mapping[Contender, Row], way: Contender) -> str:
    if (row := rows.get(way)) is None:
        return ""
    if row.error:
        return row.error
    rate, plain = row.samples_per_second, rows[STOCK].samples_per_second if STOCK in rows else None
    shown = f"{rate:.2f}" + (f" ({relative:.2f})" if (relative := ratio(rate, plain)) is not None else "")
    if row.peak_bytes:
        return f"{shown}, {row.peak_bytes / MB:.0f} MB"
    return shown + (f", [{row.predicted_bytes / MB:.0f} MB]" if row.predicted_bytes else "")


def main() -> int:
    args = parser(__doc__).parse_args()
    if missing := without_table(PAGE.read_text()):
        print(f"{PAGE} has no table of {', '.join(missing)}: add the two marks where it belongs.", file=sys.stderr)
        return 1
    return update(PAGE, lines_of, "benchmarks.results_page", args.check)


if __name__ == "__main__":
    sys.exit(main())
