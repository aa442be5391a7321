"""What a training step found out on its device, told as soon as that is known without waiting for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cuda_rng import capturing
from .torch_private import is_fake, transforming


class Findings:
    """Numbers on their way from a device, and whom to tell them."""

    def __init__(self) -> None:
        self._coming: list[tuple[Tensor, torch.cuda.Event, Callable[[float], None]]] = []

    def __reduce__(self) -> Any:
        return Findings, ()  # a copy of a model begins with none

    @torch.compiler.disable
    def expect(self, number: Tensor, tell: Callable[[float], None]) -> None:
        """Have ``tell`` called with a 0-d tensor's value: now if it is on the CPU, else by a later :meth:`settle`.

        Args:
            tell: may raise, and then what was called raises.
        """
        if transforming() or is_fake(number) or capturing(number.device):
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
        """Tell the numbers that have arrived; none while a CUDA graph is captured, when events must not be asked."""
        if not self._coming or torch.cuda.is_current_stream_capturing():
            return
        while self._coming and self._coming[0][1].query():
            host, _, tell = self._coming.pop(0)
            tell(host.item())
