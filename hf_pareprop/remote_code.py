"""The code that travels with a checkpoint, and how it is told from somebody else's."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

MARK = "# Written by hf_pareprop"


def code_of(cls: type) -> list[Path]:
    """The module of a class, and those that it imports from the same directory."""
    source = str(sys.modules[cls.__module__].__file__)
    return [Path(file) for file in dict.fromkeys([source, *get_relative_import_files(source)])]


def save_code(folder: Path, files: Sequence[Path]) -> None:
    """Copy modules into a checkpoint, each with a first line by which it is known as this package's.

    Args:
        folder: made if it does not exist.

    Raises:
        ValueError: a file of the same name is there that this package did not write, or that was changed since.
    """
    code = {file.name: _body(file.read_bytes()) for file in files}
    for name, body in code.items():
        if (found := folder / name).exists() and not (_is_marked(found.read_bytes()) or found.read_bytes() == body):
            raise ValueError(
                f"{found} is not replaced by the code of the model, as hf_pareprop did not write it: move it, or save to another "
                "directory."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in code.items():
        (folder / name).write_bytes(_first_line(body) + body)


def _first_line(body: bytes) -> bytes:
    return f"{MARK}, SHA-256 {_digest(body)}\n".encode()


def _is_marked(content: bytes) -> bool:
    """Whether the first line names the digest of the rest."""
    first, _, body = content.partition(b"\n")
    return first.startswith(MARK.encode()) and first.strip().endswith(_digest(body).encode())


def _body(content: bytes) -> bytes:
    """A module without the first line that it has where it was loaded from a checkpoint."""
    return content.partition(b"\n")[2] if _is_marked(content) else content


def _digest(body: bytes) -> str:
    return hashlib.sha256(body.replace(b"\r\n", b"\n")).hexdigest()  # as git may write lines
