"""Compute what training published decoders takes, as `hf-pareprop bench --plan` does, for the tables of `docs/decoders.md`.

    python -m benchmarks.decoders [--page]

This takes some minutes, and writes `benchmarks/results/decoders.json` and the page. ``--page`` writes only the page. A table
is between `<!-- from benchmarks/results/decoders.json: MODEL -->` and `<!-- end -->`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_pareprop.tools.decoder_plan import PUBLISHED, TOKENS, configuration, explained, needs_by_way, table
from hf_pareprop.tools.decoders import TRAININGS, Line, Needs
from hf_pareprop.tools.records import GB, markdown

from .measure import ROOT
from .options import RESULTS, write_json
from .pages import update

FILE = RESULTS / "decoders.json"
PAGE = ROOT / "docs" / "decoders.md"
CAP = 80 * GB

Found = dict[str, dict[str, dict[str, Any]]]
"""The needs as in the JSON file: by model, training and way."""


def compute() -> Found:
    found: Found = {}
    for model in PUBLISHED:
        for training in TRAININGS:
            print(f"{model}: {training.name}", file=sys.stderr)
            own = needs_by_way(configuration(model), None, training)
            found.setdefault(model, {})[training.name] = {way: asdict(each) for way, each in own.items()}
    return found


def as_needs(fields: dict[str, Any]) -> Needs:
    """The needs of one way, from what :func:`compute` returns."""
    return Needs(
        **{name: Line(*value) if isinstance(value, (list, tuple)) else value for name, value in fields.items()}
    )


def lines_of(file: Path, model: str) -> Iterator[str]:
    """The tables of one model, in Markdown."""
    for i, (training, own) in enumerate(read(file)[model].items()):
        needs = {way: as_needs(fields) for way, fields in own.items()}
        yield from [""] if i else []
        yield f"**{training}**"
        yield ""
        yield from markdown(table(needs, TOKENS, CAP))
        yield ""
        yield explained(needs, TOKENS)


def read(file: Path = FILE) -> Found:
    found: Found = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        write_json(FILE, compute())
    update(PAGE, lines_of, "benchmarks.decoders", check=False)


if __name__ == "__main__":
    main()
