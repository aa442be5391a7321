"""The reversible recurrence in fixed-point numbers, in which undoing it is exact: pure functions on tensors.

An encoder is a chain of steps. Step ``i``, an attention or an MLP sub-block, reads the state ``s[i]`` and yields a residual
``r_i`` and a branch ``f_i``. A segment opens with the same state twice, ``s[-1] = s[0]``, and ends by merging its last pair:

    s[i+1] = Phi_i(s[i]) + beta * s[i-1]            Phi_i = (1 - beta) * r_i + f_i
    s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    output = (s[n] + beta * s[n-1]) / (1 + beta)

``beta = 1`` is the coupling of RevNet (Gomez et al. 2017, arXiv 1707.04585), Rev-ViT and PaReprop (Zhu & Mangalam
2023, arXiv 2306.09342); ``beta = 0`` is the stock residual network, which cannot be undone; ``2**-m`` lies between.

Floating-point addition rounds, so the second line would not return the bits that the first line consumed. Therefore
states are int32, in units of ``2**-grid_bits``, and with ``q(x) = round(x * 2**grid_bits)``

    s[i+1] = (s[i-1] >> m) + q(Phi_i(s[i]))         kept: the low m bits of s[i-1], the side bits
    s[i-1] = ((s[i+1] - q(Phi_i(s[i]))) << m) | kept

Integer addition wraps around, so undoing it is exact for every value, depth and ``beta``. Gradients pass straight
through the rounding. What integers would hide, a NaN, an infinity or an overflow, is watched: every function that makes
a state also returns its *peak*, the largest magnitude in units of the grid, and :func:`poison` turns a bad one into NaN.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .packing import pack, unpack, widths
from .plan import LIMIT_BITS, LayerPlan
from .torch_private import is_fake, transforming

try:
    from .fused import advance as fused_advance
    from .fused import fits
    from .fused import retreat as fused_retreat
except ModuleNotFoundError:  # builds of PyTorch without CUDA come without Triton

    def fits(value: Tensor, state: Tensor, plan: LayerPlan) -> bool:
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a step reads its state: at least fp32, so that the residual is not squeezed into bf16."""
    return torch.promote_types(torch.float32, dtype)


def encode(x: Tensor, grid_bits: int | None) -> tuple[Tensor, Tensor]:
    """A float tensor of any shape as a state, in new memory and row order, and its peak."""
    x = x.to(compute_dtype(x.dtype), copy=grid_bits is None).contiguous()
    if grid_bits is None:
        return x, torch.zeros((), device=x.device)
    scaled = torch.mul(x, 2.0**grid_bits)
    peak = peak_of(scaled)
    return _rounded(scaled), peak


def decode(state: Tensor, grid_bits: int | None, dtype: torch.dtype) -> Tensor:
    """A state as a step of compute dtype ``dtype`` reads it: at least fp32, in new memory."""
    dtype = compute_dtype(dtype)
    return state.to(dtype, copy=True) if grid_bits is None else state.to(dtype).mul_(2.0**-grid_bits)


def phi(residual: Tensor, branch: Tensor, beta: float) -> Tensor:
    """``Phi = (1 - beta) * r + f``, at least fp32."""
    dtype = compute_dtype(torch.promote_types(residual.dtype, branch.dtype))
    if beta == 1:
        return branch.to(dtype)
    return torch.add(branch.to(dtype), residual.to(dtype), alpha=1 - beta)


def advance(
    value: Tensor, previous: Tensor, plan: LayerPlan, keep: bool = False
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``s[i+1]`` from ``Phi_i(s[i])`` and ``s[i-1]``, without a graph.

    Returns:
        The state; to ``keep``, the packed side bits of ``s[i-1]``; and the peak of ``Phi`` and of the state.
    """
    if plan.grid_bits is None:
        return torch.add(value, previous, alpha=plan.beta), [], torch.zeros((), device=value.device)
    if runs_fused(value, previous, plan):
        return fused_advance(value, previous, plan, keep)
    return advance_in_passes(value, previous, plan, keep)


def retreat(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor]) -> Tensor:
    """``s[i-1]`` from ``Phi_i(s[i])``, ``s[i+1]`` and the side bits: the inverse of :func:`advance`, without a graph."""
    if runs_fused(value, following, plan):
        return fused_retreat(value, following, plan, sides)
    return retreat_in_passes(value, following, plan, sides)


# New memory costs more time than arithmetic on a CPU, so these write over what they computed last.


def advance_in_passes(
    value: Tensor, previous: Tensor, plan: LayerPlan, keep: bool = False
) -> tuple[Tensor, list[Tensor], Tensor]:
    """:func:`advance` by PyTorch's operations."""
    assert plan.grid_bits is not None
    scaled = torch.mul(value, 2.0**plan.grid_bits)
    peak = peak_of(scaled)
    units = _rounded(scaled)
    del scaled
    sides, shift = [], 0
    for width in widths(plan.side_bits) if keep else ():
        bits = torch.bitwise_right_shift(previous, shift) if shift else previous
        # The last byte of a number is all that a conversion to uint8 leaves of it.
        sides.append(pack(bits.to(torch.uint8).bitwise_and_(2**width - 1), width))
        shift += width
    units.add_(torch.bitwise_right_shift(previous, plan.side_bits) if plan.side_bits else previous)
    return units, sides, torch.maximum(peak, peak_of(units))


def retreat_in_passes(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor]) -> Tensor:
    """:func:`retreat` by PyTorch's operations."""
    assert plan.grid_bits is not None
    units = _rounded(torch.mul(value, 2.0**plan.grid_bits))
    torch.sub(following, units, out=units)
    if plan.side_bits:
        units.bitwise_left_shift_(plan.side_bits)
    shift = 0
    for width, packed in zip(widths(plan.side_bits), sides, strict=True):
        bits = unpack(packed, width, units.shape).to(torch.int32)
        units.bitwise_or_(bits.bitwise_left_shift_(shift) if shift else bits)
        shift += width
    return units


def peak_of(units: Tensor) -> Tensor:
    """The largest magnitude, as a 0-d fp32 tensor; NaN if there is one."""
    if not units.numel():
        return torch.zeros((), device=units.device)
    # Two reductions take less time than aminmax on a CPU.
    return torch.maximum(torch.amax(units).float(), -torch.amin(units).float())


def _rounded(scaled: Tensor) -> Tensor:
    """``scaled``, which is overwritten, as whole numbers."""
    scaled.round_()
    if scaled.dtype != torch.float32 or transforming():
        return scaled.to(torch.int32)
    return scaled.view(torch.int32).copy_(scaled)


def poison(peak: Tensor) -> Tensor:
    """0; or NaN where ``peak`` is not finite or so large that a state may have wrapped around."""
    return torch.where(peak < 2.0**LIMIT_BITS, 0.0, torch.nan)


def checksum(*states: Tensor) -> Tensor:
    """One int64 number that tells states from others that were rebuilt with other bits.

    Rows (the last dimension) are summed, wrapping around in 32 bits, and weighted by odd factors of their own: states with
    rows in another order have another sum.
    """
    rows = torch.stack([state.sum(-1, dtype=torch.int32) for state in states]).flatten().long()
    factors = torch.arange(1, 2 * rows.numel(), 2, device=rows.device).mul_(0x9E3779B1)
    return torch.sum(factors.mul_(rows))  # CUDA has no dot product of integers


def checksum_of_values(values: Tensor) -> Tensor:
    """:func:`checksum` of the bits of floats."""
    values = values.detach().contiguous()
    return checksum(values.view(torch.int16 if values.element_size() == 2 else torch.int32))


class _Through(torch.autograd.Function):
    """``state``, decoded, as if computed by ``sum(scale * source)``: gradients pass straight through the rounding."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, grid_bits: int | None, dtype: torch.dtype, scales: list[float], *sources: Tensor
    ):
        ctx.scales, ctx.dtypes = scales, [source.dtype for source in sources]
        ctx.set_materialize_grads(False)
        return decode(state, grid_bits, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * (4 + len(ctx.scales))
        grads = ((grad if s == 1 else grad * s).to(d) for s, d in zip(ctx.scales, ctx.dtypes, strict=True))
        return None, None, None, None, *grads


def straight_through(state: Tensor, grid_bits: int | None, dtype: torch.dtype, *terms: tuple[float, Tensor]) -> Tensor:
    """``state`` decoded, with the gradients of the sum of ``terms``, each a factor and a tensor."""
    if transforming():  # torch.func and torch.jit.trace do not take autograd Functions; x - x is an exact 0
        total = torch.stack([source * scale for scale, source in terms]).sum(0)
        return decode(state, grid_bits, dtype) + (total - total.detach())
    return _Through.apply(state, grid_bits, dtype, [scale for scale, _ in terms], *(source for _, source in terms))


def merge_pair(previous: Tensor, current: Tensor, beta: float) -> Tensor:
    """The output ``(s[n] + beta * s[n-1]) / (1 + beta)`` of a decoded pair of states."""
    return torch.add(current, previous, alpha=beta) / (1 + beta)


def runs_fused(value: Tensor, state: Tensor, plan: LayerPlan) -> bool:
    """Whether an update of ``state`` and its inverse run as one kernel each: on CUDA, where those prove their bits."""
    if not fits(value, state, plan):
        return False
    return is_fake(value) or fused_are_exact(value.device, value.dtype, plan)


@cache
def fused_are_exact(device: torch.device, value_dtype: torch.dtype, plan: LayerPlan) -> bool:
    """Try the kernels once, on random numbers, against the operations that they replace; warn if they do not agree."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 1000, generator=generator).to(device, value_dtype)
    state, _ = encode(torch.randn(8, 1000, generator=generator).to(device), plan.grid_bits)
    following, sides, peak = advance_in_passes(value, state, plan, keep=True)
    try:
        found, kept, highest = fused_advance(value, state, plan, keep=True)
        undone = fused_retreat(value, found, plan, kept)
        same = zip((found, undone, highest, *kept), (following, state, peak, *sides), strict=True)
        trouble = "" if all(torch.equal(a, b) for a, b in same) else "other bits"
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
