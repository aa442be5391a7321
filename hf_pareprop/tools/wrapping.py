"""Recognise models that are wrapped in other modules (compiled, averaged, distributed, with adapters)."""

from typing import Any

from torch import nn

WAYS_OUT = {
    "OptimizedModule": "is compiled: give the model in it, `model._orig_mod`",
    "AveragedModel": "averages a model: give the average itself, `model.module`",
    "DataParallel": "spreads a model over devices: give the model in it, `model.module`",
    "DistributedDataParallel": "spreads a model over processes: give the model in it, `model.module`",
    "FullyShardedDataParallel": "shards a model over processes: save it by Trainer or accelerate, and give what from_pretrained loads",
    "DeepSpeedEngine": "trains a model: give the model in it, `model.module`",
    "PeftModel": "adds an adapter to a model: give `model.merge_and_unload()`, or `model.get_base_model()` without the adapter",
}
"""How to get the model out of a wrapper, by the name of the wrapper's class or of one of its base classes."""


def check_bare(model: Any) -> None:
    """Raise TypeError if ``model`` is a wrapper around the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no model: {model!r:.100}.")
    for cls in type(model).__mro__:
        if way := WAYS_OUT.get(cls.__name__):
            raise TypeError(f"{type(model).__name__} {way}.")
