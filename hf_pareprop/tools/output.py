"""Write directories that appear whole or not at all, and never replace files that this package did not write."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

MANIFEST = ".hf-pareprop.json"
"""A list of the files and their SHA-256, in every directory that is written. An unchanged directory may be replaced."""


class OutputError(ValueError):
    """Raised for a directory that cannot be written; the message says what to do."""


class Output:
    """A directory to be written. Only one process can hold it at a time.

    Example:
        >>> with Output(Path("out")) as output, output.writing() as folder:
        ...     model.save_pretrained(folder)

    Args:
        target: the directory to make.
        overwrite: replace it if this package wrote it and nothing in it has changed since.

    Raises:
        OutputError: ``target`` exists and must not be replaced, holds files that must not be deleted, or cannot be written;
            or another process is writing it.
    """

    def __init__(self, target: Path, overwrite: bool = False):
        self.target, self.overwrite = Path(os.path.abspath(target)), overwrite
        self.notes: list[str] = []
        """Messages about files that an interrupted run had left here."""
        if self.target.parent == self.target or not self.target.name:
            raise OutputError(f"{target} cannot be made: name a directory of its own.")
        self.folder, self.old, self.lock_file = (
            self.target.with_name(f".{self.target.name}.hf-pareprop{kind}") for kind in ("", "-old", "-lock")
        )
        self._made_parents: list[Path] = []
        self._lock = FileLock(self.lock_file, timeout=0)

    def __enter__(self) -> "Output":
        try:
            self._make_parents()
            try:
                self._lock.acquire()
            except Timeout:
                if not self.lock_file.exists():  # in /proc, for example, no file can be made
                    raise OutputError(f"cannot write beside {self.target}: name another directory.") from None
                raise OutputError(
                    f"another process is writing {self.target}: wait for it, or name another directory."
                ) from None
            try:
                self._clean()
                self.check()
                self.folder.mkdir()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise OutputError(f"cannot write beside {self.target}: {error.strerror or error}.") from error
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def check(self) -> None:
        """Raise OutputError if ``target`` exists and must not be replaced."""
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise OutputError(f"{self.target} exists: name another directory, or add --overwrite to replace it.")
        if self.target.is_symlink() or not self.target.is_dir():
            kind = "a link" if self.target.is_symlink() else "a file"
            raise OutputError(f"{self.target} is {kind}, which is not replaced by a directory: name another.")
        if changes := changes_in(self.target):
            raise OutputError(
                f"{self.target} is not replaced, because hf-pareprop did not write everything in it ({changes}): move or delete it "
                "yourself, or name another directory."
            )

    def keep(self, source: Path) -> None:
        """Raise OutputError if writing would delete or change ``source``."""
        source, target = source.resolve(), self.target.resolve()
        if source == target:
            raise OutputError(f"{self.target} is the source itself, which is not overwritten: name another directory.")
        if target in source.parents:
            raise OutputError(f"{self.target} holds the source, which is not deleted: name another directory.")
        if source in target.parents:
            raise OutputError(f"{self.target} is inside the source, which stays as it is: name another directory.")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A context that gives a directory to fill. It becomes ``target`` if the block ends without an error."""
        try:
            yield self.folder
            _describe(self.folder)
            _sync(self.folder)
            self._publish()
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {self.target}: {error}. Nothing was left there.") from error

    def _publish(self) -> None:
        """Move the finished directory to its place. If that fails, the old directory is put back."""
        self.check()  # again, because something may have been put there in the meantime
        if self.target.exists():
            self.target.rename(self.old)
        try:
            self.folder.rename(self.target)
        except OSError:
            if self.old.exists():
                self.old.rename(self.target)
            raise
        _sync_entry(self.target.parent)
        shutil.rmtree(self.old, ignore_errors=True)
        self._made_parents.clear()

    def _clean(self) -> None:
        """Remove what a killed process has left, or put back the directory that it was replacing."""
        for left in (self.folder, self.old):
            if os.path.lexists(left) and (left.is_symlink() or not left.is_dir()):
                raise OutputError(
                    f"{left} is in the way and not a directory of this command: move or delete it yourself."
                )
        if self.old.exists() and not os.path.lexists(self.target):
            self.old.rename(self.target)
            self.notes.append(f"{self.target.name} is back, which an interrupted run was replacing")
        for left in (self.folder, self.old):
            if left.exists():
                shutil.rmtree(left)
                self.notes.append(f"removed {left.name}, which an interrupted run had left")

    def _make_parents(self) -> None:
        missing = [self.target.parent, *self.target.parent.parents]
        for parent in missing:
            if os.path.lexists(parent) and not parent.is_dir():
                raise OutputError(f"cannot write {self.target}: {parent} is not a directory. Name another place.")
        self._made_parents = [parent for parent in missing if not parent.exists()]
        self.target.parent.mkdir(parents=True, exist_ok=True)

    def _release(self) -> None:
        with suppress(OSError):
            # The lock is still held: a process that waits for it checks whether the file still exists.
            self.lock_file.unlink(missing_ok=True)
        self._lock.release()
        for parent in self._made_parents:
            with suppress(OSError):
                parent.rmdir()


def changes_in(folder: Path) -> str:
    """What has changed in a directory since this package wrote it, in words; empty if nothing has changed."""
    manifest = folder / MANIFEST
    try:
        if manifest.is_symlink() or not manifest.is_file():
            raise ValueError("not a file")
        written = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"there is no list of what it wrote, {MANIFEST}"
    found = {_name(path, folder): path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    del found[MANIFEST]
    if not isinstance(written, dict) or (others := sorted(found.keys() ^ written.keys())):
        return f"{', '.join(others[:3])} came or went since" if isinstance(written, dict) else f"{MANIFEST} is damaged"
    changed = [n for n, path in found.items() if path.is_symlink() or not path.is_file() or digest(path) != written[n]]
    return f"{', '.join(sorted(changed)[:3])} changed since" if changed else ""


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _describe(folder: Path) -> None:
    files = {_name(path, folder): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    said = {"written_by": "hf-pareprop", "files": files}
    (folder / MANIFEST).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sync(folder: Path) -> None:
    """Write everything in a directory to the disk, so that a renamed directory is complete even after a crash."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for entry in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync_entry(entry)


def _sync_entry(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open directories
        return
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
