"""Run a step again under the conditions of its first run: random numbers, autocast, kernels, modes, kept results."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .cuda_rng import NoDraws, capturing, drawing_from, schedule
from .saved_linear import SavedLinears
from .torch_private import generators, matmul_precision, sdp_priority, set_matmul_precision, set_sdp_priority

T = TypeVar("T")

_generators_in_use = threading.RLock()
"""Held while a step draws from the global generators, and while a replay has moved them."""

FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (sdp_priority, set_sdp_priority),
    (lambda: torch.backends.mkldnn.enabled, lambda on: torch.backends.mkldnn.set_flags(on)),
    (matmul_precision, set_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_default_dtype, torch.set_default_dtype),
)
"""The global flags by which PyTorch chooses kernels: for each, a function that reads it and one that sets it."""


def uncached_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The autocast of the caller, without its weight cache. A rebuild runs like this as well."""
    return _autocast(_autocast_settings(device))


def _autocast_settings(device: torch.device) -> list[tuple[str, torch.dtype, bool]]:
    return [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in dict.fromkeys((device.type, "cpu"))
        if torch.amp.is_autocast_available(kind)
    ]


def _autocast(settings: Sequence[tuple[str, torch.dtype, bool]]) -> AbstractContextManager[Any]:
    needed = [setting for setting in settings if setting[2] or torch.is_autocast_enabled(setting[0])]
    return _autocast_of(needed) if needed else nullcontext()


@contextmanager
def _autocast_of(settings: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype, enabled in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


class Conditions:
    """Everything that the results of a layer depend on besides its arguments and parameters, as it was in the forward pass.

    Autocast is always entered again without its weight cache. A cast that was cached without gradients would cut the
    gradients of a rebuild if the backward pass ran inside the same autocast region.

    Args:
        modules: the layer and all modules in it. Their training flags are noted.
        device: the device of the layer.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self.device = device
        self._modules = modules
        self._training = [module.training for module in modules]
        self._autocast = _autocast_settings(device)
        self.note_flags()

    def note_flags(self) -> None:
        """Note PyTorch's flags. Call this after the layer has run: the first attention call sets the order of its kernels."""
        self._flags = [read() for read, _ in FLAGS]

    def in_autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the forward pass."""
        return _autocast(self._autocast)

    def hold(self) -> bool:
        """Whether flags and modes are what they were. Autocast is left out, because every thread has its own."""
        flags = all(read() == then for (read, _), then in zip(FLAGS, self._flags, strict=True))
        return flags and all(m.training == then for m, then in zip(self._modules, self._training, strict=True))

    def restored(self) -> AbstractContextManager[Any]:
        """A context with the conditions of the forward pass. Flags and modes that have not changed are not touched."""
        return self.in_autocast() if self.hold() else self._set_back()

    @contextmanager
    def _set_back(self) -> Iterator[None]:
        with ExitStack() as stack:
            for (read, write), then in zip(FLAGS, self._flags, strict=True):
                if (now := read()) != then:
                    stack.callback(write, now)
                    write(then)
            for module, then in zip(self._modules, self._training, strict=True):
                if (now := module.training) != then:
                    stack.callback(setattr, module, "training", now)
                    module.training = then
            stack.enter_context(self.in_autocast())
            yield


class StepContext:
    """What one step needs to run again bit for bit.

    Random numbers are replayed only if the step drew some. The generators are set to their states before the step, and
    afterwards back to the states in which they were found. So the global stream of random numbers is the same as in plain
    training. In a CUDA graph generators have no states to go back to; see :mod:`cuda_rng`.

    Args:
        conditions: those of the layer.
        saves_linears: whether results of linear layers are kept, so that they are not computed again.
    """

    __slots__ = ("_after", "_replica", "_rng", "conditions", "linears")

    def __init__(self, conditions: Conditions, saves_linears: bool = False):
        self.conditions = conditions
        self.linears = SavedLinears() if saves_linears else None
        self._rng: list[Tensor] | None = None
        self._after: list[int] = []
        self._replica: torch.Generator | None = None

    def record(self, work: Callable[[], T]) -> T:
        """Run ``work`` for the first time; remember the generators' states if it drew random numbers."""
        device = self.conditions.device
        if capturing(device):
            return self._record_into_graph(work)
        with _generators_in_use:
            sources = generators(device)
            before = [source.get_state() for source in sources]
            with self.conditions.in_autocast(), self._keeping_linears():
                result = work()
            after = [source.get_state() for source in sources]
        drew = any(_bytes(a) != _bytes(b) for a, b in zip(before, after, strict=True))
        if drew:
            self._rng, self._after = before, [hash(_bytes(state)) for state in after]
        if (learning := schedule()) is not None:
            learning.note(before[-1], drew)
        return result

    def _record_into_graph(self, work: Callable[[], T]) -> T:
        followed = schedule()
        self._replica = followed.take() if followed else None
        with self.conditions.in_autocast(), self._keeping_linears(), nullcontext() if followed else NoDraws():
            return work()

    def replay(self, work: Callable[[], T]) -> T:
        """Run ``work`` again as it ran in :meth:`record`."""
        with self.conditions.restored(), self.linears.given() if self.linears else nullcontext():
            if self._replica is not None:
                with drawing_from(self._replica, self.conditions.device):
                    return work()
            if self._rng is None:
                return work()
            with _generators_in_use:
                return _from_states(generators(self.conditions.device), self._rng, lambda: self._drawing(work))

    def _drawing(self, work: Callable[[], T]) -> T:
        result = work()
        after = [hash(_bytes(source.get_state())) for source in generators(self.conditions.device)]
        if after != self._after:
            raise RuntimeError(
                "a step drew other random numbers when it ran again in the backward pass than in the forward pass: another "
                "thread draws random numbers while dropout is replayed, or dropout was changed in between. Avoid that, or call "
                "model.set_backward_engine('autograd') before the forward pass, which stores activations."
            )
        return result

    def _keeping_linears(self) -> AbstractContextManager[Any]:
        return self.linears.keeping() if self.linears else nullcontext()


def _from_states(sources: Sequence[Any], states: Sequence[Tensor], work: Callable[[], T]) -> T:
    """``work()`` with the generators ``sources`` set to ``states``. Afterwards they have the states in which they were found.

    This holds after a ``KeyboardInterrupt`` as well. Python raises it between two bytecodes of the main thread, and the
    ``finally`` block begins with a single call into C, which it cannot interrupt.
    """
    if not sources:
        return work()
    source = sources[0]
    found = source.get_state()
    try:
        source.set_state(states[0])
        return _from_states(sources[1:], states[1:], work)
    finally:
        source.set_state(found)


def _bytes(state: Tensor) -> bytes:
    """The bytes of a generator's state, read from memory directly.

    That is three times as fast as an operation of PyTorch. It also works where all tensors are fake: the state is real.
    """
    return ctypes.string_at(state.data_ptr(), state.nbytes)
