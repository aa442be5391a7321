"""What goes with a measurement: the machine and the versions, files written whole, numbers in columns."""

import os
import platform
import re
import subprocess
from collections.abc import Callable, Container, Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

MB = 2**20


def software() -> dict[str, Any]:
    """Versions, the commit and the date: what has to be known to repeat a measurement."""
    ours = _git(
        "ls-files", "--error-unmatch", __file__
    )  # installed, the package may lie in somebody else's repository
    # Results are no part of what was measured.
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


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name for people."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device's name for people, and the threads that compute on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()} with {torch.get_num_threads()} threads"


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make the file under another name first, so that ``path`` never holds half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def size_in_words(size: float) -> str:
    """Bytes for people: MB below one GB."""
    return f"{size / MB:.0f} MB" if size < 2**30 else f"{size / 2**30:.2f} GB"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def number(value: float | None, form: str) -> str:
    """``value`` by a format specification; a dash if there is none."""
    return "-" if value is None else format(value, form)


def layers_in_words(config: Any) -> str:
    """How many layers a reversible configuration has, and in which stages: `12`, or `12 (2 + 2 + 6 + 2)`."""
    depths = config.stage_depths
    return f"{sum(depths)} ({' + '.join(map(str, depths))})" if len(depths) > 1 else str(depths[0])


def width_of(config: Any) -> int:
    """The width of the hidden states; of the first stage, where each stage has another."""
    return getattr(config, "embed_dim", None) or config.hidden_size


def slug(name: str) -> str:
    """``name`` as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def aligned(lines: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Rows of cells as lines of text in columns, of which those in ``left`` are flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
