"""A layer that changes the shape of the hidden state, as where a new stage begins, so that it cannot be reversible.

Its activations are not stored all the same: the hidden state that it read is, and the layer runs again in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .coupling import checksum
from .engine import Trail
from .layer_call import LayerCall, RebuiltStep, check_backward_mode, graph_of
from .memory_probe import SavedBytes


class TransitionCall(LayerCall):
    """A call of such a layer. Its steps are run as one."""

    def run_forgetfully(self, work: Callable[..., Tensor], hidden: Tensor, meter: SavedBytes | None = None) -> Tensor:
        """``work(hidden, *inputs)`` without a graph.

        Raises:
            RuntimeError: as :meth:`LayerCall.run_undoably`.
        """
        self._work = lambda state, inputs: work(state, *inputs)
        with self._recording(meter):
            value = self._record(self._work, hidden.detach().requires_grad_(hidden.requires_grad)).detach()
        self._checksum = _checksum(value)
        return value

    def run_again(self, hidden: Tensor) -> tuple[RebuiltStep, Tensor]:
        """The layer with its graph, and whether it computed what it did in the forward pass: a 0-d bool."""
        value, sources = self._replay(0, self._work, hidden.detach())
        assert self._checksum is not None
        return RebuiltStep(sources, graph_of(value), value.dtype, value), torch.eq(
            _checksum(value.detach()), self._checksum
        )


class Transition(torch.autograd.Function):
    """Forward: the value that the call computed, in a list, the hidden state that it read, and the call's sources.

    The list is emptied, so that the value is nobody else's and may be changed in place, as hooks of others may do.
    """

    @staticmethod
    def forward(
        ctx: Any, trail: Trail, position: int, computed: list[Tensor], hidden: Tensor, *sources: Tensor
    ) -> Tensor:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, *sources)  # sources so that autograd notices when one was modified
        return computed.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        check_backward_mode()
        trail, position = ctx.trail, ctx.position
        hidden, *_ = ctx.saved_tensors
        call: Any = trail.calls[position]
        with trail.observer.rebuilding(position, 0):
            rebuilt, right = call.run_again(hidden)
        trail.observer.step_rebuilt(position, 0, rebuilt)
        with trail.observer.differentiating(position, 0):
            trail.check(call.module, right)
            gradients = rebuilt.gradients(grad)
            if grad is not None:
                call.check_gradients(0, gradients)
        return None, None, None, *trail.settle(gradients)


def _checksum(value: Tensor) -> Tensor:
    whole = torch.int16 if value.element_size() == 2 else torch.int32
    return checksum(value.contiguous().view(whole))
