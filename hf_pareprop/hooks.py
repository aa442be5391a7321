"""Hooks of others on modules: which of them may carry activations out of a layer."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .torch_private import forward_hooks

INSIDE = ("transformers",)
"""Whose hooks on modules inside a layer do nothing unless asked to: transformers records attention maps with them."""

ON_LAYERS = ("torch", "transformers", "accelerate", "peft", "deepspeed")
"""Whose hooks on whole layers wrap them (FSDP2, for example) and take nothing away."""


def is_observed_inside(modules: Sequence[nn.Module]) -> bool:
    """Whether activations may leave the first of ``modules``, a layer, through hooks on the others, which are inside it.

    Such a layer must not be rebuilt: a loss on what left it would have a graph that does not exist. Warns of it.
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
    """Whether what a layer returns may leave through a hook on it."""
    return _strangers([*forward_hooks(layer), *forward_hooks()], ON_LAYERS) is not None


def _strangers(hooks: Iterable[Any], known: Sequence[str]) -> Any:
    """The first hook that was not written in a package of ``known``."""
    for hook in hooks:
        function = hook
        while hasattr(function, "func"):  # of functools.partial
            function = function.func
        module = getattr(function, "__module__", None) or ""
        if module.partition(".")[0] not in known:
            return hook
    return None
