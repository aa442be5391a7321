"""Forward hooks that other code puts on modules: which of them may take activations out of a layer."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .torch_private import forward_hooks

INSIDE = ("transformers",)
"""Packages whose hooks on modules inside a layer take nothing unless asked to: transformers records attention maps so."""

ON_LAYERS = ("torch", "transformers", "accelerate", "peft", "deepspeed")
"""Packages whose hooks on whole layers only wrap them (FSDP2, for example) and take nothing out."""


def is_observed_inside(modules: Sequence[nn.Module]) -> bool:
    """Whether hooks on modules inside a layer may take activations out of it. Warns if so.

    Such a layer must not be rebuilt: a loss on an activation that was taken out needs a graph that is not stored.

    Args:
        modules: the layer, and then the modules inside it.
    """
    hooks = [hook for inner in modules[1:] for hook in forward_hooks(inner)]
    strange = _strangers(hooks, INSIDE) or _strangers(forward_hooks(), INSIDE)
    if strange:
        name = getattr(strange, "__qualname__", type(strange).__name__)
        warnings.warn(
            f"a hook ({name}) sits on a module inside a reversible layer and may use its activations: layers with such hooks "
            "store their activations instead of rebuilding them. Remove the hook to save that memory.",
            stacklevel=2,
        )
    return bool(strange)


def is_observed(layer: nn.Module) -> bool:
    """Whether a hook on a layer may take its output."""
    return _strangers([*forward_hooks(layer), *forward_hooks()], ON_LAYERS) is not None


def _strangers(hooks: Iterable[Any], known: Sequence[str]) -> Any:
    """The first hook that was not written in a package of ``known``."""
    for hook in hooks:
        function = hook
        while hasattr(function, "func"):  # a functools.partial
            function = function.func
        module = getattr(function, "__module__", None) or ""
        if module.partition(".")[0] not in known:
            return hook
    return None
