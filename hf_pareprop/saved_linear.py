"""Results of linear layers that are kept from the forward pass, so that a rebuild need not compute them again.

A rebuild cannot stop, as activation checkpointing does, before the last product of a layer: undoing the step needs its
result. But that result is small, one value per element of a state, and the product that ends an MLP is a third of a
layer's arithmetic: nothing else that could be kept saves as much time per byte. Keeping some results of a layer and
recomputing the rest is the selective recomputation of Korthikanti et al. 2022, arXiv 2205.05198, section 5.

What is kept are the results of linear layers with fewer features than their input, whatever module computes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .coupling import checksum_of_values
from .torch_private import DispatchMode, version_of


class SavedLinears:
    """The results of the narrowing linear layers in one run of a step, for later runs on the same input."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, int, Tensor]] = []
        self._right: list[Tensor] = []

    @property
    def results(self) -> list[Tensor]:
        return [result for result, _, _ in self._results]

    @property
    def right(self) -> list[Tensor]:
        """Whether each layer read in the last run what it read in the first: 0-d bools. A result that is given hides that."""
        return self._right

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what linear layers yield."""
        with _Keeping(self._results):
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """Have linear layers yield what was kept, with the autograd graph of having computed it.

        Raises:
            RuntimeError: at a layer whose result was modified since, or that did not run before.
        """
        self._right = []
        with _Giving(iter(self._results), self._right):
            yield


class _OfLinears(TorchFunctionMode):
    """Intercepts linear layers that have fewer features than their input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.shape[0] < weight.shape[-1]:
                return self.narrowing(args, kwargs)
        return func(*args, **kwargs)

    def narrowing(self, args: Any, kwargs: Any) -> Tensor:
        raise NotImplementedError


class _Keeping(_OfLinears):
    def __init__(self, results: list[tuple[Tensor, int, Tensor]]):
        super().__init__()
        self._results = results

    def narrowing(self, args: Any, kwargs: Any) -> Tensor:
        result = linear(*args, **kwargs)
        self._results.append((result.detach(), version_of(result), _fingerprint(args, kwargs)))
        return result


class _Giving(_OfLinears):
    def __init__(self, results: Iterator[tuple[Tensor, int, Tensor]], right: list[Tensor]):
        super().__init__()
        self._results, self._right = results, right

    def narrowing(self, args: Any, kwargs: Any) -> Tensor:
        result, version, fingerprint = next(self._results, (None, 0, None))
        if result is None or fingerprint is None:
            raise RuntimeError(
                "a layer computes more linear layers in the backward pass than in the forward pass: it is not a function of "
                "its inputs. Set memory_budget to None, or call model.set_backward_engine('autograd')."
            )
        if version_of(result) != version:
            raise RuntimeError(
                "the result of a linear layer was modified in place after it was kept for the backward pass: a step must not "
                "do that, or memory_budget must be None."
            )
        self._right.append(_fingerprint(args, kwargs) == fingerprint)
        biased = (args[2] if len(args) > 2 else kwargs.get("bias")) is not None
        with _Given(result, biased):
            return linear(*args, **kwargs)


def _fingerprint(args: Any, kwargs: Any) -> Tensor:
    """A checksum of what a linear layer reads."""
    return checksum_of_values(args[0] if args else kwargs["input"])


class _Given(DispatchMode):
    """Puts a result in place of the one product that a linear layer computes, below autograd, which notices nothing.

    Where PyTorch computes it by another operator than expected it is computed again: the same bits, no time saved. With a
    bias, a product without it is not the result, so it is left alone.
    """

    def __init__(self, result: Tensor, biased: bool):
        super().__init__()
        self._result = result
        self._operator = torch.ops.aten.addmm.default if biased else torch.ops.aten.mm.default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operator:
            return self._result.detach().view(-1, self._result.shape[-1])
        return func(*args, **(kwargs or {}))
