"""The reversible recurrence and the grid that makes undoing it exact: pure functions on tensors.

An encoder is a chain of steps; step ``i`` (an attention or an MLP sub-block) reads the state ``s[i]`` and yields a
residual ``r_i`` and a branch ``f_i``. With ``s[-1] = s[0] =`` the embeddings,

    s[i+1] = Phi_i(s[i]) + beta * s[i-1]            Phi_i = (1 - beta) * r_i + f_i
    s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    output = (s[n] + beta * s[n-1]) / (1 + beta)

``beta = 1`` is the coupling of RevNet (Gomez et al. 2017, arXiv 1707.04585), Rev-ViT and PaReprop (Zhu & Mangalam
2023, arXiv 2306.09342); ``beta = 0`` is the stock residual network, which cannot be undone; ``2**-m`` lies between.

Floating-point addition rounds, so the second line would not return the bits that the first line consumed. Therefore
every ``Phi`` is rounded to a grid, multiples of ``2**-grid_bits``, and so is ``beta * s[i-1]`` (both with
straight-through gradients): all states lie on the grid, and sums of its multiples do not round while they are in range.
What ``beta = 2**-m`` shifts below the grid are the last ``m`` bits of ``s[i-1]``: the *side bits*, which are kept,
packed, until the step is undone.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .packing import pack, unpack, widths
from .plan import LayerPlan, grid_of

try:
    from .fused import advance as fused_advance
    from .fused import fits
    from .fused import retreat as fused_retreat
except ModuleNotFoundError:  # builds of PyTorch without CUDA come without Triton

    def fits(value: Tensor, state: Tensor, plan: "LayerPlan") -> bool:
        return False


class _Round(torch.autograd.Function):
    """Round to the grid; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        return torch.mul(x, 2.0**bits).round_().mul_(2.0**-bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def round_to_grid(x: Tensor, bits: int | None) -> Tensor:
    """``x`` rounded to multiples of ``2**-bits`` (half to even), any shape; scaling by a power of two is exact."""
    return x if bits is None else _Round.apply(x, bits)


def enter(state: Tensor, plan: LayerPlan) -> Tensor:
    """``state`` as the first of a segment: in the segment's dtype and on its grid."""
    dtype = torch.promote_types(plan.state_dtype, state.dtype)
    # An autograd node of its own, so that gradients of the two states of a pair are summed in one order everywhere.
    state = state.to(dtype) if dtype != state.dtype else state.view_as(state)
    return round_to_grid(state, plan.grid_bits)


def read(state: Tensor, dtype: torch.dtype) -> Tensor:
    """``state`` as a step sees it: at least fp32, so that the residual is not squeezed into bf16.

    One autograd node even where nothing is cast: a state must receive one gradient from the step that reads it.
    """
    dtype = torch.promote_types(torch.float32, dtype)
    return state.to(dtype) if dtype != state.dtype else state.view_as(state)


def phi(residual: Tensor, branch: Tensor, beta: float) -> Tensor:
    """``Phi = (1 - beta) * r + f`` before rounding, at least fp32."""
    dtype = torch.promote_types(torch.promote_types(residual.dtype, branch.dtype), torch.float32)
    if beta == 1:
        return branch.to(dtype)
    return torch.add(branch.to(dtype), residual.to(dtype), alpha=1 - beta)


class _Advance(torch.autograd.Function):
    """``Phi`` and ``beta * s[i-1]``, each cut to the grid, added; the gradients pass straight through the cutting."""

    @staticmethod
    def forward(ctx, value: Tensor, previous: Tensor, plan: LayerPlan) -> Tensor:
        ctx.beta = plan.beta
        if runs_fused(value, previous, plan):
            return fused_advance(value, previous, plan)[0]
        if not plan.side_bits:
            return _add_rounded(previous, value, plan, 1)
        return _land(torch.mul(previous, plan.beta / grid_of(plan)).floor_(), value, plan)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad if ctx.beta == 1 else grad * ctx.beta, None


def advance(value: Tensor, previous: Tensor, plan: LayerPlan) -> Tensor:
    """``s[i+1]`` from ``Phi_i(s[i])`` and ``s[i-1]``."""
    if plan.grid_bits is None:
        return torch.add(value, previous, alpha=plan.beta)
    return _Advance.apply(value, previous, plan)


def advance_undoably(value: Tensor, previous: Tensor, plan: LayerPlan) -> tuple[Tensor, list[Tensor]]:
    """:func:`advance`, without a graph, and the side bits: what of ``s[i-1]`` is shifted below the grid, packed."""
    if plan.grid_bits is None:
        return advance(value, previous, plan), []
    if runs_fused(value, previous, plan):
        return fused_advance(value, previous, plan, keep=True)
    return advance_in_passes(value, previous, plan)


def retreat(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor] = ()) -> Tensor:
    """``s[i-1]`` from ``Phi_i(s[i])``, ``s[i+1]`` and the side bits: the inverse of :func:`advance`, without a graph."""
    if plan.grid_bits is None:
        previous = torch.sub(following, value)
        return previous if plan.beta == 1 else previous.div_(plan.beta)
    if runs_fused(value, following, plan):
        return fused_retreat(value, following, plan, sides)
    return retreat_in_passes(value, following, plan, sides)


def runs_fused(value: Tensor, state: Tensor, plan: LayerPlan) -> bool:
    """Whether an update of ``state`` and its inverse run as one kernel each: on CUDA, where those prove their bits."""
    if not fits(value, state, plan):
        return False
    return isinstance(value, FakeTensor) or fused_are_exact(
        value.device, value.dtype, state.dtype, plan.beta, plan.grid_bits
    )


@cache
def fused_are_exact(
    device: torch.device, value_dtype: torch.dtype, state_dtype: torch.dtype, beta: float, grid_bits: int
) -> bool:
    """Try the kernels once, on random numbers, against the operations that they replace; warn if they do not agree."""
    plan = LayerPlan(beta, grid_bits, state_dtype)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 1000, generator=generator).to(device, value_dtype)
    state = enter(torch.randn(8, 1000, generator=generator).to(device, state_dtype), plan)
    following, sides = advance_in_passes(value, state, plan)
    try:
        found, kept = fused_advance(value, state, plan, keep=True)
        undone = fused_retreat(value, found, plan, kept)
        trouble = "" if all(map(torch.equal, (found, undone, *kept), (following, state, *sides))) else "other bits"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: Triton needs a C compiler, a driver, a GPU that it knows
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(
            f"hf_pareprop's Triton kernels do not work on {device} ({trouble}): states are updated by PyTorch's operations, "
            "with the same results, slower.",
            stacklevel=2,
        )
    return not trouble


# New memory costs more time than arithmetic on a CPU, so these write over what they computed last.


def advance_in_passes(value: Tensor, previous: Tensor, plan: LayerPlan) -> tuple[Tensor, list[Tensor]]:
    """:func:`advance_undoably` by PyTorch's operations."""
    if not plan.side_bits:
        return _add_rounded(previous, value, plan, 1), []
    units, sides = torch.mul(previous, 1 / grid_of(plan)), []
    for width in widths(plan.side_bits):
        kept = torch.mul(units, 2.0**-width).floor_()
        sides.append(pack(units.sub_(kept, alpha=2**width).to(torch.uint8), width))
        units = kept
    return _land(units, value, plan), sides


def retreat_in_passes(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor]) -> Tensor:
    """:func:`retreat` by PyTorch's operations."""
    previous = _add_rounded(following, value, plan, -1)
    for width, packed in zip(reversed(widths(plan.side_bits)), reversed(sides), strict=True):
        previous.mul_(2.0**width).add_(unpack(packed, width, previous.shape), alpha=grid_of(plan))
    return previous


def _add_rounded(state: Tensor, value: Tensor, plan: LayerPlan, sign: int) -> Tensor:
    """``state`` plus or minus ``value`` rounded to the grid; the rounded value is exact in units of the grid."""
    units = torch.mul(value, 1 / grid_of(plan)).round_().to(state.dtype)
    return torch.add(state, units, alpha=sign * grid_of(plan), out=units)


def _land(units: Tensor, value: Tensor, plan: LayerPlan) -> Tensor:
    """``units`` of the grid, which are overwritten, plus ``value`` rounded to it."""
    return units.add_(torch.mul(value, 1 / grid_of(plan)).round_()).mul_(grid_of(plan))


def merge_pair(previous: Tensor, current: Tensor, beta: float) -> Tensor:
    """The output ``(s[n] + beta * s[n-1]) / (1 + beta)`` of a pair of states."""
    return current if beta == 0 else torch.add(current, previous, alpha=beta) / (1 + beta)
