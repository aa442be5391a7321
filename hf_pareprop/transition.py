"""Layers that change the shape of the hidden state, at the start of a stage for example. They cannot be reversible.

Still, the activations of such a layer are not stored. Only the hidden state that it read is stored, and the layer runs again
in the backward pass.
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
    """Run steps as the stock layer, with residual connections."""
    for step in steps:
        found = step(hidden, *inputs)
        hidden = found if isinstance(found, Tensor) else found[0] + found[1]
    return hidden


class TransitionCall(LayerCall):
    """A call of a layer that changes the shape. Its steps run as one."""

    def run_forgetfully(self, hidden: Tensor, meter: SavedBytes | None = None) -> Tensor:
        """Run the layer without a graph, and return what it returns.

        Raises:
            RuntimeError: for the same reasons as in :meth:`LayerCall.run_undoably`.
        """
        with self._recording(meter):
            value = self._record(self._all_steps, hidden.detach().requires_grad_(hidden.requires_grad)).detach()
        self._checksum = checksum_of_values(value)
        return value

    def run_again(self, hidden: Tensor) -> tuple[RebuiltStep, Tensor]:
        """Run the layer again, with its graph. Also returns whether the result is that of the forward pass, a 0-d bool."""
        assert self._checksum is not None
        value, sources = self._replay(0, self._all_steps, hidden.detach())
        right = torch.eq(checksum_of_values(value), self._checksum)
        return RebuiltStep(sources, graph_of(value), value.dtype, value), right

    def _all_steps(self, hidden: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        return run_steps(self.steps, hidden, *inputs)


class Transition(torch.autograd.Function):
    """The autograd node of a layer that changes the shape.

    Forward takes the value that the call computed, in a list, the hidden state that the call read, and the call's sources. It
    removes the value from the list, so that nothing else refers to it: hooks of other libraries may change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any, trail: Trail, position: int, computed: list[Tensor], hidden: Tensor, *sources: Tensor
    ) -> Tensor:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, *sources)  # the sources are saved so that autograd notices if one is modified
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
