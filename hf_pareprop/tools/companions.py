"""Copy the files beside a model's weights: tokenizer, image processor, modules of a sentence encoder. Code is not copied."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..remote_code import is_marked
from .source import SENTENCE_ENCODER, CheckpointError, Source, read_json, read_without_code

EXPECTED = ("config.json", "README.md", ".*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*")
"""Files that do not count as left out, because they are read or written again."""


VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
"""JSON files that hold many words and never name code."""

LARGEST_VOCABULARY = 500 * 2**20


@dataclass
class Copied:
    """What was copied.

    Attributes:
        names: the names of the copied files.
        left: the names of files in the source that were not copied.
        notes: other facts that a user should know.
    """

    names: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def copy_companions(source: Source, folder: Path, model_type: str, allow_pickle: bool = False) -> Copied:
    """Copy the files beside the weights, without the code that they name.

    Args:
        source: the checkpoint to copy from.
        folder: the directory to copy to.
        model_type: the type of the stock model. If the files do not name the class of the tokenizer, it follows from this
            type. The Auto classes cannot find it by the model type of the copy.
        allow_pickle: whether pickled weights of a sentence encoder's modules are copied.
    """
    copied = Copied()
    for name in source.companions():
        _copy(source, name, folder, copied)
    _name_tokenizer(source, folder, model_type)
    _copy_sentence_encoder(source, folder, copied, allow_pickle)
    copied.names.sort()
    copied.left = sorted(_others(source, copied.names))
    return copied


def _copy(source: Source, name: str, folder: Path, copied: Copied, kind: type = dict) -> None:
    """Copy one file. Fields that name code are removed from JSON files, except from those that hold vocabularies."""
    path = source.plain_file(name)
    if path is None:
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    kept: Any = None
    dropped: list[str] = []
    if path.name in VOCABULARY_FILES:
        read_json(path, largest=LARGEST_VOCABULARY)
    elif path.suffix == ".json":
        kept, dropped = read_without_code(path, kind)
    if dropped:
        target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        copied.notes.append(f"{name}: {', '.join(dropped)} left out, because foreign code is not copied")
    else:
        shutil.copyfile(path, target)
    copied.names.append(name)


def _name_tokenizer(source: Source, folder: Path, model_type: str) -> None:
    tokenizer = TOKENIZER_MAPPING_NAMES.get(model_type)
    path = folder / "tokenizer_config.json"
    if tokenizer and source.has_vocabulary():
        config = read_json(path) if path.exists() else {}
        if "tokenizer_class" not in config:
            path.write_text(json.dumps({**config, "tokenizer_class": tokenizer}, indent=2) + "\n", encoding="utf-8")


def _copy_sentence_encoder(source: Source, folder: Path, copied: Copied, allow_pickle: bool) -> None:
    """Copy the modules of sentence-transformers: pooling, normalization, length, prompts."""
    path = source.plain_file("modules.json")
    if path is None:
        return
    modules = read_json(path, list)
    for module in modules:
        if not (
            isinstance(module, dict) and isinstance(module.get("path"), str) and isinstance(module.get("type"), str)
        ):
            raise CheckpointError(f"{path} has a module without a path and a type: it is damaged.")
        if not module["type"].startswith("sentence_transformers."):
            copied.notes.append(
                f"modules.json and what it names left out: it takes {module['type']}, which is foreign code, so OUT is "
                "no sentence encoder"
            )
            return
    for name in SENTENCE_ENCODER:
        _copy(source, name, folder, copied, list if name == "modules.json" else dict)
    for module in modules:
        if Path(module["path"]).is_absolute() or ".." in Path(module["path"]).parts:
            raise CheckpointError(
                f"{path} has a module at {module['path']}, which leads out of the checkpoint: paths within it are expected."
            )
        place = source.folder / module["path"]
        if not Path(module["path"]).parts or not place.is_dir():  # the paths "" and "." mean the checkpoint itself
            continue
        for file in sorted(place.iterdir()):
            name = file.relative_to(source.folder).as_posix()
            if file.suffix in (".bin", ".pt", ".pkl") and not allow_pickle:
                raise CheckpointError(
                    f"{file} is a pickle, which can run code when it is read: save it as safetensors, or trust its author and "
                    "add --allow-pickle."
                )
            if file.suffix in (".json", ".safetensors", ".txt", ".bin"):
                _copy(source, name, folder, copied)


def _others(source: Source, copied: Iterable[str]) -> Iterable[str]:
    """The other files and directories of the source, except code that this package wrote."""
    known = {Path(name).parts[0] for name in copied}
    for path in source.folder.iterdir():
        own = path.suffix == ".py" and path.is_file() and is_marked(path.read_bytes())
        if path.name not in known and not own and not any(path.match(pattern) for pattern in EXPECTED):
            yield path.name + ("/" if path.is_dir() else "")
