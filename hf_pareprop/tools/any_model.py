"""Make copies of stock models reversible with their own layers. A model of an unknown architecture is tested first."""

import copy
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..stock_layers import StockLayersModel, chains_in, couple, field_names, make_family, uncouple
from .inputs import loss_of, random_batch, with_targets

BATCHES = 2
LENGTH = 12
"""The number of tokens of a random input."""


def check_fields(config_class: Any, known: Container[str], fields: Iterable[str]) -> None:
    """Raise TypeError if a configuration class does not know one of ``fields``."""
    for name in fields:
        if name not in known:
            raise TypeError(f"{config_class.__name__} has no field {name!r}.")


def coupled_copy(model: PreTrainedModel, cls: type[StockLayersModel], fields: Mapping[str, Any]) -> Any:
    """A reversible copy of a stock model, an instance of ``cls``.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field is unknown.
    """
    check_fields(cls.config_class, {*field_names(), *model.config.to_dict()}, fields)
    if any(".lora_" in name or ".base_layer." in name for name in model.state_dict()):
        raise ValueError("adapters have to be merged or removed first.")
    twin = copy.deepcopy(model)
    twin.config.architectures = None
    couple(twin, cls, fields)
    return twin


def made_reversible(model: PreTrainedModel, fields: Mapping[str, Any]) -> Any:
    """A reversible copy of a model of any architecture whose layers map one hidden state to the next.

    The copy is tested on two random batches: at `beta=0` it has to compute what ``model`` computes, and the engines have to
    give the same gradients.

    Raises:
        ValueError: the copy fails the test, or the model does not have exactly one chain of layers.
    """
    name = type(model).__name__
    try:
        twin = coupled_copy(model, _class_for(model), fields)
        with torch.random.fork_rng(_cuda_devices(model)):
            for seed in range(BATCHES):
                _try(model, twin, seed)
    except (TypeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: layers of unknown models may do anything that cannot be run again
        raise ValueError(
            f"{name} cannot be made reversible: {error} Every layer has to map one hidden state to the next."
        ) from error
    return twin


def _class_for(model: PreTrainedModel) -> type[StockLayersModel]:
    chains = chains_in(model, GradientCheckpointingLayer)
    if len(chains) != 1:
        raise ValueError(f"it has {len(chains)} lists of layers, and one is expected.")
    runner = _innermost_model_around(model, chains[0])
    heads = [] if runner is model else [type(model)]
    chain: Any = model.get_submodule(chains[0])
    layers = dict.fromkeys(type(layer) for layer in chain)
    found: Any = make_family(type(runner), heads, layers, module=__name__)
    return found[f"Rev{type(model).__name__}"]


def _innermost_model_around(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model within ``model`` whose loop runs the layers called ``name``. Heads may call it past their base model."""
    parts = name.split(".")
    paths = [".".join(parts[:length]) for length in range(len(parts))]
    around = [model.get_submodule(path) for path in paths]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def _try(model: PreTrainedModel, twin: StockLayersModel, seed: int) -> None:
    """Raise ValueError if the reversible model does not compute what it should."""
    conventional = copy.deepcopy(twin).eval()
    conventional.set_beta(0)
    stock = copy.deepcopy(twin).eval()
    uncouple(stock)
    try:
        batch = with_targets(random_batch(model, length=LENGTH, seed=seed), model)
        expected = _outputs(stock, batch, seed)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind, as it comes from the code of an unknown model
        raise ValueError(
            f"the test needs a random text or image that the stock model takes, and it takes none ({error})."
        ) from error
    same = zip(expected, _outputs(conventional, batch, seed), strict=True)
    if not all(torch.equal(a, b) for a, b in same):
        raise ValueError("at beta=0 it does not compute what the stock model does.")
    tried = copy.deepcopy(twin).train()
    results = []
    for engine in ("autograd", "reprop"):
        tried.set_backward_engine(engine)
        tried.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        loss_of(tried(**batch)).backward()
        results.append({name: p.grad for name, p in tried.named_parameters() if p.grad is not None})
    reference, rebuilt = results
    if not reference or reference.keys() != rebuilt.keys():
        raise ValueError("its parameters get gradients in one engine and not in the other.")
    if any(not torch.equal(reference[name], rebuilt[name]) for name in reference):
        raise ValueError("rebuilt layers give other gradients than stored activations.")


def _outputs(model: PreTrainedModel, batch: Mapping[str, Any], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)  # some models draw random numbers even outside of training
    with torch.no_grad():
        output = model(**batch)
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def _cuda_devices(model: PreTrainedModel) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
