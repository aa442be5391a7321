"""Read and write the weights of a checkpoint tensor by tensor, without holding more than one in memory."""

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

from .source import MADE_NO_SENSE, CheckpointError, Source, one_line, read_json

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
"""The dtypes of tensors in a checkpoint, by their names in safetensors (https://huggingface.co/docs/safetensors)."""

BUFFERS = ("position_ids", "token_type_ids", "relative_position_index")
"""Integer tensors that old checkpoints hold beside their weights. Transformers makes them itself."""


@dataclass
class Weights:
    """The tensors of a checkpoint, read one at a time.

    Attributes:
        shapes: tensors by name on the meta device, with shapes and dtypes but no values.
        files: the safetensors file of each tensor, by name.
        unpickled: the tensors of pickled weights, by name.
    """

    shapes: dict[str, Tensor]
    files: dict[str, Path] = field(default_factory=dict)
    unpickled: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Read the tensor ``name``. Raises CheckpointError if it is damaged or has values that are not finite."""
        if name in self.unpickled:
            return self._checked(name, self.unpickled[name])
        with _opened(self.files[name]) as file:  # opened for each tensor, so that no page of the file stays in memory
            return self._checked(name, file.get_tensor(name))

    def all(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return {name: self.tensor(name) for name in self.shapes}

    def _checked(self, name: str, found: Tensor) -> Tensor:
        if not torch.isfinite(found).all():
            where = self.files.get(name, "the pickle file")
            raise CheckpointError(f"{where} has values that are not finite in {name}: it is damaged.")
        return found

    def dtype(self, config: Any) -> torch.dtype:
        """The dtype that a configuration names, or else that of the first floating-point tensor."""
        named = getattr(config, "dtype", None)
        named = getattr(torch, named, None) if isinstance(named, str) else named
        first = next((tensor.dtype for tensor in self.shapes.values() if tensor.is_floating_point()), torch.float32)
        return named if isinstance(named, torch.dtype) else first

    def numbered(self, vocabulary: int | None = None) -> dict[str, Tensor]:
        """Replace every tensor by a number of its own, expanded to the tensor's shape.

        This takes no memory, and shows where transformers puts each tensor when it loads them.

        Args:
            vocabulary: the number of rows of token embeddings. Equal tensors with this many rows get the same number, because
                transformers ties tensors that are equal.
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
        """Map the parameter names of ``model``, loaded from :meth:`numbered`, to the tensors that they came from."""
        names, found = list(self.shapes), {}
        for name, tensor in model.state_dict().items():
            number = tensor[(0,) * tensor.dim()].item() if tensor.numel() else 0
            same = tensor.untyped_storage().nbytes() == tensor.element_size() or bool((tensor == number).all())
            if not same or not 1 <= number <= len(names):
                raise CheckpointError(f"{name} of {type(model).__name__} is not a tensor of the checkpoint as it is.")
            found[name] = names[int(number) - 1]
        return found


def open_weights(source: Source, allow_pickle: bool = False) -> Weights:
    """Open the weights of ``source``. Only files in its own directory are read."""
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
                for name in file.keys():  # noqa: SIM118, because it is not a dictionary
                    found = file.get_slice(name)
                    dtype = DTYPES.get(found.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path} holds {name} as {found.get_dtype()}, which is not a type that a model is trained in: "
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
    """The single file of weights, or the files that an index names; empty if there is neither."""
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
        except RuntimeError:  # files in the format before PyTorch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights in {path} cannot be read: {one_line(error).rstrip('.')}. Download or save them again."
        ) from error
    except (pickle.UnpicklingError, EOFError, *MADE_NO_SENSE) as error:
        # The messages of these errors are about parts of a pickle, or advise to run the code in it.
        raise CheckpointError(
            f"the weights in {path} cannot be read: the pickle is damaged, or holds objects other than tensors, which are not read. "
            "Load it where you trust it, and save the model as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(
            f"{path} is not a dictionary of tensors by name: give what torch.save(model.state_dict()) wrote."
        )
    for name, tensor in found.items():
        odd = {"sparse": tensor.layout != torch.strided and not tensor.is_nested, "quantized": tensor.is_quantized}
        odd |= {"without values": tensor.is_meta, "nested": tensor.is_nested}
        if what := next((kind for kind, holds in odd.items() if holds), None):
            raise CheckpointError(
                f"{path} holds {name}, which is {what}: save the model with dense tensors, float32, bfloat16 or float16."
            )
    return found


def check_shard_size(size: str) -> None:
    """Raise CheckpointError if ``size`` is not a size such as 5GB."""
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
        folder: the directory to write into.
        shapes: tensors by name on the meta device.
        read: a function that returns the tensor of a name. Each tensor is dropped before the next is read.
        max_shard_size: the largest size of a file, such as `"5GB"`.

    Yields:
        The number of bytes written, after each tensor.
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
    """Write one file in the format of safetensors: the length of the header, the header, and the values.

    `safetensors.torch.save_file` is not used, because it takes all tensors at once.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Sorted, so that each tensor begins at a multiple of the size of its elements.
    shapes = dict(sorted(shapes.items(), key=lambda item: -item[1].element_size()))
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * shape.element_size()
        header[name] = {"dtype": names[shape.dtype], "shape": list(shape.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shape.shape, shape.dtype), name
            yield file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor
