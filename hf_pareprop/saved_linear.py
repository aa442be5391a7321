"""Results of linear layers that are kept from the forward pass, so that a rebuild need not compute them again.

Activation checkpointing can stop before the last matrix product of a layer. A rebuild cannot, because it needs the result to
undo the step. But that result is small, one value per element of a state, and the product that ends an MLP is a third of
a layer's arithmetic. Nothing else that could be kept saves as much time per byte. Keeping some results of a layer and
recomputing the rest is the selective recomputation of Korthikanti et al. 2022, arXiv 2205.05198, section 5.

A *narrowing* linear layer has fewer output features than input features. The results of these layers are kept, whatever
module computes them.
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
    """The results of the narrowing linear layers in one run of a step, for use in later runs on the same input."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, int, Tensor]] = []
        self._right: list[Tensor] = []

    @property
    def results(self) -> list[Tensor]:
        return [result for result, _, _ in self._results]

    @property
    def right(self) -> list[Tensor]:
        """For each layer, whether its input in the last run was that of the first run, as 0-d bools.

        This needs a check of its own, because a kept result does not show that the input was wrong.
        """
        return self._right

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """In this context the results of narrowing linear layers are kept."""
        with _Keeping(self._results):
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """In this context narrowing linear layers return the kept results, with the autograd graph of a computed result.

        Raises:
            RuntimeError: a kept result was modified meanwhile, or a layer runs that did not run before.
        """
        self._right = []
        with _Giving(iter(self._results), self._right):
            yield


class _OfLinears(TorchFunctionMode):
    """Intercepts narrowing linear layers."""

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
    """Replaces the matrix product of a linear layer by a kept result. It acts below autograd, which does not notice.

    If PyTorch uses another operator than expected, the product is computed again: the bits are the same, but no time is
    saved. A layer with a bias may compute a product without it, which is not the result, so only ``addmm`` is replaced there.
    """

    def __init__(self, result: Tensor, biased: bool):
        super().__init__()
        self._result = result
        self._operator = torch.ops.aten.addmm.default if biased else torch.ops.aten.mm.default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operator:
            return self._result.detach().view(-1, self._result.shape[-1])
        return func(*args, **(kwargs or {}))
