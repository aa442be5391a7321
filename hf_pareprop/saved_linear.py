"""Results of products that are kept from the forward pass, so that a rebuild need not compute them again.

A rebuild cannot stop, as activation checkpointing does, before the last product of a layer: undoing the step needs its
result. But that result is small, one value per element of a state, and the product that ends an MLP is a third of a
layer's arithmetic: nothing else that could be kept saves as much time per byte. Keeping some results of a layer and
recomputing the rest is the selective recomputation of Korthikanti et al. 2022, arXiv 2205.05198, section 5.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_thread = threading.local()

Role = Callable[["SavedLinear", Callable[[Tensor], Tensor], Tensor], Tensor]
"""What a product does in place of its own computation, which it gets with its input."""


class SavedLinear(nn.Linear):
    """A linear layer whose result is kept where a step is told to, if it has fewer features than the input."""

    def forward(self, input: Tensor) -> Tensor:
        role: Role | None = getattr(_thread, "role", None)
        if role is None or self.out_features >= self.in_features:
            return super().forward(input)
        return role(self, super().forward, input)


class SavedLinears:
    """The results of the products in one run of a step, for later runs on the same input."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, int]] = []

    @property
    def results(self) -> list[Tensor]:
        return [result for result, _ in self._results]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what products yield."""

        def keep(layer: SavedLinear, compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
            result = compute(input)
            self._results.append((result.detach(), result._version))
            return result

        with _in_role(keep):
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """Have products yield what was kept, with the autograd graph of having computed it.

        Raises:
            RuntimeError: at a product whose result was modified since.
        """
        results = iter(self._results)

        def give(layer: SavedLinear, compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
            result, version = next(results)
            if result._version != version:
                raise RuntimeError(
                    f"the result of {layer} was modified in place after it was kept for the backward pass: a step must not "
                    "do that, or memory_budget must be None."
                )
            with _Given(layer, result):
                return compute(input)

        with _in_role(give):
            yield


@contextmanager
def _in_role(role: Role) -> Iterator[None]:
    before = getattr(_thread, "role", None)
    _thread.role = role
    try:
        yield
    finally:
        _thread.role = before


class _Given(TorchDispatchMode):
    """Puts a result in place of the one product that a linear layer computes, below autograd, which notices nothing.

    Where PyTorch computes it by another operator than expected it is computed again: the same bits, no time saved.
    """

    def __init__(self, layer: nn.Linear, result: Tensor):
        super().__init__()
        self._operator = torch.ops.aten.mm.default if layer.bias is None else torch.ops.aten.addmm.default
        self._result = result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operator:
            return self._result.detach().view(-1, self._result.shape[-1])
        return func(*args, **(kwargs or {}))
