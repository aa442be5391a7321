"""Write the README's figures of throughput from the results: what was measured, on what, and what was not.

    python -m benchmarks.readme [--check]

``--check`` writes nothing and fails if the README says something else than the results.
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

from .sizes import SIZES
from .throughput_report import Part, accuracy_of_prediction, row_of, speed_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- from benchmarks/readme.py -->", "<!-- end -->"

Column = tuple[str, str]
"""A size and a precision."""


def throughput(file: Path) -> Iterator[str]:
    """A table of one machine: a line per contender, a column per model and precision."""
    parts = json.loads(file.read_text())["parts"]
    speed = {column: max(own, key=_batch) for column, own in _by_column(parts, "speed").items()}
    limits = {column: own[0] for column, own in _by_column(parts, "limits").items()}
    about = next(iter(speed.values()))["about"]
    rounds = ", ".join(
        str(n) for n in sorted({len(row["ms"]) for p in speed.values() for row in p["rows"] if row["ms"]})
    )
    yield (
        f"On {about['device_name']} ({about['cores']} cores), torch {about['torch']}: samples per second (times plain "
        f"training), medians of {rounds} interleaved steps with AdamW, and peak memory, weights and optimizer included; "
        "in brackets where it was predicted, not measured."
    )
    yield ""
    yield "| | " + " | ".join(f"{', '.join(column)}, batch {_batch(part)}" for column, part in speed.items()) + " |"
    yield "|---|" + "---|" * len(speed)
    for name in dict.fromkeys(row["contender"] for part in speed.values() for row in part["rows"]):
        yield f"| {name} | " + " | ".join(_cell(part, name) for part in speed.values()) + " |"
    yield ""
    known = accuracy_of_prediction([part for part in parts if part["kind"] == "speed"])
    if known:
        yield (
            f"Wherever the peak was measured, the [accounting](#what-fits) that predicts it was within "
            f"{100 * max(abs(1 - value) for value in known):.1f} % of it."
        )
        yield ""
    if limits:
        yield from _limits(limits, predicted=next(iter(limits.values()))["device"] == "cpu")
    if file.with_name(picture := f"{file.stem}-memory.png").exists():
        yield f"![memory against depth](benchmarks/results/{picture})"
        yield ""


def _limits(limits: dict[Column, Part], predicted: bool) -> Iterator[str]:
    """The largest batches, of what has any."""
    caps = next(iter(limits.values()))["caps"]
    yield f"The largest batch within {', '.join(map(str, caps))} GB" + (
        ", by the accounting, as there is no such memory here to fill:" if predicted else ":"
    )
    yield ""
    yield "| | " + " | ".join(", ".join(column) for column in limits) + " |"
    yield "|---|" + "---|" * len(limits)
    for name in next(iter(limits.values()))["limits"]:
        found = [[part["limits"][name].get(str(cap)) for cap in caps] for part in limits.values()]
        if any(size is not None for sizes in found for size in sizes):
            yield f"| {name} | " + " | ".join(" / ".join(map(str, sizes)) for sizes in found) + " |"
    yield ""


def overlap(file: Path) -> Iterator[str]:
    found = json.loads(file.read_text())
    shares = ", ".join(f"{name} {100 * trace['hidden_share']:.0f} %" for name, trace in found["traces"].items())
    rows = {row["contender"].partition(",")[0]: row for row in found["rows"]}
    relative = ratio(speed_of(rows["pareprop"]), speed_of(rows["reprop"])) or 0
    plain = ratio(speed_of(rows["pareprop"]), speed_of(rows[STOCK.name])) or 0
    yield (
        f"How much of the rebuilding runs beside the gradient computation, read off a trace "
        f"(`python -m benchmarks.overlap`; {found['title']}): {shares}. There pareprop has {relative:.2f} times the "
        f"throughput of reprop and {plain:.2f} times that of plain training."
    )
    yield ""
    yield f"![timeline of the two lanes](benchmarks/results/{file.with_suffix('.png').name})"
    yield ""


def not_measured(files: Sequence[Path]) -> str:
    """What is missing from the full set: devices, sizes."""
    parts = [part for file in files for part in json.loads(file.read_text())["parts"]]
    missing = [size for size in SIZES if not any(p["kind"] == "speed" and p["size"] == size for p in parts)]
    lines = [] if any(part["device"] == "cuda" for part in parts) else ["anything on a GPU"]
    if missing:
        lines.append(f"the speed of {', '.join(missing)}")
    return f"**Not measured: {'; '.join(lines)}.**" if lines else ""


def section() -> str:
    files = sorted(RESULTS.glob("throughput-*.json"))
    lines = [line for file in files for line in throughput(file)]
    lines += [line for file in sorted(RESULTS.glob("overlap-*.json")) for line in overlap(file)]
    return "\n".join([*lines, not_measured(files)]).rstrip()


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
    path = ROOT / "README.md"
    text = path.read_text()
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    new = between.sub(lambda _: f"{BEGIN}\n{section()}\n{END}", text)
    if args.check and new != text:
        print("README.md does not show the results: run python -m benchmarks.readme", file=sys.stderr)
        return 1
    if new != text:
        save(path, lambda file: file.write_text(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
