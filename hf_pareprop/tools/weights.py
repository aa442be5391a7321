"""The weights of a checkpoint, tensor by tensor: where each one is, and written without ever holding more than one."""

import json
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .source import CheckpointError, Source, one_line, read_json

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""By their names in the format of safetensors (https://huggingface.co/docs/safetensors): those that a checkpoint can hold."""

BUFFERS = ("position_ids", "token_type_ids", "relative_position_index")
"""What old checkpoints hold beside weights, in whole numbers; transformers makes them itself."""


@dataclass
class Weights:
    """The tensors of a checkpoint, read one at a time.

    Attributes:
        shapes: by name, on the meta device, which has shapes and dtypes and no values.
        files: by name, the file of safetensors that a tensor is in.
        unpickled: by name, the tensors of pickled weights.
    """

    shapes: dict[str, Tensor]
    files: dict[str, Path] = field(default_factory=dict)
    unpickled: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """
        Raises:
            CheckpointError: its file is damaged.
        """
        found = self.unpickled[name] if name in self.unpickled else self._read(name)
        if not torch.isfinite(found).all():
            where = self.files.get(name, "the pickle file")
            raise CheckpointError(f"{where} has values that are not finite in {name}: it is damaged.")
        return found

    def _read(self, name: str) -> Tensor:
        # Opened anew for each, so that no page of the file that was read stays in memory.
        with _opened(self.files[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def dtype(self, config: Any) -> torch.dtype:
        """That a configuration names, or else that of the first tensor."""
        named = getattr(config, "dtype", None)
        named = getattr(torch, named, None) if isinstance(named, str) else named
        first = next((tensor.dtype for tensor in self.shapes.values() if tensor.is_floating_point()), torch.float32)
        return named if isinstance(named, torch.dtype) else first

    def all(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.shapes}

    def numbered(self, vocabulary: int | None = None) -> dict[str, Tensor]:
        """Every tensor as one number, its own, expanded to its shape: what a class does with it can be followed for free.

        Args:
            vocabulary: how many rows embeddings of tokens have. Tensors of so many rows that are equal get one number, because
                transformers ties what is equal.
        """
        numbers: dict[str, int] = {}
        tables: list[str] = []
        for i, (name, shape) in enumerate(self.shapes.items(), start=1):
            numbers[name] = i
            if shape.dim() and len(shape) == vocabulary:
                twin = next((n for n in tables if torch.equal(self.tensor(n), self.tensor(name))), None)
                numbers[name] = i if twin is None else numbers[twin]
                tables.append(name)
        return {name: torch.tensor(float(n)).expand(self.shapes[name].shape) for name, n in numbers.items()}

    def origins(self, model: PreTrainedModel) -> dict[str, str]:
        """By the names in ``model``, which was loaded from :meth:`numbered`: the tensors that its parameters came from.

        Raises:
            CheckpointError: it did more than to give tensors other names.
        """
        names, found = list(self.shapes), {}
        for name, tensor in model.state_dict().items():
            number = tensor[(0,) * tensor.dim()].item() if tensor.numel() else 0
            same = tensor.untyped_storage().nbytes() == tensor.element_size() or bool((tensor == number).all())
            if not same or not 1 <= number <= len(names):
                raise CheckpointError(f"{name} of {type(model).__name__} is not a tensor of the checkpoint as it is.")
            found[name] = names[int(number) - 1]
        return found


def open_weights(source: Source, allow_pickle: bool = False) -> Weights:
    """What ``source`` holds; only files in its own directory are read.

    Raises:
        CheckpointError: there are no weights, they are pickled and ``allow_pickle`` is not set, files are missing, damaged or
            elsewhere, or hold what is no weight of a model.
    """
    for whole, index in (SAFETENSORS, PICKLES):
        if files := _files(source, whole, index):
            break
    else:
        raise CheckpointError(f"{source.name} has no weights: none of {', '.join((*SAFETENSORS, *PICKLES))} is there.")
    if whole == PICKLES[0] or any(file.suffix != ".safetensors" for file in files):
        if not allow_pickle:
            raise CheckpointError(
                f"{source.name} has its weights in pickle files, which can run code when they are read: save them as "
                "safetensors, or trust their author and add --allow-pickle (tensors only are read, with weights_only=True)."
            )
        tensors = {name: tensor for file in files for name, tensor in _unpickled(file).items()}
        weights = Weights({name: tensor.to("meta") for name, tensor in tensors.items()}, unpickled=tensors)
    else:
        weights = Weights({})
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118, as it is no dictionary
                    found = file.get_slice(name)
                    dtype = DTYPES.get(found.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path} holds {name} as {found.get_dtype()}, which is no number that a model trains with: "
                            "save the weights as float32, bfloat16 or float16."
                        )
                    weights.shapes[name] = torch.empty(found.get_shape(), dtype=dtype, device="meta")
                    weights.files[name] = path
    odd = [n for n, t in weights.shapes.items() if not t.is_floating_point() and not n.endswith(BUFFERS)]
    if odd:
        kinds = ", ".join(sorted({str(weights.shapes[name].dtype).removeprefix("torch.") for name in odd}))
        raise CheckpointError(
            f"{source.name} holds {len(odd)} tensors of {kinds} ({', '.join(odd[:3])}), which cannot be trained: if it is quantized, "
            "save the model dequantized."
        )
    return weights


def _files(source: Source, whole: str, index: str) -> list[Path]:
    """The one file of weights, or those that an index names; none if there is neither."""
    if found := source.plain_file(whole):
        return [found]
    if not (path := source.plain_file(index)):
        return []
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(f"{path} is not an index of weights: it has no weight_map of names and files.")
    files = []
    for name in sorted(set(named.values())):
        found = source.plain_file(name)
        if found is None:
            raise CheckpointError(
                f"the weights of {source.name} cannot be read: {index} names {name}, which is missing."
            )
        files.append(found)
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"the weights in {path} are damaged: {error}. Download or save them again.") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of the format before PyTorch 1.6, which cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(
            f"{path} is not a dictionary of tensors: give what torch.save(model.state_dict()) wrote."
        )
    return found


def check_shard_size(size: str) -> None:
    """
    Raises:
        CheckpointError: it is none.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
        positive = not re.fullmatch(r"\s*(-.*|0+(\.0*)?\s*[A-Za-z]*)", size)
    except (ValueError, OverflowError):
        positive = False
    if not positive:
        raise CheckpointError(f"--max-shard-size {size}: not a size, such as 5GB or 200MB.")


def write_shards(
    folder: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor], max_shard_size: str
) -> Iterator[int]:
    """Write `model.safetensors`, or several files and their index, as `save_pretrained` does.

    Args:
        shapes: by name, on the meta device.
        read: gives the tensor of a name; each is dropped before the next is asked for.

    Yields:
        How many bytes were written, after each tensor.
    """
    split = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        yield from _write(folder / file, {name: shapes[name] for name in names}, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFETENSORS[1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Iterator[int]:
    """One file in the format of safetensors: the length of the header, the header, and the numbers.

    Not by `safetensors.torch.save_file`, which takes all tensors at once.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = dict(
        sorted(shapes.items(), key=lambda item: -item[1].element_size())
    )  # so that each begins at a multiple of that
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * shape.element_size()
        header[name] = {"dtype": names[shape.dtype], "shape": list(shape.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shape.shape, shape.dtype), name
            yield file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor
