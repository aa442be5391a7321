"""Observe a model while it trains: what verification, accounting and tracing see of a forward pass and its backward.

with observing(observer):
    loss = model(**batch).loss
loss.backward()  # the observer sees this as well
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .chain import Pair, Rebuilt


class Observer:
    """Sees what happens and changes nothing. A subclass overrides the methods that it needs.

    Layers are counted from 0 in the order of their calls, steps from 0 within a layer. With an engine that overlaps, some
    methods may be called on another thread; their docstrings say so.
    """

    def layer_begins(self, position: int, pair: "Pair", limit: float) -> None:
        """A layer that will be rebuilt begins its forward pass with ``pair``. States have to stay below ``limit``."""

    def layer_keeps(self, position: int, tensors: list[Tensor]) -> None:
        """The forward pass of the layer ended. ``tensors`` are its states, and what it keeps for the backward pass."""

    def forward_ends(self, peak: Tensor, grid_bits: int | None) -> None:
        """The encoder ended; ``peak`` is the largest magnitude in its states, in units of the grid."""

    def rebuilding(self, position: int, step: int) -> AbstractContextManager[None]:
        """Within this context a step is run again, perhaps on another thread."""
        return nullcontext()

    def step_rebuilt(self, position: int, step: int, rebuilt: "Rebuilt") -> None:
        """A step was run again, perhaps on another thread."""

    def differentiating(self, position: int, step: int) -> AbstractContextManager[None]:
        """Within this context autograd computes the gradients of a step: until it asks for another step, or the pass ends."""
        return nullcontext()

    def layer_rebuilt(self, position: int, pair: "Pair") -> None:
        """The backward pass of a layer has rebuilt the pair with which its forward pass began."""


_observer: ContextVar[Observer] = ContextVar("observer", default=Observer())  # noqa: B039  it has no state


def current_observer() -> Observer:
    """The observer of forward passes that begin now, and of their backward passes."""
    return _observer.get()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """In this context ``observer`` sees the forward passes that begin, and later their backward passes."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
