"""Run a function a second time under the conditions of the first: random numbers, autocast, products that were kept."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from .cuda_rng import NoDraws, capturing, drawing_from, schedule
from .saved_linear import SavedLinears

T = TypeVar("T")


class StepContext:
    """The ambient state in which a step ran in the forward pass, so that it can be recomputed bit for bit.

    Autocast is re-entered with its settings of the forward pass, always without its weight cache: the forward pass
    runs without gradients, and a cast that was cached there would cut the recomputation's gradient if the backward
    pass ran inside the same autocast region.

    Random numbers are replayed from the generators' states before the step, and only if the step drew some; the
    generators are left as they were found, so the global stream of random numbers is the one plain training sees.
    In a CUDA graph, whose generators have no states to go back to, see :mod:`cuda_rng`.

    Args:
        device: of the step.
        keeps_products: whether results of products are kept, which are then not computed again.
    """

    __slots__ = ("_autocast", "_replica", "_rng", "device", "products")

    def __init__(self, device: torch.device, keeps_products: bool = False):
        self.device = device
        self.products = SavedLinears() if keeps_products else None
        self._rng: list[Tensor] | None = None
        self._replica: torch.Generator | None = None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` when it will not be replayed, with the same settings as if it were."""
        with self._in_autocast():
            return work()

    def record(self, work: Callable[[], T]) -> T:
        """Run ``work`` for the first time; remember the generators' states if it drew random numbers."""
        if capturing(self.device):
            return self._record_into_graph(work)
        before = _rng_state(self.device)
        with self._keeping_products():
            result = self.run(work)
        drew = any(_bytes(a) != _bytes(b) for a, b in zip(before, _rng_state(self.device), strict=True))
        self._rng = before if drew else None
        if (learning := schedule()) is not None:
            learning.note(before[-1], drew)
        return result

    def _record_into_graph(self, work: Callable[[], T]) -> T:
        followed = schedule()
        self._replica = followed.take() if followed else None
        with self._keeping_products(), nullcontext() if followed else NoDraws():
            return self.run(work)

    def replay(self, work: Callable[[], T]) -> T:
        """Run ``work`` again as it ran in :meth:`record`."""
        with self._in_autocast(), self.products.given() if self.products else nullcontext():
            if self._replica is not None:
                with drawing_from(self._replica, self.device):
                    return work()
            if self._rng is None:
                return work()
            found = _rng_state(self.device)
            try:
                _set_rng_state(self.device, self._rng)
                return work()
            finally:
                _set_rng_state(self.device, found)

    def _keeping_products(self) -> AbstractContextManager[None]:
        return self.products.keeping() if self.products else nullcontext()

    @contextmanager
    def _in_autocast(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(*_which(device)))
    return states


def _bytes(state: Tensor) -> bytes:
    """Past the dispatcher: three times as fast, and a generator's state is real also where all tensors are fake."""
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _set_rng_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument
