"""Results of checks that a training step computed on its device. The host reads them without waiting for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cuda_rng import capturing
from .torch_private import is_fake, transforming

Tell = Callable[[float], None]
"""A function that receives a number. It may raise an error."""


class Findings:
    """Numbers that are being copied from a device, and the functions that will receive them."""

    def __init__(self) -> None:
        self._coming: list[tuple[Tensor, torch.cuda.Event, Tell]] = []

    def __reduce__(self) -> Any:
        return Findings, ()  # a copy of a model begins without findings

    @torch.compiler.disable
    def expect(self, number: Tensor, tell: Tell) -> None:
        """Call ``tell`` with the value of a 0-d tensor: now if it is on the CPU, otherwise in a later :meth:`settle`.

        While a CUDA graph is captured there is no value yet. Then the check is :func:`collected`, if somebody does that.

        Args:
            number: the tensor.
            tell: receives the value. It may raise an error; this method or :meth:`settle` then raises it.
        """
        if transforming() or is_fake(number):
            return
        if capturing(number.device):
            if _collected is not None:
                _collected.append(Check(self, number.detach(), tell))
            return
        if number.device.type != "cuda":
            tell(number.item())
            return
        host = torch.empty((), dtype=number.dtype, pin_memory=True)
        host.copy_(number.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(number.device))
        self._coming.append((host, event, tell))

    @torch.compiler.disable
    def settle(self) -> None:
        """Call the functions whose numbers have arrived. While a CUDA graph is captured, events must not be queried."""
        if not self._coming or torch.cuda.is_current_stream_capturing():
            return
        while self._coming and self._coming[0][1].query():
            host, _, tell = self._coming.pop(0)
            tell(host.item())


class Check(NamedTuple):
    """A check that a CUDA graph computes anew at every replay."""

    findings: Findings
    number: Tensor
    tell: Tell

    def expect(self) -> None:
        """Have the result of the last replay read. Call this after every replay."""
        self.findings.expect(self.number, self.tell)

    def settle(self) -> None:
        """Raise an error if the check of an earlier replay failed and its result has arrived."""
        self.findings.settle()


_collected: list[Check] | None = None
"""Not a context variable, because the backward pass on CUDA runs in a thread of PyTorch."""


@contextmanager
def collected() -> Iterator[list[Check]]:
    """A context for a capture. Yields a list, which then has the checks of the captured passes."""
    global _collected
    found, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = found
