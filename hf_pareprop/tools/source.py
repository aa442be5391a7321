"""A checkpoint in a directory or on the Hub: its configuration, and which of its files may be read."""

import json
import re
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
    "processor_config.json",
)
"""Files of tokenizers and image processors."""

SENTENCE_ENCODER = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files with which sentence-transformers says how a model becomes a sentence encoder."""

LARGEST_JSON = 20 * 2**20
MOST_LABELS = 10**7
LONGEST_MESSAGE = 1000
"""Bytes of a JSON file that is read whole."""

CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "use_kernels", "kernel_config"}
"""Fields of JSON files that name code to run."""

IMPLEMENTATION = re.compile(r"(attn|experts)_implementation")
"""Fields that name how a part is computed; with a `/` in it, by a kernel from a repository."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message says what to do."""


@dataclass
class Source:
    """A checkpoint in a local directory.

    Attributes:
        name: directory or Hub id, as it was given.
        folder: where its files are.
        config: the contents of its config.json, without what names code elsewhere.
        notes: what a user should know of it.
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
        return str(names[0]) if isinstance(names, list) and names else ""

    def has_vocabulary(self) -> bool:
        """Whether a tokenizer is there; without one, transformers would make one that knows no words."""
        return any(True for pattern in VOCABULARIES for _ in self.folder.glob(pattern))

    def companions(self) -> list[str]:
        """The names of the files of its tokenizer or image processor."""
        return sorted({file.name for pattern in COMPANIONS for file in self.folder.glob(pattern)})

    def plain_file(self, name: str) -> Path | None:
        """The file called ``name`` within the checkpoint; ``None`` if there is none.

        Raises:
            CheckpointError: it is something else than a file in the checkpoint's own directory.
        """
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
        weights: whether they are wanted, too.

    Raises:
        CheckpointError: there is none, it has no readable configuration, or files that lead elsewhere.
    """
    folder = Path(name)
    if not name or not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{name} is a file: give the directory that it is in.")
        folder = _downloaded(name, weights)
    source = Source(name, folder, {})
    path = source.plain_file("config.json")
    if path is None:
        raise CheckpointError(f"{name} has no config.json: give the directory of a checkpoint of transformers.")
    source.config, dropped = read_without_code(path)
    check_counts(source.config)
    if dropped and not source.model_type.startswith("rev_"):  # whose code is this package's
        source.notes.append(f"config.json: {', '.join(dropped)} left out, as foreign code is not carried along")
    for companion in source.companions():
        source.plain_file(companion)
    return source


def _downloaded(name: str, weights: bool) -> Path:
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{name or 'an empty name'}: there is no such directory, and no model of the Hub has such a name."
        )
    files = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*"] if weights else []
    patterns = ["config.json", "README.md", *files, *COMPANIONS, *SENTENCE_ENCODER, "[0-9]*_*/*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such directory, and the Hub is unreachable, so that it cannot be a model there either: check the "
            "path, or the network."
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a directory nor a model that the Hub gives: {first_line(error)}"
        ) from error


def check_counts(config: dict[str, Any]) -> None:
    """
    Raises:
        CheckpointError: there are so many labels that there is no memory for the names that transformers makes of them.
    """
    for name in ("num_labels", "num_classes"):  # transformers' and timm's
        count = config.get(name)
        if isinstance(count, (int, float)) and not isinstance(count, bool) and not count < MOST_LABELS:
            raise CheckpointError(f"config.json has {name}={count}: a whole number below {MOST_LABELS} is expected.")


def read_json(path: Path, kind: type = dict) -> Any:
    """The object in a JSON file, or the list if that is the ``kind``.

    Raises:
        CheckpointError: there is none.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes, which is more than any file of its kind: it is not read.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(found, kind):
        what = "object" if kind is dict else "list"
        raise CheckpointError(f"{path} is not a JSON {what} but a {type(found).__name__}.")
    return found


def read_without_code(path: Path, kind: type = dict) -> tuple[Any, list[str]]:
    """The object in a JSON file without the fields that name code to run, and the names of those.

    Raises:
        CheckpointError: there is none.
    """
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


def one_line(error: BaseException) -> str:
    """The message of an error, or its type where it has none; cut where it repeats a value of many characters."""
    return _cut(" ".join(str(error).split())) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The same of its first line."""
    return _cut((str(error).strip().splitlines() or [type(error).__name__])[0])


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"
