"""Forward hooks of others inside a layer that is rebuilt: a hook that only looks runs in the forward pass alone.

A rebuild calls the modules of a layer again, and with them their forward hooks. A hook that changes what a module returns has
to run again, because the layer would compute something else without it. A hook that only looks must not: it would count or
collect everything twice. What a hook does shows when it runs in the forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from .torch_private import hook_tables, store, stored, version_of

PART_OF_THE_LAYER = ("torch", "transformers", "accelerate", "peft", "deepspeed")
"""Packages whose hooks are how a module computes, such as FSDP2's: they always run again."""

_run: ContextVar["Onlookers | None"] = ContextVar("run", default=None)
_numbers = count()


class Onlookers:
    """What the hooks of others did in one run of a step in the forward pass.

    What hooks compute themselves is stored by autograd, and never rebuilt.
    """

    def __init__(self) -> None:
        self._only_look: dict[int, bool] = {}
        self._again = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The forward pass of a step."""
        token = _run.set(self)
        try:
            yield
        finally:
            _run.reset(token)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The rebuild of a step."""
        self._again = True
        with self.watched():
            yield

    def call(self, number: int, hook: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._again:
            if self._only_look.get(number):
                return None
            with saved_tensors_hooks(_drop, _drop):
                return hook(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)]
        versions = list(map(version_of, tensors))
        with saved_tensors_hooks(store, stored):
            result = hook(*args, **kwargs)
        looked = result is None and list(map(version_of, tensors)) == versions
        self._only_look[number] = looked and self._only_look.get(number, True)
        return result


class Watched:
    """A hook of somebody else, in its own place. Outside of a layer that is rebuilt it does what it always does."""

    def __init__(self, hook: Callable[..., Any]):
        self.hook, self.number = hook, next(_numbers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        return self.hook(*args, **kwargs) if run is None else run.call(self.number, self.hook, args, kwargs)


def watch(modules: Sequence[nn.Module]) -> bool:
    """Have the hooks of others on these modules, and on all modules, watched. Returns whether there are any."""
    found = False
    for table in hook_tables(modules):
        for key, hook in table.items():
            if isinstance(hook, Watched):
                found = True
            elif not _is_part_of_the_layer(hook):
                table[key] = Watched(hook)
                found = True
    return found


def _is_part_of_the_layer(hook: Any) -> bool:
    while hasattr(hook, "func"):  # a functools.partial
        hook = hook.func
    module = getattr(hook, "__module__", None) or ""
    return module.partition(".")[0] in PART_OF_THE_LAYER


def _drop(tensor: Any) -> Any:
    return None
