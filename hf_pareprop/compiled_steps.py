"""``Phi`` of a step as compiled code. All layers of a kind share it, in the forward pass and in rebuilds.

Every layer passes its steps as function objects of its own, but these have the same code. So PyTorch compiles each kind of
step once, in the first layer, and compile time does not grow with depth. Compiled code draws other random numbers for dropout
than the single operations do, and it rounds differently. But every engine runs it, so gradients are the same in all engines.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from .coupling import phi, phi_of_layer
from .torch_private import compile_for_each_shape


def phi_of_step(
    step: Callable[..., tuple[Tensor, Tensor] | Tensor], state: Tensor, inputs: tuple[Any, ...], beta: float
) -> Tensor:
    """``Phi`` of a step, from what the step returns: a residual and a branch, or the output of a whole layer."""
    found = step(state, *inputs)
    if isinstance(found, Tensor):
        return phi_of_layer(state, found, beta)
    return phi(*found, beta)


@cache
def compiled_phi_of_step() -> Callable[..., Tensor]:
    """:func:`phi_of_step`, compiled."""
    return compile_for_each_shape(phi_of_step)
