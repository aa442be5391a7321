"""What the benchmarks share: command-line options, and writing files."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_pareprop.tools.records import pick_device, save

RESULTS = Path(__file__).parent / "results"


class Parser(argparse.ArgumentParser):
    """A parser with the option `--out`, and with ``device`` also `--device`, which has to exist."""

    def __init__(self, description: str | None, out: Path = RESULTS, device: bool = False):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--out", type=Path, default=out, help="directory of the results; default: %(default)s")
        if device:
            choices = ("auto", "cpu", "cuda")
            self.add_argument("--device", choices=choices, default="auto", help="default: cuda if present")

    def parsed(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the arguments, make the directory, and resolve the device."""
        args = self.parse_args(arguments)
        if "device" in args:
            try:
                args.device = pick_device(args.device).type
            except ValueError as error:
                self.error(str(error))
        args.out.mkdir(parents=True, exist_ok=True)
        return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is expected")
    return int(text)


def file_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r}: a file name is expected; give the directory with --out")
    return text


def write_json(path: Path, found: Mapping[str, Any], indent: int | None = 1) -> None:
    save(path, lambda file: file.write_text(json.dumps(found, indent=indent) + "\n"))


def write_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    save(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
