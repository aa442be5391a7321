"""Write the first table of README.md from the results of a GPU.

    python -m benchmarks.readme [--check]

The table is between `<!-- from benchmarks/results/NAME.json: SIZE, PRECISION, batch N -->` and `<!-- end -->`. ``--check``
writes nothing, and fails if the table does not show the results.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_pareprop.tools.compare import Row
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender
from hf_pareprop.tools.records import GB, markdown

from .measure import ROOT
from .pages import parser, update
from .throughput_report import rows_of

README = ROOT / "README.md"

WAYS = {
    STOCK: "plain training",
    CHECKPOINTING: "activation checkpointing",
    replace(CHECKPOINTING, graphed=True): "activation checkpointing, in a CUDA graph",
    Contender("reprop", 1.0): "reversible (`reprop`, beta 1)",
    Contender(
        "pareprop", 1.0, compiled=True, graphed=True
    ): "reversible (`pareprop`, beta 1), compiled steps in a CUDA graph",
}
"""The contenders in the table, with their names there."""


def lines_of(file: Path, what: str) -> Sequence[str]:
    """The table that a mark asks for.

    Raises:
        LookupError: one of the contenders was not measured in these results.
    """
    fields = ("size", "precision", "batch_size")
    every = [part for part in json.loads(file.read_text())["parts"] if part["kind"] == "speed"]
    parts = [part for part in every if "{}, {}, batch {}".format(*(part[field] for field in fields)) == what]
    rows = {way: row for part in parts for way, row in rows_of(part).items()}
    device = f"on an {parts[0]['about']['device_name']}"
    head = [device, "peak memory, weights and optimizer included", "samples per second (slowest to fastest step)"]
    return markdown([head, *([name, *_cells(rows[way])] for way, name in WAYS.items())])


def _cells(row: Row) -> tuple[str, str]:
    assert row.peak_bytes is not None
    slowest, fastest = row.range
    return f"{row.peak_bytes / GB:.1f} GB", f"{row.samples_per_second:.0f} ({slowest:.0f}-{fastest:.0f})"


def main() -> int:
    args = parser(__doc__).parse_args()
    return update(README, lines_of, "benchmarks.readme", args.check)


if __name__ == "__main__":
    sys.exit(main())
