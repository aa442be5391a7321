"""Stock models to reversible ones and back, in memory. The weights stay what they are; only their use changes."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_reversible import ReversibleConfig
from ..modeling_reversible import ReversiblePreTrainedModel
from ..plan import CONVERTED_BETA
from .architectures import Architecture
from .families import ARCHITECTURES, architecture_of, library_class
from .wrapping import check_bare

Model = TypeVar("Model", bound=PreTrainedModel)


def to_reversible(
    model: PreTrainedModel | str | os.PathLike,
    *,
    beta: float | Sequence[float] = CONVERTED_BETA,
    **config_fields: Any,
) -> ReversiblePreTrainedModel:
    """A reversible model with the weights of a stock one, on the same device, in the same dtype and mode.

    Args:
        model: a stock model, which is left as it is, or a reversible one, whose coupling is to be another; or a directory or
            Hub id of a stock checkpoint of transformers or timm, loaded into the class that its configuration names.
        beta: the coupling, one number or one per layer: see :class:`ReversibleConfig`.
        config_fields: further fields of the configuration, such as ``backward_engine`` or ``memory_budget``.

    Raises:
        ValueError: the architecture has no reversible twin, or a field is out of range.
        TypeError: a field is unknown, or ``model`` is compiled, wrapped or has an adapter.
    """
    fields = {"beta": list(beta) if isinstance(beta, tuple) else beta, **config_fields}
    if isinstance(model, (str, os.PathLike)):
        if cls := library_class(PreTrainedConfig.get_config_dict(model)[0]):
            return cls.from_pretrained(model, **fields)
        config = transformers.AutoConfig.from_pretrained(model)
        name = (config.architectures or [""])[0]
        architecture, head = architecture_of(name)
        own: Any = architecture.heads[head]
        if config.model_type in own.config_class.stock_model_types:
            return own.from_pretrained(model, **fields)
        stock: PreTrainedModel = getattr(transformers, name).from_pretrained(model)
        return _reversible_twin(stock, fields)
    check_bare(model)
    return _reversible_twin(model, fields)


def _reversible_twin(model: PreTrainedModel, fields: dict[str, Any]) -> ReversiblePreTrainedModel:
    if isinstance(model, ReversiblePreTrainedModel):
        return _recoupled(model, fields)
    twin, architecture, sources = reversible_structure(model, fields)
    given = model.state_dict(keep_vars=True)
    values = {n: architecture.to_reversible_tensor(s, given[s].detach(), model.config) for n, s in sources.items()}
    return _filled(twin, model, values, sources)


def reversible_structure(
    model: PreTrainedModel, fields: dict[str, Any]
) -> tuple[ReversiblePreTrainedModel, Architecture, dict[str, str]]:
    """The reversible twin of a stock model, without values.

    Returns:
        The twin, with parameters on the meta device; the architecture of ``model``; and by the names of the twin's tensors those
        of ``model`` that they come from, by way of :meth:`Architecture.to_reversible_tensor`.

    Raises:
        ValueError: there is none.
        TypeError: a field is unknown.
    """
    architecture, head = architecture_of(type(model).__name__)
    if architecture.library and not architecture.library.head_of(model.config.to_dict()):
        raise ValueError(
            f"{type(model).__name__} holds {getattr(model.config, 'architecture', None)!r}, which has no reversible twin: of "
            f"{architecture.library.name}'s models {architecture.library.models} has one."
        )
    config = reversible_config(model.config, architecture, head, fields)
    twin, sources = _structure(
        model,
        architecture.heads[head],
        config,
        lambda wanted, given: {architecture.reversible_name(name, head, wanted): name for name in given},
    )
    return twin, architecture, sources


def _recoupled(model: ReversiblePreTrainedModel, fields: dict[str, Any]) -> ReversiblePreTrainedModel:
    _check_fields(type(model.config), fields)
    twin = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(twin.config, name, value)
    twin.config.check_reversible()
    base: Any = twin.base_model
    base.retention = None  # so that a new budget counts
    return twin


def to_stock(model: ReversiblePreTrainedModel) -> PreTrainedModel:
    """The stock model with the weights of a reversible one, on the same device, in the same dtype and mode.

    The result computes what ``model`` computes at ``beta=0``; at another beta the outputs differ.

    Raises:
        ValueError: ``model`` is not a reversible model of this package, or has no stock twin.
        TypeError: it is compiled, wrapped or has an adapter.
        ImportError: that is a model of a library that is not installed.
    """
    check_bare(model)
    architecture = architecture_behind(type(model), model.config)
    head = architecture.head_of(type(model))
    if architecture.library:
        cls: Any = getattr(transformers, architecture.library.wrapper + head)
        config = architecture.library.wrapper_config(model)
    else:
        _, cls, config = stock_twin(type(model), model.config)
    twin, sources = _structure(
        model,
        cls,
        config,
        lambda wanted, given: {name: architecture.reversible_name(name, head, given) for name in wanted},
    )
    given = model.state_dict(keep_vars=True)
    values = {name: architecture.to_stock_tensor(name, given[s].detach(), config) for name, s in sources.items()}
    return _filled(twin, model, values, sources)


def reversible_config(
    config: PreTrainedConfig, architecture: Architecture, head: str, fields: dict[str, Any]
) -> ReversibleConfig:
    """The configuration of the reversible twin of a stock model.

    Raises:
        TypeError: ``fields`` has one that the configuration does not know.
        ValueError: the stock model does what its twin cannot.
    """
    config_class: Any = architecture.heads[head].config_class
    _check_fields(config_class, fields)
    if architecture.model_type == "bert" and head == "ForMaskedLM" and config.hidden_act != "gelu":
        raise ValueError(
            f"hidden_act={config.hidden_act!r}: the masked-LM head of BERT uses it and that of RoBERTa 'gelu', so this "
            "model has no reversible twin. Its encoder has: convert BertModel."
        )
    stock = config.to_dict()
    if rows := architecture.reserved_rows(config):
        stock["max_position_embeddings"] += rows
    given = {**config_class.from_stock_dict(stock), **architecture.fields, "architectures": None, **fields}
    result = config_class(**given)
    if architecture.library is None:  # whose models choose an implementation themselves
        result._attn_implementation = config._attn_implementation
    return result


def _check_fields(config_class: Any, fields: dict[str, Any]) -> None:
    known = config_class().to_dict()
    for name in fields:
        if name not in known:
            raise TypeError(f"{config_class.__name__} has no field {name!r}.")


def architecture_behind(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Architecture:
    """The stock models that a reversible model belongs to.

    Raises:
        ValueError: ``model_class`` is not a reversible model of this package.
    """
    model_type = getattr(config, "stock_model_type", None) or config.model_type
    architecture = ARCHITECTURES.get(str(model_type).removeprefix("rev_"))
    if architecture is None or not hasattr(config, "beta"):
        raise ValueError(f"{model_class.__name__} is not a reversible model of this package.")
    return architecture


def stock_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[Architecture, type[PreTrainedModel], PreTrainedConfig]:
    """The architecture, the class and the configuration of the stock twin of a reversible model.

    Raises:
        ValueError: ``model_class`` is not a reversible model of this package, or transformers has no stock class for it.
    """
    architecture = architecture_behind(model_class, config)
    cls = architecture.stock_class(model_class)
    return architecture, cls, _stock_config(config, architecture, cls)


def _stock_config(
    config: PreTrainedConfig, architecture: Architecture, cls: type[PreTrainedModel]
) -> PreTrainedConfig:
    stock_class: Any = cls.config_class
    fields, own_class = config.to_dict(), type(config)
    own = own_class().to_dict().keys() - stock_class().to_dict().keys()
    for name in (*own, "auto_map", "architectures", "model_type"):
        fields.pop(name, None)
    if rows := architecture.reserved_rows(config):
        fields["max_position_embeddings"] -= rows
    result = stock_class(**fields)
    result._attn_implementation = config._attn_implementation
    return result


def _structure(
    source: PreTrainedModel,
    cls: type[Model],
    config: PreTrainedConfig,
    named: Callable[[dict[str, Any], dict[str, Any]], dict[str, str]],
) -> tuple[Model, dict[str, str]]:
    """A ``cls`` without values, and by the names of its tensors those of ``source`` that they come from.

    Args:
        named: gives the latter, from the tensors of both by their names.
    """
    twin, given = _empty(source, cls, config), source.state_dict(keep_vars=True)
    wanted = twin.state_dict()
    sources = named(wanted, given)
    _check_names(source, twin, sources, wanted, given)
    ties = getattr(twin, "all_tied_weights_keys", {})
    if any(given[sources[a]] is not given[sources[b]] for a, b in ties.items()):
        # The configuration says that they are tied, and the checkpoint had different ones: the twin keeps both.
        config.tie_word_embeddings = False
        twin = _empty(source, cls, config)
    return twin, sources


def _empty(source: PreTrainedModel, cls: type[Model], config: PreTrainedConfig) -> Model:
    """A ``cls`` whose parameters have no values, with a pooler if ``source`` has one."""
    options = {"add_pooling_layer": source.pooler is not None} if hasattr(source, "pooler") else {}
    if getattr(getattr(source, "embeddings", None), "mask_token", None) is not None:
        options["use_mask_token"] = True
    devices = [source.device.index] if source.device.type == "cuda" else []
    # Stock ViT draws numbers even so: leave no trace in the user's stream.
    with torch.random.fork_rng(devices), init_empty_weights(include_buffers=False):
        twin: Model = cls._from_config(config, **options)
    twin.tie_weights()
    return twin


def _filled(twin: Model, source: PreTrainedModel, values: Mapping[str, Tensor], sources: Mapping[str, str]) -> Model:
    """``twin`` with values, on the device, in the mode and as trainable as ``source``."""
    given = source.state_dict(keep_vars=True)
    for name, value in values.items():
        place, _, leaf = name.rpartition(".")
        module = twin.get_submodule(place)
        if isinstance(getattr(module, leaf), nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=given[sources[name]].requires_grad))
        else:
            setattr(module, leaf, value)
    twin.tie_weights()
    placed: Model = nn.Module.to(twin, source.device)
    return placed.train(source.training)


def _check_names(
    source: PreTrainedModel,
    target: PreTrainedModel,
    source_names: dict[str, str],
    wanted: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Whether every parameter of ``target`` comes from one of ``source``, and every one of ``source`` goes there."""
    odd = (source_names.keys() ^ wanted.keys()) | (set(source_names.values()) ^ given.keys())
    if odd:
        raise ValueError(
            f"the parameters of {type(source).__name__} are not those of {type(target).__name__}: "
            f"{', '.join(sorted(odd)[:6])}. Adapters have to be merged or removed first."
        )
