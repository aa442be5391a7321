"""Stock models to reversible ones and back, in memory. The weights stay what they are; only their use changes."""

import os
import re
from collections.abc import Container, Sequence
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_reversible import ReversibleConfig
from ..hub import ReversiblePreTrainedModel
from ..modeling_rev_roberta import (
    RevRobertaForMaskedLM,
    RevRobertaForMultipleChoice,
    RevRobertaForQuestionAnswering,
    RevRobertaForSequenceClassification,
    RevRobertaForTokenClassification,
    RevRobertaModel,
)
from ..modeling_rev_vit import RevViTForImageClassification, RevViTForMaskedImageModeling, RevViTModel

Model = TypeVar("Model", bound=PreTrainedModel)

REVERSIBLE: dict[str, type[ReversiblePreTrainedModel]] = {
    cls.__name__.removeprefix("Rev"): cls
    for cls in (
        RevRobertaModel,
        RevRobertaForMaskedLM,
        RevRobertaForSequenceClassification,
        RevRobertaForTokenClassification,
        RevRobertaForQuestionAnswering,
        RevRobertaForMultipleChoice,
        RevViTModel,
        RevViTForImageClassification,
        RevViTForMaskedImageModeling,
    )
}
"""From the name of a stock class to its reversible twin."""

# Stock ViT, in memory, has other names than its checkpoints, whose names the reversible model keeps.
_RENAMED_IN_STOCK = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"(layers\.\d+)\.intermediate\.dense", r"\1.mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)


def to_reversible(
    model: PreTrainedModel | str | os.PathLike,
    *,
    beta: float | Sequence[float] = 0.5,
    **config_fields: Any,
) -> ReversiblePreTrainedModel:
    """A reversible model with the weights of a stock one, on the same device, in the same dtype and mode.

    Args:
        model: a stock model, which is left as it is; or a directory or Hub id of a stock checkpoint, loaded into the
            class that its configuration names.
        beta: the coupling, one number or one per layer: see :class:`ReversibleConfig`.
        config_fields: further fields of the configuration, such as ``backward_engine`` or ``anchor_every``.

    Raises:
        ValueError: the architecture has no reversible twin, or a field is out of range.
        TypeError: a field is unknown.
    """
    fields = {"beta": list(beta) if isinstance(beta, tuple) else beta, **config_fields}
    if not isinstance(model, PreTrainedModel):
        config = transformers.AutoConfig.from_pretrained(model)
        name = (config.architectures or [""])[0]
        return _twin_of(name).from_pretrained(model, **fields)
    cls = _twin_of(type(model).__name__)
    config = reversible_config(model.config, cls, fields)
    return _with_weights_of(model, cls, config)


def to_stock(model: ReversiblePreTrainedModel) -> PreTrainedModel:
    """The stock model with the weights of a reversible one, on the same device, in the same dtype and mode.

    The result computes what ``model`` computes at ``beta=0``; at another beta the outputs differ.

    Raises:
        ValueError: ``model`` is not a reversible model of this package.
    """
    name = type(model).__name__.removeprefix("Rev")
    if not isinstance(model.config, PreTrainedConfig) or name not in REVERSIBLE or not hasattr(model.config, "beta"):
        raise ValueError(f"{type(model).__name__} is not a reversible model of this package.")
    cls = getattr(transformers, name)
    fields = model.config.to_dict()
    for unwanted in (*ReversibleConfig.__annotations__, "auto_map", "architectures", "model_type"):
        fields.pop(unwanted, None)
    config = cls.config_class(**fields)
    config._attn_implementation = model.config._attn_implementation
    return _with_weights_of(model, cls, config)


def reversible_config(
    config: PreTrainedConfig, cls: type[ReversiblePreTrainedModel], fields: dict[str, Any]
) -> ReversibleConfig:
    """The configuration of the reversible twin ``cls`` of a stock model.

    Raises:
        TypeError: ``fields`` has one that the configuration does not know.
    """
    config_class: Any = cls.config_class
    known = config_class().to_dict()
    for name in fields:
        if name not in known:
            raise TypeError(f"{config_class.__name__} has no field {name!r}.")
    result = config_class(**{**config_class.from_stock_dict(config.to_dict()), "architectures": None, **fields})
    result._attn_implementation = config._attn_implementation
    return result


def _twin_of(name: str) -> type[ReversiblePreTrainedModel]:
    if name not in REVERSIBLE:
        raise ValueError(f"{name or 'this checkpoint'} has no reversible twin: these have: {', '.join(REVERSIBLE)}.")
    return REVERSIBLE[name]


def _with_weights_of(source: PreTrainedModel, cls: type[Model], config: PreTrainedConfig) -> Model:
    """A ``cls`` with copies of the tensors of ``source``, one of the two being stock and the other reversible."""
    devices = [source.device.index] if source.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the weights drawn here are overwritten: leave no trace in the user's stream
        target = cls._from_config(config)
    given, wanted = source.state_dict(keep_vars=True), target.state_dict(keep_vars=True)
    if cls.__name__ in REVERSIBLE:
        names = {_stock_name(name, wanted): name for name in given}
    else:
        names = {name: _stock_name(name, given) for name in wanted}
    if names.keys() != wanted.keys() or set(names.values()) != given.keys():
        odd = sorted((names.keys() ^ wanted.keys()) | (set(names.values()) ^ given.keys()))
        raise ValueError(
            f"the parameters of {type(source).__name__} are not those of {cls.__name__}: {', '.join(odd[:6])}. Adapters "
            "have to be merged or removed first."
        )
    for name, tensor in wanted.items():
        tensor.data = given[names[name]].detach().clone()
        tensor.requires_grad_(given[names[name]].requires_grad)
    return target.to(source.device).train(source.training)


def _stock_name(name: str, stock_names: Container[str]) -> str:
    """What the stock model calls the parameter that checkpoints and the reversible model call ``name``."""
    if name not in stock_names:
        for pattern, replacement in _RENAMED_IN_STOCK:
            name = re.sub(pattern, replacement, name)
    return name
