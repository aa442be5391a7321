"""What travels with a model's weights: tokenizer, image processor, the modules of a sentence encoder; and what does not."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .source import SENTENCE_ENCODER, CheckpointError, Source, read_json, read_without_code

EXPECTED = ("config.json", "README.md", ".*", "*.safetensors", "*.safetensors.index.json", "pytorch_model*")
"""What nobody misses: it is read, or written anew."""


@dataclass
class Copied:
    """
    Attributes:
        names: of the files that were copied.
        left: files of the source that were not.
        notes: what else a user should know.
    """

    names: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def copy_companions(source: Source, folder: Path, model_type: str, allow_pickle: bool = False) -> Copied:
    """Copy the files beside the weights, without the code that they name.

    Args:
        model_type: of the stock model, which says the tokenizer's class where the files do not: the Auto classes could
            not find it by the model type of the copy.
        allow_pickle: whether pickled weights of a sentence encoder's modules are copied.

    Raises:
        CheckpointError: a file leads out of the checkpoint, is damaged, or a pickle.
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
    """One file; of JSON objects that people read, without the code that they name."""
    path = source.plain_file(name)
    if path is None:
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    kept: Any = None
    dropped: list[str] = []
    if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
        kept, dropped = read_without_code(path, kind)
    if dropped:
        target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        copied.notes.append(f"{name}: {', '.join(dropped)} left out, as foreign code is not carried along")
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
    """The modules of sentence-transformers: pooling, normalization, length, prompts."""
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
        if Path(module["path"]).is_absolute():
            raise CheckpointError(
                f"{path} has a module at {module['path']}: paths within the checkpoint are expected."
            )
        place = source.folder / module["path"]
        if not module["path"] or not place.is_dir():
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
    """What lies beside the copied files."""
    known = {Path(name).parts[0] for name in copied}
    for path in source.folder.iterdir():
        if path.name not in known and not any(path.match(pattern) for pattern in EXPECTED):
            yield path.name + ("/" if path.is_dir() else "")
