"""Load checkpoints, with their weights or as a plan. A plan says which tensor of the checkpoint goes where in the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel
from .configuration import check_buildable, config_of
from .families import ARCHITECTURES, MODEL_CLASSES, architecture_of, library_class
from .source import MADE_NO_SENSE, CheckpointError, Source, one_line, quoted
from .weights import Weights, open_weights


@dataclass
class Loaded:
    """A model, and the differences between its checkpoint and its class.

    Attributes:
        model: the model with its weights; in a plan, every tensor holds one number (:meth:`Weights.numbered`).
        weights: the weights of the checkpoint.
        left_out: tensors that the class has no place for. Transformers leaves them out as well.
        notes: other facts that a user should know.
    """

    model: PreTrainedModel
    weights: Weights
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_stock(source: Source, *, allow_pickle: bool = False) -> Loaded:
    """Load the stock model in ``source`` as a plan, in the class that its configuration names.

    If transformers has no such class, as for models of timm, the reversible class at ``beta=0`` is used.

    Raises:
        CheckpointError: the weights are missing, damaged, pickled without ``allow_pickle``, or not those of the class.
        ValueError: the architecture has no reversible twin.
    """
    weights = open_weights(source, allow_pickle)
    cls, config = stock_class(source, weights.shapes)
    return _load(source, cls, config, weights, weights.numbered(getattr(config, "vocab_size", None)), None)


def load_stock(source: Source, *, dtype: str = "auto", allow_pickle: bool = False) -> Loaded:
    """Load the stock model in ``source`` with its weights. Raises the same errors as :func:`plan_stock`."""
    weights = open_weights(source, allow_pickle)
    cls, config = stock_class(source, weights.shapes)
    return _load(source, cls, config, weights, weights.all(), dtype)


def load_reversible(source: Source, *, dtype: str = "auto") -> Loaded:
    """Load the reversible model in ``source``. The code in the checkpoint is not run; that of this package is used."""
    cls, weights = reversible_class(source), open_weights(source)
    config = config_of(source, cls.config_class, shapes=weights.shapes)
    return _load(source, cls, config, weights, weights.all(), dtype)


def reversible_class(source: Source) -> type[ReversiblePreTrainedModel]:
    """The class of this package that the configuration of ``source`` names."""
    check_names_a_class(source)
    if source.class_name not in MODEL_CLASSES:
        raise CheckpointError(
            f"{source.name} holds a {source.class_name}, which is not a reversible model of this package: convert it first with hf-pareprop convert."
        )
    found: Any = MODEL_CLASSES[source.class_name]
    if source.model_type != (expected := found.config_class.model_type):
        raise CheckpointError(
            f"config.json of {source.name} says model_type={quoted(source.config.get('model_type'))}, and a {found.__name__} has "
            f'"{expected}". Correct it there.'
        )
    return found


def check_names_a_class(source: Source) -> None:
    """Raise CheckpointError if the configuration of ``source`` does not name the class of the model."""
    if not source.class_name:
        given = quoted(source.config.get("architectures"))
        raise CheckpointError(
            f"config.json of {source.name} says architectures={given}, which names no class: write the model's class there, such as "
            '["RobertaForMaskedLM"].'
        )


def stock_class(
    source: Source, shapes: Mapping[str, Tensor] | None = None
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of the stock model in ``source``. If transformers has no class, the reversible one.

    Args:
        source: the checkpoint.
        shapes: the shapes of the weights by name, if they are known.

    Raises:
        CheckpointError: the configuration is not usable.
        ValueError: the architecture has no reversible twin.
    """
    if source.model_type.startswith("rev_"):
        raise CheckpointError(
            f"{source.name} is reversible already: change its beta with from_pretrained(..., beta=…)."
        )
    if own := library_class(source.config):
        config = config_of(source, own.config_class, shapes=shapes)
        config.beta = 0.0
        return own, config
    if source.model_type not in CONFIG_MAPPING:
        field = "architecture" if "architecture" in source.config else "model_type"  # timm's field is architecture
        raise ValueError(
            f"config.json of {source.name} says {field}={quoted(source.config.get(field))}, which transformers "
            f"{transformers.__version__} does not know and which has no reversible twin: those with one are "
            f"{', '.join(a.model_type if a.library is None else f'{a.library.models} of {a.library.name}' for a in ARCHITECTURES.values())}."
        )
    check_names_a_class(source)
    architecture, head = architecture_of(source.class_name)
    cls = getattr(transformers, source.class_name)
    return cls, config_of(source, cls.config_class, architecture.heads[head].config_class, shapes)


def _load(
    source: Source,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Weights,
    tensors: dict[str, Tensor],
    dtype: str | None,
    **options: Any,
) -> Loaded:
    """Let transformers make a model from tensors with the names of a checkpoint.

    Args:
        dtype: the dtype of the model; `auto` takes that of the checkpoint.
    """
    check_buildable(source, cls, config, weights.shapes)
    loads: Any = cls.from_pretrained
    options_and_dtype = {**options, "dtype": weights.dtype(config) if dtype == "auto" else dtype or torch.float32}
    # Transformers names tensors of the wrong shape only if it is allowed to leave them out.
    options_and_dtype["ignore_mismatched_sizes"] = True
    try:
        model, info = loads(None, config=config, state_dict=tensors, output_loading_info=True, **options_and_dtype)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {source.name} are not those of its configuration: {one_line(error)}"
        ) from error
    except MADE_NO_SENSE as error:
        raise CheckpointError(
            f"config.json of {source.name} is not that of a {cls.__name__}: {one_line(error)} Correct it there."
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
