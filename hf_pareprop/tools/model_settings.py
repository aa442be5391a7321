"""What the Python code of a model reads. A captured training step repeats it as it was, so it must not have changed."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

SIMPLE = frozenset((bool, int, float, str, type(None)))
"""Types whose values are compared. Of other objects, except containers and tensors, the identity is."""

LABELS = ("id2label", "label2id")
"""Fields of a configuration that no forward pass reads. There may be tens of thousands of labels."""


def settings_of(model: nn.Module) -> tuple[Any, ...]:
    """A value that changes if something changes that a forward or backward pass of ``model`` reads in Python.

    That is the configuration; and of every module the attributes, modes and hooks, and which parameters, buffers and modules
    it has, where their memory is, and which of them are trained. The contents of tensors do not count. It takes milliseconds.
    """
    config = getattr(model, "config", None)
    own = _of_config(config) if isinstance(config, PreTrainedConfig) else None
    return own, [_of_values(vars(module).values()) for module in model.modules()]


def _of_config(config: PreTrainedConfig) -> list[Any]:
    return [
        (name, _of_config(value) if isinstance(value, PreTrainedConfig) else _frozen(value))
        for name, value in vars(config).items()
        if name not in LABELS
    ]


def _of_values(values: Iterable[Any]) -> list[Any]:
    # Most attributes are numbers, so these are looked for first.
    return [value if type(value) in SIMPLE else _frozen(value) for value in values]


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return [*value, *_of_values(value.values())] if value else None
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), value.requires_grad
    if isinstance(value, (list, tuple)):
        return _of_values(value)
    return value if type(value) in SIMPLE else id(value)
