"""A checkpoint in a directory or on the Hub: its configuration, and which of its files may be read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.bpe.model", "spiece.model")

COMPANIONS = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "generation_config.json",
    "processor_config.json",
)
"""Files of tokenizers, image processors and text generation."""

SENTENCE_ENCODER = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files of sentence-transformers, which describe how a model becomes a sentence encoder."""

LARGEST_JSON = 20 * 2**20
"""The largest number of bytes of a JSON file that is read."""

LONGEST_MESSAGE = 500
LONGEST_VALUE = 60
"""The largest number of characters of an error's message, and of a value in it."""

MADE_NO_SENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""The errors that transformers and PyTorch raise if the values of a file make no sense."""

CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "use_kernels", "kernel_config"}
"""Fields of JSON files that name code to run."""

IMPLEMENTATION = re.compile(r"(attn|experts)_implementation")
"""Fields that name an implementation. A value with a `/` in it names a repository of kernels."""


class CheckpointError(ValueError):
    """Raised if a checkpoint, or data for it, cannot be read. The message says what to do."""


@dataclass
class Source:
    """A checkpoint in a local directory.

    Attributes:
        name: the directory or Hub id, as it was given.
        folder: the directory of its files.
        config: the contents of its config.json, without the fields that name code.
        notes: facts about the checkpoint that a user should know.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def class_name(self) -> str:
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    def has_vocabulary(self) -> bool:
        """Whether there is a tokenizer. If not, transformers would make one that knows no words."""
        return any(True for pattern in VOCABULARIES for _ in self.folder.glob(pattern))

    def companions(self) -> list[str]:
        """The names of the files of its tokenizer or image processor."""
        return sorted({file.name for pattern in COMPANIONS for file in self.folder.glob(pattern)})

    def plain_file(self, name: str) -> Path | None:
        """The file ``name`` in the checkpoint; ``None`` if there is none."""
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        folder, real = self.folder.resolve(), path.resolve()
        within = folder in real.parents or (
            # In the Hub's cache a checkpoint is a directory of links to the files of all its versions.
            folder.parent.name == "snapshots" and folder.parents[1] / "blobs" in real.parents
        )
        if not within or ".." in Path(name).parts:
            raise CheckpointError(
                f"{path} leads out of the checkpoint, to {real}, and is not read: put the file itself there."
            )
        if not real.is_file():
            raise CheckpointError(f"{path} is not a file: put one there, or remove it.")
        return path


def open_source(name: str, *, weights: bool = True) -> Source:
    """The checkpoint called ``name``: a directory, or else an id on the Hub, whose files are downloaded.

    Args:
        weights: whether the files of weights are downloaded as well.
    """
    folder = Path(name)
    if not name:  # an empty name would be the current directory
        raise CheckpointError("the name of the checkpoint is empty: give a directory or an id on the Hub.")
    if not folder.is_dir():
        if folder.is_symlink():
            raise CheckpointError(f"{name} is a link that leads to no directory: give the directory itself.")
        if folder.exists():
            raise CheckpointError(f"{name} is a file: give the directory that it is in.")
        folder = _downloaded(name, weights)
    source = Source(name, folder, {})
    path = source.plain_file("config.json")
    if path is None:
        raise CheckpointError(f"{name} has no config.json: give the directory of a checkpoint of transformers.")
    source.config, dropped = read_without_code(path)
    if dropped and not source.model_type.startswith("rev_"):  # the code of a reversible checkpoint is this package's
        source.notes.append(f"config.json: {', '.join(dropped)} left out, because foreign code is not copied")
    for companion in source.companions():
        source.plain_file(companion)
    return source


def _downloaded(name: str, weights: bool) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: there is no such directory, and no model of the Hub has such a name.")
    files = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*"] if weights else []
    patterns = ["config.json", "README.md", *files, *COMPANIONS, *SENTENCE_ENCODER, "[0-9]*_*/*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hub is unreachable, so it cannot be looked up there: check the path, "
            "or the network."
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a directory nor a model that the Hub provides: {first_line(error)}"
        ) from error


def read_json(path: Path, kind: type = dict, largest: int = LARGEST_JSON) -> Any:
    """The object in a JSON file, or the list if ``kind`` is list.

    Args:
        path: the file.
        kind: the type that the file has to hold.
        largest: the largest number of bytes that the file may have.
    """
    if (size := path.stat().st_size) > largest:
        raise CheckpointError(f"{path} has {size} bytes, which is more than any file of its kind: it is not read.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): download or save it again.") from error
    if not isinstance(found, kind):
        what = "object" if kind is dict else "list"
        raise CheckpointError(f"{path} is not a JSON {what} but a {type(found).__name__}: download or save it again.")
    return found


def read_without_code(path: Path, kind: type = dict) -> tuple[Any, list[str]]:
    """The object in a JSON file without the fields that name code to run, and the names of those."""
    try:
        return without_code(read_json(path, kind))
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read.") from None


def without_code(value: Any) -> tuple[Any, list[str]]:
    """A value of a JSON file without the fields that name code to run, and the names of those."""
    if isinstance(value, list):
        pairs = [without_code(item) for item in value]
        return [item for item, _ in pairs], [name for _, names in pairs for name in names]
    if not isinstance(value, dict):
        return value, []
    kept, dropped = {}, []
    for name, item in value.items():
        if name in CODE or (IMPLEMENTATION.search(name) and "/" in json.dumps(item)):
            dropped.append(name)
        else:
            kept[name], inner = without_code(item)
            dropped += inner
    return kept, dropped


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """A context that turns a library's error about files into a CheckpointError with ``what``, the reason and ``advice``."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {first_line(error).rstrip('.')}. {advice}") from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type if it has no message. A long message is cut."""
    text = str(error).partition("Exception raised from")[0]  # after these words PyTorch lists functions of C++
    return _cut(" ".join(text.split())) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or its type if it has no message; cut as in :func:`one_line`."""
    return _cut((str(error).strip().splitlines() or [type(error).__name__])[0])


def quoted(value: Any) -> str:
    """A value as it is written in a JSON file; a long value is cut."""
    try:
        return _cut(json.dumps(value, ensure_ascii=False), LONGEST_VALUE)
    except (RecursionError, ValueError):  # an integer with thousands of digits
        return f"a {type(value).__name__}"


def _cut(text: str, longest: int = LONGEST_MESSAGE) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"
