"""The code that is saved with a checkpoint, and how it is recognised as this package's code."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

MARK = "# Written by hf_pareprop"


def code_of(cls: type) -> list[Path]:
    """The files of a class's module and of the modules that it imports from the same directory."""
    source = str(sys.modules[cls.__module__].__file__)
    return [Path(file) for file in dict.fromkeys([source, *get_relative_import_files(source)])]


def save_code(folder: Path, files: Sequence[Path]) -> None:
    """Copy modules into a checkpoint. The first line of each copy marks it as written by this package.

    Args:
        folder: the checkpoint; it is made if it does not exist.
        files: the modules.

    Raises:
        ValueError: the folder has a file of the same name that this package did not write, or that was changed afterwards.
    """
    code = {file.name: _body(file.read_bytes()) for file in files}
    for name, body in code.items():
        if (found := folder / name).exists() and not (is_marked(found.read_bytes()) or found.read_bytes() == body):
            raise ValueError(
                f"{found} is not replaced by the code of the model, because hf_pareprop did not write it: move it, or save to "
                "another directory."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in code.items():
        path, content = folder / name, _first_line(body) + body
        if not path.exists() or path.read_bytes() != content:  # a model and its configuration write the same files
            path.write_bytes(content)


def _first_line(body: bytes) -> bytes:
    return f"{MARK}, SHA-256 {_digest(body)}\n".encode()


def is_marked(content: bytes) -> bool:
    """Whether this package wrote a module into a checkpoint and nobody changed it: its first line has the rest's digest."""
    first, _, body = content.partition(b"\n")
    return first.startswith(MARK.encode()) and first.strip().endswith(_digest(body).encode())


def _body(content: bytes) -> bytes:
    """A module without the first line that marks it, which it has if it was loaded from a checkpoint."""
    return content.partition(b"\n")[2] if is_marked(content) else content


def _digest(body: bytes) -> str:
    return hashlib.sha256(body.replace(b"\r\n", b"\n")).hexdigest()  # git may have changed the line ends
