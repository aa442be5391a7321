"""Checkpoints on disk or on the Hub: found, read without surprises, and written whole or not at all."""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..modeling_reversible import ReversiblePreTrainedModel
from .families import MODEL_CLASSES, architecture_of, library_class

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
"""Files of tokenizers and image processors, which a conversion copies as they are."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a place that cannot be written; the message says what to do."""


@dataclass
class Source:
    """A checkpoint in a local directory.

    Attributes:
        name: directory or Hub id, as it was given.
        folder: where its files are.
        config: the contents of its config.json.
    """

    name: str
    folder: Path
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        return self.config.get("model_type", "")

    @property
    def class_name(self) -> str:
        return (self.config.get("architectures") or [""])[0]

    def has_vocabulary(self) -> bool:
        """Whether a tokenizer is there; without one, transformers would make one that knows no words."""
        return any(True for pattern in VOCABULARIES for _ in self.folder.glob(pattern))


@dataclass
class Loaded:
    """A model and what its checkpoint and its class did not agree on.

    Attributes:
        left_out: tensors that the class has no place for, and that transformers leaves out, too.
        notes: what else a user should know.
    """

    model: PreTrainedModel
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_source(name: str, *, weights: bool = True) -> Source:
    """The checkpoint called ``name``: a directory, or else an id on the Hub, whose files are downloaded.

    Args:
        weights: whether they are wanted, too.

    Raises:
        CheckpointError: there is none, or it has no readable configuration.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{name} is a file: give the directory that it is in.")
        files = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*"] if weights else []
        patterns = ["config.json", *files, *COMPANIONS]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{name} is neither a directory nor a model that the Hub gives: {reason}") from error
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{name} has no config.json: give the directory of a checkpoint of transformers.")
    return Source(name, folder, _read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object but a {type(found).__name__}.")
    return found


def load_stock(source: Source, *, dtype: str = "auto", allow_pickle: bool = False) -> Loaded:
    """The stock model in ``source``, in the class that its configuration names, loaded by transformers.

    Where transformers has no such class, as of models of timm, it is the reversible class at ``beta=0``.

    Raises:
        CheckpointError: the weights are missing, damaged, pickled without ``allow_pickle``, or not those of the class.
        ValueError: the architecture has no reversible twin.
    """
    if source.model_type.startswith("rev_"):
        raise CheckpointError(
            f"{source.name} is reversible already: change its beta with from_pretrained(..., beta=…)."
        )
    if cls := library_class(source.config):
        return _load(source, cls, dtype, _is_pickled(source, allow_pickle), beta=0.0)
    if source.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{source.name} has model type {source.model_type!r}, which transformers {transformers.__version__} does not "
            "know and which has no reversible twin."
        )
    architecture_of(source.class_name)
    return _load(source, getattr(transformers, source.class_name), dtype, _is_pickled(source, allow_pickle))


def load_reversible(source: Source, *, dtype: str = "auto") -> Loaded:
    """The reversible model in ``source``; its own code is not run, that of this package is.

    Raises:
        CheckpointError: it is not a reversible checkpoint of this package, or damaged.
    """
    return _load(source, reversible_class(source), dtype, _is_pickled(source, allow_pickle=False))


def reversible_class(source: Source) -> type[ReversiblePreTrainedModel]:
    """The class of this package that the configuration of ``source`` names.

    Raises:
        CheckpointError: it names none.
    """
    if source.class_name not in MODEL_CLASSES:
        raise CheckpointError(
            f"{source.name} holds a {source.class_name or source.model_type or 'model of no named class'}, which is not a "
            "reversible model of this package: convert it first with hf-pareprop convert."
        )
    return MODEL_CLASSES[source.class_name]


def _is_pickled(source: Source, allow_pickle: bool) -> bool:
    """Whether the weights have to be unpickled.

    Raises:
        CheckpointError: there are no weights, or they are pickled and ``allow_pickle`` is not set.
    """
    if any((source.folder / file).is_file() for file in SAFETENSORS):
        return False
    if not any((source.folder / file).is_file() for file in PICKLES):
        raise CheckpointError(f"{source.name} has no weights: none of {', '.join((*SAFETENSORS, *PICKLES))} is there.")
    if not allow_pickle:
        raise CheckpointError(
            f"{source.name} has its weights in pickle files, which can run code when they are read: save them as "
            "safetensors, or trust their author and add --allow-pickle (tensors only are read, with weights_only=True)."
        )
    return True


def _load(source: Source, cls: type[PreTrainedModel], dtype: str, pickled: bool, **options: Any) -> Loaded:
    loads: Any = cls.from_pretrained
    try:
        model, info = loads(
            source.folder,
            dtype=dtype,
            use_safetensors=not pickled,
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of {source.name} are damaged: {error}. Download or save them again."
        ) from error
    except (OSError, EOFError, KeyError, json.JSONDecodeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the weights of {source.name} cannot be read: {' '.join(str(error).split())}"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights of {source.name} are not those of its configuration: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing and not options and all(key.startswith("pooler.") for key in missing):
        loaded = _load(source, cls, dtype, pickled, add_pooling_layer=False)
        loaded.notes.append("it has no pooler, so the result has none")
        return loaded
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} tensors of {cls.__name__}: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}. Is 'architectures' in its config.json right?"
        )
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{source.name} has values that are not finite in {', '.join(broken[:5])}: it is damaged."
        )
    return Loaded(model, left_out=sorted(info["unexpected_keys"]))


def copy_companions(source: Source, folder: Path, model_type: str) -> list[str]:
    """Copy the files of tokenizer and image processor; returns their names.

    Args:
        model_type: of the stock model, which says the tokenizer's class where the files do not: the Auto classes could
            not find it by the model type of the copy.
    """
    files = sorted({file for pattern in COMPANIONS for file in source.folder.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, folder / file.name)
    names = [file.name for file in files]
    tokenizer = TOKENIZER_MAPPING_NAMES.get(model_type)
    path = folder / "tokenizer_config.json"
    if tokenizer and source.has_vocabulary():
        config = _read_json(path) if path.exists() else {}
        if "tokenizer_class" not in config:
            path.write_text(json.dumps({**config, "tokenizer_class": tokenizer}, indent=2) + "\n", encoding="utf-8")
    return names


@contextmanager
def whole_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    Raises:
        CheckpointError: ``target`` exists and ``overwrite`` is not set, or it cannot be written.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists: name another directory, or add --overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, which is not replaced by a directory: name another.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error.strerror or error}.") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, target: Path) -> None:
    """Put ``folder`` in the place of ``target``, which comes back if that fails."""
    if not target.exists():
        folder.rename(target)
        return
    old = target.with_name(f"{folder.name}-old")
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
