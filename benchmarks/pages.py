"""Write the tables of documentation pages from results."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_pareprop.tools.records import save

from .measure import ROOT

TABLE = re.compile(
    r"(?P<begin><!-- from (?P<file>benchmarks/results/[\w.-]+\.json)(: (?P<what>[^\n]+))? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
"""The place of a table. Its mark names the file of the results, and which part of them the table shows."""

LinesOf = Callable[[Path, str], Iterable[str]]
"""A function from a file of results, and the part of them that is shown, to the lines of a table."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option ``--check``, which writes nothing."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--check", action="store_true")
    return found


def filled(text: str, lines_of: LinesOf) -> str:
    """``text`` with its tables replaced by those of the results."""

    def table(place: re.Match[str]) -> str:
        lines = lines_of(ROOT / place["file"], place["what"])
        return place["begin"] + "".join(f"{line}\n" for line in lines) + place["end"]

    return TABLE.sub(table, text)


def update(page: Path, lines_of: LinesOf, module: str, check: bool) -> int:
    """Write a page whose tables show the results, or with ``check`` only compare them. Returns the exit status."""
    text = page.read_text()
    if (new := filled(text, lines_of)) == text:
        return 0
    if check:
        print(f"{page} does not show the results: run python -m {module}", file=sys.stderr)
        return 1
    save(page, lambda file: file.write_text(new))
    return 0
