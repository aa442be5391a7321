"""Convert stock models to reversible ones and back, in memory. The weights stay the same; only their use changes."""

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
from ..plan import converted_beta
from ..stock_layers import StockLayersModel, uncouple
from .any_model import check_fields, coupled_copy, made_reversible
from .architectures import Architecture
from .families import ARCHITECTURES, STOCK_LAYERS, TWINS, architecture_of, library_class
from .wrapping import check_bare

Model = TypeVar("Model", bound=PreTrainedModel)


def to_reversible(
    model: PreTrainedModel | str | os.PathLike,
    *,
    beta: float | Sequence[float] | None = None,
    steps: str | None = None,
    **config_fields: Any,
) -> ReversiblePreTrainedModel:
    """Make a reversible model with the weights of a stock one, on the same device, in the same dtype and mode.

    Args:
        model: a stock model, which is not changed; or a reversible model, to give it another coupling; or a directory or
            Hub id of a stock checkpoint of transformers or timm, which is loaded into the class that its configuration names.
        beta: the coupling, one number or one per layer: see :class:`ReversibleConfig`. The default is 1/32, or 1/128 if whole
            layers are coupled.
        steps: what is coupled, `"sublayer"` or `"layer"`. The default is that of ``model`` if it is reversible, otherwise that
            of the family.
        config_fields: further fields of the configuration, such as ``backward_engine`` or ``memory_budget``.

    Raises:
        ValueError: the architecture has no reversible twin, or a field is out of range. With `steps="layer"` a model of an
            architecture without a twin is tried with its own layers on two random batches. It is refused, with the reason, if
            its gradients or outputs are wrong.
        TypeError: a field is unknown, or ``model`` is compiled, wrapped or has an adapter.

    Example:
        >>> model = to_reversible("FacebookAI/roberta-base", steps="layer", memory_budget="gradients")
        >>> model = to_reversible(LlamaForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B"), beta=1 / 128)
    """
    beta = list(beta) if isinstance(beta, tuple) else beta
    given = {name: value for name, value in (("beta", beta), ("steps", steps)) if value is not None}
    fields = {**given, **config_fields}
    if isinstance(model, (str, os.PathLike)):
        if cls := library_class(PreTrainedConfig.get_config_dict(model)[0]):
            return cls.from_pretrained(model, **fields)
        config = transformers.AutoConfig.from_pretrained(model)
        name = (config.architectures or [""])[0]
        if name in TWINS:
            architecture, head = TWINS[name]
            own: Any = architecture.heads[head]
            if config.model_type in own.config_class.stock_model_types:
                return own.from_pretrained(model, **fields)
        elif steps != "layer" or not hasattr(transformers, name):
            architecture_of(name)  # raises an error that lists the classes with a twin
        stock: PreTrainedModel = getattr(transformers, name).from_pretrained(model)
        return _reversible_twin(stock, fields)
    check_bare(model)
    return _reversible_twin(model, fields)


def _reversible_twin(model: PreTrainedModel, fields: dict[str, Any]) -> ReversiblePreTrainedModel:
    if isinstance(model, ReversiblePreTrainedModel):
        return _recoupled(model, fields)
    if type(model).__name__ not in TWINS and fields.get("steps") == "layer":
        return made_reversible(model, fields)
    twin, architecture, sources = reversible_structure(model, fields)
    if isinstance(twin, StockLayersModel):  # a copy, which has its values
        return twin
    given = model.state_dict(keep_vars=True)
    values = {n: architecture.to_reversible_tensor(s, given[s].detach(), model.config) for n, s in sources.items()}
    return _filled(twin, model, values, sources)


def reversible_structure(
    model: PreTrainedModel, fields: dict[str, Any]
) -> tuple[ReversiblePreTrainedModel, Architecture, dict[str, str]]:
    """The reversible twin of a stock model, without values; or a copy with its values if it keeps its own layers.

    Returns:
        The twin, with parameters on the meta device if it has no values; the architecture of ``model``; and, by the names of the
        twin's tensors, the tensors of ``model`` from which :meth:`Architecture.to_reversible_tensor` makes them.

    Raises:
        ValueError: there is no reversible twin.
        TypeError: a field is unknown.
    """
    architecture, head = architecture_of(type(model).__name__)
    own = architecture.heads[head]
    if issubclass(own, StockLayersModel):
        copied = coupled_copy(model, own, fields)
        return copied, architecture, {name: name for name in copied.state_dict()}
    if architecture.library and not architecture.library.head_of(model.config.to_dict()):
        raise ValueError(
            f"{type(model).__name__} holds {getattr(model.config, 'architecture', None)!r}, which has no reversible twin: of "
            f"{architecture.library.name}'s models only {architecture.library.models} has one."
        )
    config = reversible_config(model.config, architecture, head, fields)
    twin, sources = _structure(
        model,
        own,
        config,
        lambda wanted, given: {architecture.reversible_name(name, head, wanted): name for name in given},
    )
    return twin, architecture, sources


def _recoupled(model: ReversiblePreTrainedModel, fields: dict[str, Any]) -> ReversiblePreTrainedModel:
    check_fields(type(model.config), type(model.config)().to_dict(), fields)
    fields = {"beta": converted_beta(fields.get("steps", model.config.steps)), **fields}
    twin = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(twin.config, name, value)
    twin.config.check_reversible()
    runner: Any = twin.layer_runner
    runner.retention = None  # so that a new budget takes effect
    return twin


def to_stock(model: ReversiblePreTrainedModel) -> PreTrainedModel:
    """Make the stock model with the weights of a reversible one, on the same device, in the same dtype and mode.

    The result computes what ``model`` computes at ``beta=0``. At another beta the outputs differ.

    Args:
        model: a reversible model of this package, which is not changed.

    Raises:
        ValueError: ``model`` is not a reversible model of this package, or has no stock twin.
        TypeError: ``model`` is compiled, wrapped or has an adapter.
        ImportError: the stock twin belongs to a library that is not installed.

    Example:
        >>> stock = to_stock(model)
        >>> stock.save_pretrained("stock")
    """
    check_bare(model)
    if isinstance(model, StockLayersModel):
        twin: Any = copy.deepcopy(model)
        uncouple(twin)
        stock: PreTrainedModel = twin
        return stock
    architecture = architecture_behind(type(model), model.config)
    head = architecture.head_of(type(model))
    if architecture.library:
        cls: Any = getattr(transformers, architecture.library.wrapper + head)
        config = architecture.library.wrapper_config(model)
    else:
        cls, config = stock_twin(type(model), model.config)
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
        TypeError: ``fields`` has a field that the configuration does not know.
        ValueError: the stock model can do something that its twin cannot.
    """
    config_class: Any = architecture.heads[head].config_class
    check_fields(config_class, config_class().to_dict(), fields)
    if architecture.model_type == "bert" and head == "ForMaskedLM" and config.hidden_act != "gelu":
        raise ValueError(
            f"hidden_act={config.hidden_act!r}: the masked-LM head of BERT uses it, but that of RoBERTa uses 'gelu', so this "
            "model has no reversible twin. Its encoder has one: convert BertModel."
        )
    stock = config.to_dict()
    if rows := architecture.reserved_rows(config):
        stock["max_position_embeddings"] += rows
    given = {
        **config_class.from_stock_dict(stock, fields.get("steps")),
        **architecture.fields,
        "architectures": None,
        **fields,
    }
    result = config_class(**given)
    if architecture.library is None:  # models of other libraries choose their attention themselves
        result._attn_implementation = config._attn_implementation
    return result


def architecture_behind(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Architecture:
    """The architecture of the stock models that a reversible model belongs to.

    Raises:
        ValueError: ``model_class`` is not a reversible model of this package.
    """
    model_type = getattr(config, "stock_model_type", None) or config.model_type
    architecture = (ARCHITECTURES | STOCK_LAYERS).get(str(model_type).removeprefix("rev_"))
    if architecture is None or not hasattr(config, "beta"):
        raise ValueError(f"{model_class.__name__} is not a reversible model of this package.")
    return architecture


def stock_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of the stock twin of a reversible model.

    Raises:
        ValueError: ``model_class`` is not a reversible model of this package, or transformers has no stock class for it.
    """
    architecture, own_class = architecture_behind(model_class, config), type(config)
    cls = architecture.stock_class(model_class)
    stock_class: Any = cls.config_class
    fields = config.to_dict()
    own = own_class().to_dict().keys() - stock_class().to_dict().keys()
    for name in own | {"auto_map", "architectures", "model_type"}:
        fields.pop(name, None)
    if rows := architecture.reserved_rows(config):
        fields["max_position_embeddings"] -= rows
    result = stock_class(**fields)
    result._attn_implementation = config._attn_implementation
    return cls, result


def _structure(
    source: PreTrainedModel,
    cls: type[Model],
    config: PreTrainedConfig,
    named: Callable[[dict[str, Any], dict[str, Any]], dict[str, str]],
) -> tuple[Model, dict[str, str]]:
    """A model of class ``cls`` without values; and, by the names of its tensors, the tensors of ``source`` they come from.

    Args:
        named: a function that finds the tensors of ``source``, from the tensors of both models by their names.
    """
    twin, given = _empty(source, cls, config), source.state_dict(keep_vars=True)
    wanted = twin.state_dict()
    sources = named(wanted, given)
    _check_names(source, twin, sources, wanted, given)
    ties = getattr(twin, "all_tied_weights_keys", {})
    if any(given[sources[a]] is not given[sources[b]] for a, b in ties.items()):
        # The configuration says that these are tied, but the checkpoint had two different tensors: the twin keeps both.
        config.tie_word_embeddings = False
        twin = _empty(source, cls, config)
    return twin, sources


def _empty(source: PreTrainedModel, cls: type[Model], config: PreTrainedConfig) -> Model:
    """A model of class ``cls`` whose parameters have no values. It has a pooler if ``source`` has one."""
    options = {"add_pooling_layer": source.pooler is not None} if hasattr(source, "pooler") else {}
    if getattr(getattr(source, "embeddings", None), "mask_token", None) is not None:
        options["use_mask_token"] = True
    devices = [source.device.index] if source.device.type == "cuda" else []
    # Stock ViT draws random numbers even on the meta device: keep the user's generator as it is.
    with torch.random.fork_rng(devices), init_empty_weights(include_buffers=False):
        twin: Model = cls._from_config(config, **options)
    twin.tie_weights()
    return twin


def _filled(twin: Model, source: PreTrainedModel, values: Mapping[str, Tensor], sources: Mapping[str, str]) -> Model:
    """Give ``twin`` its values, and the device, the mode and the trainable parameters of ``source``."""
    given = source.state_dict(keep_vars=True)
    twin.load_state_dict(values, assign=True)
    for name, value in twin.named_parameters():
        value.requires_grad_(given[sources[name]].requires_grad)
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
    """Raise ValueError unless every parameter of ``target`` comes from one of ``source``, and all of ``source`` are used."""
    odd = (source_names.keys() ^ wanted.keys()) | (set(source_names.values()) ^ given.keys())
    if odd:
        raise ValueError(
            f"the parameters of {type(source).__name__} are not those of {type(target).__name__}: "
            f"{', '.join(sorted(odd)[:6])}. Adapters have to be merged or removed first."
        )
