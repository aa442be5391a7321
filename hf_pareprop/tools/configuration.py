"""Check the configuration of a checkpoint before a model is made. An error names the field, its value and what to do."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import counts_from_padding
from .source import MADE_NO_SENSE, CheckpointError, Source, one_line, quoted

DEEPEST = 1000
"""The largest number of layers that is accepted."""

LARGEST_COUNT = 2**31
LARGEST_IMAGE = 2**14
"""The largest value that is accepted in fields that count something, and in `image_size`."""
MOST_LABELS = 10**7
"""The number of labels has to be below this: transformers makes a name for each label, which takes memory."""

TIMES_LARGER = 4
"""A configuration may describe a model with at most this many times the weights in its files, plus `SLACK`."""
SLACK = 10**7

PROBABILITIES = ("dropout_prob", "drop_path_rate", "_dropout")
"""Ends of the names of fields that hold a probability. `classifier_dropout` may be null as well."""

COUNTS = ("_size", "_dim", "_embeddings")
"""Ends of the names of fields that hold numbers above 0. Names that begin with `num_` are such fields as well."""

NOT_COUNTS = {"num_labels", "num_classes", "num_features"}
"""Fields that are named like counts, but may be 0."""

FLAGS = {"qkv_bias", "expand_attn", "tie_word_embeddings"}
"""Fields that are true or false. Fields whose names begin with `use_` or `is_` are so as well."""

OBJECTS = {"pretrained_cfg", "timm_pretrained_cfg", "model_args"}
"""Fields of timm's checkpoints that hold further fields."""

FAILURES = (*MADE_NO_SENSE, RuntimeError, StrictDataclassError)
"""The errors that transformers and PyTorch raise for a configuration that makes no sense."""


def config_of(source: Source, config_class: Any, own: Any = None, shapes: Mapping[str, Tensor] | None = None) -> Any:
    """The configuration in ``source``, checked.

    Args:
        source: the checkpoint.
        config_class: the class of the configuration.
        own: the configuration class of the reversible twin, if it is another class.
        shapes: the shapes of the weights by name, if they are known. A model has at most as many layers as tensors.
    """
    for name, value in source.config.items():
        if expected := _expected(name, value):
            raise _refusal(source, name, value, f"{expected} is expected")
    tensors = len(shapes) if shapes else DEEPEST
    for name in (own or config_class).depth_fields(1):
        depth, value = _sum(source.config.get(name)), source.config.get(name)
        if depth > min(tensors, DEEPEST):
            what = f"its weights are {tensors} tensors" if tensors < depth else "no model is so deep"
            raise _refusal(source, name, value, f"these are {depth} layers, but {what}")
    try:
        config = _made(source, config_class, source.config)
    except FAILURES as error:
        raise _unusable(source, "model", error, lambda fields: _made(source, config_class, fields)) from error
    _check_padding(source, config)
    _check_stages(source, config)
    return config


def check_buildable(
    source: Source,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    shapes: Mapping[str, Tensor] | None = None,
) -> None:
    """Check that a model can be made with this configuration, with about as many weights as the checkpoint has.

    No weights are allocated.

    Args:
        source: the checkpoint.
        cls: the class of the model.
        config: its configuration.
        shapes: the shapes of the weights by name, if they are known.
    """

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            return cls(copy.deepcopy(config))

    try:
        size = sum(parameter.numel() for parameter in build(config).parameters())
    except FAILURES as error:
        raise _unusable(
            source, cls.__name__, error, lambda fields: build(_made(source, type(config), fields))
        ) from error
    if shapes and size > TIMES_LARGER * sum(shape.numel() for shape in shapes.values()) + SLACK:
        sizes = {name: value for name, value in config.to_dict().items() if _is_count(name) and _is_number(value)}
        largest = max(sizes, key=lambda name: sizes[name])
        raise CheckpointError(
            f"config.json of {source.name} describes a {cls.__name__} of {size / 1e6:.0f} million weights, far more than its "
            f"files have: correct it. Its largest number is {largest}={sizes[largest]}."
        )


def _made(source: Source, config_class: Any, fields: dict[str, Any]) -> Any:
    if hasattr(config_class, "stock_dict") and source.model_type != config_class.model_type:
        fields = config_class.from_stock_dict(config_class.stock_dict(fields))
    return config_class.from_dict(fields)


def _unusable(
    source: Source, what: str, error: BaseException, make: Callable[[dict[str, Any]], Any]
) -> CheckpointError:
    """The error to raise. It names the field without which ``make`` does not fail, if there is one."""
    reason = f"{one_line(error).rstrip('.')}. Correct it there."
    for name, value in source.config.items():
        try:
            make({other: kept for other, kept in source.config.items() if other != name})
        except FAILURES:
            continue
        return CheckpointError(
            f"config.json of {source.name} says {name}={quoted(value)}, with which there is no {what}: {reason}"
        )
    return CheckpointError(f"config.json of {source.name} is not that of a {what}: {reason}")


def _refusal(source: Source, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"config.json of {source.name} says {name}={quoted(value)}: {why}. Correct it there.")


def _is_count(name: str) -> bool:
    if name in NOT_COUNTS or name.startswith(("tie_", "use_")):
        return False
    return name.startswith("num_") or name.endswith(COUNTS) or name in ("depths", "mlp_ratio")


def _expected(name: str, value: Any) -> str:
    """What the value of a field should be, in words; empty if the value may be right."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a value other than NaN and infinity"
    numbers = value if isinstance(value, list) else [value]
    if _is_count(name) and any(type(number) is bool or (_is_number(number) and number <= 0) for number in numbers):
        return "a number above 0"
    largest = LARGEST_IMAGE if name == "image_size" else LARGEST_COUNT
    if _is_count(name) and any(_is_number(number) and number > largest for number in numbers):
        return f"a number of at most {largest}"
    if name.endswith(PROBABILITIES) and not all(0 <= number <= 1 for number in numbers if _is_number(number)):
        return "a probability from 0 to 1"
    if value is None:
        return ""
    if name in ("num_labels", "num_classes") and _is_number(value) and value >= MOST_LABELS:
        return f"a whole number below {MOST_LABELS}"
    if name in NOT_COUNTS and (type(value) is not int or value < 0):
        return "a whole number"
    if name in ("image_size", "patch_size") and isinstance(value, list) and len(value) != 2:
        return "a number, or two for height and width,"
    if (name.startswith(("use_", "is_")) or name in FLAGS) and not isinstance(value, bool):
        return "true or false"
    if name in OBJECTS and not isinstance(value, dict):
        return "null or an object"
    if name in OBJECTS and not all(is_statistic(value.get(field)) for field in ("mean", "std")):
        return "an object with numbers for each channel as mean and std"
    if name in ("dtype", "torch_dtype") and not _is_dtype(value):
        return 'null or the name of a type of PyTorch such as "float32"'
    if name == "id2label" and not (isinstance(value, dict) and all(str(number).isdecimal() for number in value)):
        return 'null or an object such as {"0": "no", "1": "yes"}'
    if name == "label2id" and not (isinstance(value, dict) and all(type(number) is int for number in value.values())):
        return 'null or an object such as {"no": 0, "yes": 1}'
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_statistic(value: Any) -> bool:
    """Whether a value can be a statistic of channels, such as the mean in an image processor: finite numbers, or nothing."""
    if value is None:
        return True
    return isinstance(value, list) and bool(value) and all(_is_number(n) and math.isfinite(n) for n in value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _check_padding(source: Source, config: Any) -> None:
    """Check the padding token and the number of positions, in models that count positions from the padding token."""
    if not hasattr(config, "vocab_size") or not counts_from_padding(config):
        return
    padding, positions, why = config.pad_token_id, config.max_position_embeddings, ""
    if type(padding) is not int or not 0 <= padding < config.vocab_size:
        why = f"a token from 0 to {config.vocab_size - 1} is expected, as positions are counted from it"
    elif source.model_type != "bert" and padding + 1 >= positions:
        why = f"positions are counted from it, so that max_position_embeddings={positions} leaves no token a position"
    if why:
        raise _refusal(source, "pad_token_id", padding, why)


def _check_stages(source: Source, config: Any) -> None:
    """Check the fields with one entry for each stage, and the width that follows from them, in models with stages."""
    depths, heads, given = (source.config.get(name) for name in ("depths", "num_heads", "hidden_size"))
    if not isinstance(depths, list):
        return
    if isinstance(heads, list) and len(depths) != len(heads):
        raise _refusal(source, "depths", depths, f"as many numbers are expected as num_heads={quoted(heads)} has")
    if "hidden_size" in source.config and type(config.embed_dim) is int:
        width = config.embed_dim << len(depths) - 1
        if given != width:
            why = f"{width} is expected, which follows from embed_dim and depths"
            raise _refusal(source, "hidden_size", given, why)


def _sum(value: Any) -> float:
    """The number of layers that a field gives."""
    return sum(number for number in (value if isinstance(value, list) else [value]) if _is_number(number))
