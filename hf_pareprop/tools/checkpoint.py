"""Checkpoints loaded: whole, or as a plan of which tensor goes where."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel
from .families import MODEL_CLASSES, architecture_of, library_class
from .source import CheckpointError, Source, one_line
from .weights import Weights, open_weights

DEEPEST = 1000
"""Layers; more are a mistake."""

PROBABILITIES = ("dropout_prob", "drop_path_rate", "_dropout")
"""What the names of fields end with that are probabilities; `classifier_dropout` may be null as well."""

NOT_COUNTS = {"num_labels", "num_classes", "num_features"}
"""Fields that begin like numbers of layers or heads and may be 0."""


@dataclass
class Loaded:
    """A model and what its checkpoint and its class did not agree on.

    Attributes:
        model: with the weights; or, as a plan, with one number for each tensor (:meth:`Weights.numbered`).
        weights: of the checkpoint.
        left_out: tensors that the class has no place for, and that transformers leaves out, too.
        notes: what else a user should know.
    """

    model: PreTrainedModel
    weights: Weights
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_stock(source: Source, *, allow_pickle: bool = False) -> Loaded:
    """The stock model in ``source``, in the class that its configuration names, as a plan without values.

    Where transformers has no such class, as of models of timm, it is the reversible class at ``beta=0``.

    Raises:
        CheckpointError: the weights are missing, damaged, pickled without ``allow_pickle``, or not those of the class.
        ValueError: the architecture has no reversible twin.
    """
    weights = open_weights(source, allow_pickle)
    cls, config = stock_class(source, len(weights.shapes))
    return _load(source, cls, config, weights, weights.numbered(getattr(config, "vocab_size", None)), None)


def load_stock(source: Source, *, dtype: str = "auto", allow_pickle: bool = False) -> Loaded:
    """The same with its weights."""
    weights = open_weights(source, allow_pickle)
    cls, config = stock_class(source, len(weights.shapes))
    return _load(source, cls, config, weights, weights.all(), dtype)


def load_reversible(source: Source, *, dtype: str = "auto") -> Loaded:
    """The reversible model in ``source``; its own code is not run, that of this package is.

    Raises:
        CheckpointError: it is not a reversible checkpoint of this package, or damaged.
    """
    cls, weights = reversible_class(source), open_weights(source)
    config = config_of(source, cls.config_class, tensors=len(weights.shapes))
    return _load(source, cls, config, weights, weights.all(), dtype)


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


def stock_class(source: Source, tensors: int = DEEPEST) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of the stock model in ``source``, or the reversible one where transformers has none, and its configuration.

    Args:
        tensors: of how many the weights are.

    Raises:
        CheckpointError: the configuration is not one.
        ValueError: the architecture has no reversible twin.
    """
    if source.model_type.startswith("rev_"):
        raise CheckpointError(
            f"{source.name} is reversible already: change its beta with from_pretrained(..., beta=…)."
        )
    if own := library_class(source.config):
        config = config_of(source, own.config_class, tensors=tensors)
        config.beta = 0.0
        return own, config
    if source.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{source.name} has model type {source.model_type!r}, which transformers {transformers.__version__} does not "
            "know and which has no reversible twin."
        )
    architecture, head = architecture_of(source.class_name)
    cls = getattr(transformers, source.class_name)
    return cls, config_of(source, cls.config_class, architecture.heads[head].config_class, tensors)


def config_of(source: Source, config_class: Any, own: Any = None, tensors: int = DEEPEST) -> Any:
    """The configuration in ``source``.

    Args:
        own: the configuration class of the reversible twin, if that is another one.
        tensors: of how many the weights are; there are not more layers.

    Raises:
        CheckpointError: a field is not what it should be.
    """
    fields = dict(source.config)
    if (depth := _depth(source, own or config_class)) > min(tensors, DEEPEST):
        what = f"its weights are {tensors} tensors" if tensors < depth else "no model is so deep"
        raise CheckpointError(
            f"config.json of {source.name} says that the model has {depth} layers, but {what}: correct it."
        )
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"config.json of {source.name} says {name}={value}, which is not a number.")
        if name.endswith(PROBABILITIES) and type(value) in (int, float) and not 0 <= value <= 1:
            raise CheckpointError(
                f"config.json of {source.name} says {name}={value}: a probability, 0 to 1, is expected."
            )
        counts = name.startswith("num_") or name.endswith(("_size", "_dim", "_embeddings")) or name == "depths"
        if not counts or name in NOT_COUNTS:
            continue
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not number > 0:
                raise CheckpointError(f"config.json of {source.name} says {name}={value}, which has to be above 0.")
    try:
        if hasattr(config_class, "stock_dict") and source.model_type != config_class.model_type:
            fields = config_class.from_stock_dict(config_class.stock_dict(fields))
        return config_class.from_dict(fields)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        StrictDataclassError,
    ) as error:
        raise CheckpointError(f"config.json of {source.name} is not that of a model: {one_line(error)}") from error


def _depth(source: Source, own: Any) -> int:
    """How many layers a configuration says that there are, before anything is made of so many.

    Args:
        own: the configuration class of the reversible twin, which knows the fields that say it.
    """
    given: list[Any] = [source.config.get(name) for name in own.depth_fields(1)]
    lists = [value if isinstance(value, list) else [value] for value in given]
    return int(max(sum(number for number in numbers if type(number) in (int, float)) for numbers in lists))


def _load(
    source: Source,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Weights,
    tensors: dict[str, Tensor],
    dtype: str | None,
    **options: Any,
) -> Loaded:
    """A model from tensors by the names in its checkpoint, made by transformers.

    Args:
        dtype: of the model; `auto` for that of the checkpoint.
    """
    loads: Any = cls.from_pretrained
    options_and_dtype = {**options, "dtype": weights.dtype(config) if dtype == "auto" else dtype or torch.float32}
    # Of tensors of another shape transformers says which they are only where it may leave them out.
    options_and_dtype["ignore_mismatched_sizes"] = True
    try:
        model, info = loads(None, config=config, state_dict=tensors, output_loading_info=True, **options_and_dtype)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {source.name} are not those of its configuration: {one_line(error)}"
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {source.name} is not that of a {cls.__name__}: {one_line(error)}"
        ) from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} weights of {source.name} are not those of its configuration: {name} has the shape {tuple(found)}, and a "
            f"{cls.__name__} of config.json has {tuple(expected)}. Correct config.json."
        )
    missing = sorted(info["missing_keys"])
    if missing and not options and all(key.startswith("pooler.") for key in missing):
        loaded = _load(source, cls, config, weights, tensors, dtype, add_pooling_layer=False)
        loaded.notes.append("it has no pooler, so the result has none")
        return loaded
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} tensors of {cls.__name__}: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}. Is 'architectures' in its config.json right?"
        )
    return Loaded(model, weights, left_out=sorted(info["unexpected_keys"]))
