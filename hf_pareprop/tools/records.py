"""Helpers for measurements: describe the machine and the versions, write files as a whole, format numbers and tables."""

import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Container, Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

MB, GB = 2**20, 2**30


def software() -> dict[str, Any]:
    """The versions, the commit and the date, which are needed to repeat a measurement."""
    ours = _git("ls-files", "--error-unmatch", __file__)  # an installed package may be inside another repository
    # Changed files of results do not count: they are not part of the measured code.
    changes = None if ours is None else _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: import_module(name).__version__ for name in ("torch", "transformers", "hf_pareprop")},
        "platform": platform.platform(),
        "git_commit": None if ours is None else _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model() -> str:
    """The name of the processor, to show to users."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def pick_device(name: str) -> torch.device:
    """The device for an option ``--device``. `auto` is CUDA if there is a CUDA device.

    Raises:
        ValueError: PyTorch has no such device here, or its memory cannot be measured.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: PyTorch finds no CUDA device here; use cpu, or a GPU and a CUDA build of PyTorch."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a device of PyTorch; use cpu or cuda.") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: memory is measured on a CPU and on CUDA; use one of them.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    return found


def device_name(device: torch.device, threads: bool = True) -> str:
    """The name of the device, to show to users. For a CPU also the number of threads, if ``threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()} with {torch.get_num_threads()} threads" if threads else cpu_model()


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with another file name first, and then rename the file, so that ``path`` is never half-written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def size_in_words(size: float) -> str:
    """A number of bytes in words: in MB below one GB, otherwise in GB."""
    return f"{size / MB:.0f} MB" if size < GB else f"{size / GB:.2f} GB"


def fraction(beta: float) -> str:
    """A coupling as a fraction: `1/32`."""
    return f"{beta:g}" if beta in (0, 1) else f"1/{1 / beta:g}"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def number(value: float | None, form: str) -> str:
    """``value`` in a given format; a dash if there is no value."""
    return "-" if value is None else format(value, form)


def layers_in_words(config: Any) -> str:
    """The number of layers of a reversible configuration, and of each stage if there are several: `12 (2 + 2 + 6 + 2)`."""
    depths = config.stage_depths
    return f"{sum(depths)} ({' + '.join(map(str, depths))})" if len(depths) > 1 else str(depths[0])


def width_of(config: Any) -> int:
    """The width of the hidden states. If it differs between stages, that of the first stage."""
    return getattr(config, "embed_dim", None) or config.hidden_size


def slug(name: str) -> str:
    """``name`` in a form that can be part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as the lines of a table in Markdown. The first row is its head."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|" + "---|" * len(lines[0]), *rest]


def aligned(lines: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Rows of cells as lines of text with aligned columns. The columns in ``left`` are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
