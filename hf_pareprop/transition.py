"""A layer that changes the shape of the hidden state, as where a new stage begins, so that it cannot be reversible.

Its activations are not stored all the same: the hidden state that it read is, and the layer runs again in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coupling import checksum_of_values
from .engine import Trail
from .layer_call import LayerCall, RebuiltStep, Step, check_backward_mode, graph_of
from .memory_probe import SavedBytes


def run_steps(steps: Sequence[Step], hidden: Tensor, *inputs: Any) -> Tensor:
    """A stock layer: residuals are added back."""
    for step in steps:
        residual, branch = step(hidden, *inputs)
        hidden = residual + branch
    return hidden


class TransitionCall(LayerCall):
    """A call of such a layer. Its steps are run as one."""

    def run_forgetfully(self, hidden: Tensor, meter: SavedBytes | None = None) -> Tensor:
        """What the layer returns for a hidden state, without a graph.

        Raises:
            RuntimeError: as :meth:`LayerCall.run_undoably`.
        """
        with self._recording(meter):
            value = self._record(self._all_steps, hidden.detach().requires_grad_(hidden.requires_grad)).detach()
        self._checksum = checksum_of_values(value)
        return value

    def run_again(self, hidden: Tensor) -> tuple[RebuiltStep, Tensor]:
        """The layer with its graph, and whether it computed what it did in the forward pass: a 0-d bool."""
        assert self._checksum is not None
        value, sources = self._replay(0, self._all_steps, hidden.detach())
        right = torch.eq(checksum_of_values(value), self._checksum)
        return RebuiltStep(sources, graph_of(value), value.dtype, value), right

    def _all_steps(self, hidden: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        return run_steps(self.steps, hidden, *inputs)


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
