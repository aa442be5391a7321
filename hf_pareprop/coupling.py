"""The reversible recurrence in fixed-point numbers, where it can be undone exactly: pure functions on tensors.

An encoder is a chain of steps. Step ``i``, an attention or an MLP sub-block, reads the state ``s[i]`` and yields a residual
``r_i`` and a branch ``f_i``. A segment is a run of reversible layers. It begins with the same state twice, ``s[-1] = s[0]``,
and ends by merging its last two states into the output:

    s[i+1] = Phi_i(s[i]) + beta * s[i-1]            Phi_i = (1 - beta) * r_i + f_i
    s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    output = (s[n] + beta * s[n-1]) / (1 + beta)

``beta = 1`` is the coupling of RevNet (Gomez et al. 2017, arXiv 1707.04585), Rev-ViT and PaReprop (Zhu & Mangalam
2023, arXiv 2306.09342). ``beta = 0`` is the stock residual network, which cannot be undone. ``beta = 2**-m`` lies between.

Floating-point addition rounds, so the second line would not return exactly the bits that the first line read. Therefore
states are int32, in units of ``2**-grid_bits`` (the grid). With ``q(x) = round(x * 2**grid_bits)`` the recurrence is

    s[i+1] = (s[i-1] >> m) + q(Phi_i(s[i]))         kept: the low m bits of s[i-1], the side bits
    s[i-1] = ((s[i+1] - q(Phi_i(s[i]))) << m) | kept

Integer addition wraps around, so it can be undone exactly for every value, depth and ``beta``. Gradients ignore the
rounding. Integers would hide a NaN, an infinity or an overflow, so these are tracked: every function that makes a state
also returns its *peak*, the largest magnitude in units of the grid, and :func:`poison` turns a bad peak into NaN.
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
except ModuleNotFoundError:  # builds of PyTorch without CUDA do not include Triton

    def fits(value: Tensor, state: Tensor, plan: LayerPlan) -> bool:
        return False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a step reads its state: at least fp32, so that the residual is not rounded to bf16."""
    return dtype if dtype == torch.float64 else torch.float32


def encode(x: Tensor, grid_bits: int | None) -> tuple[Tensor, Tensor]:
    """Convert a float tensor of any shape to a state, in new contiguous memory. Returns the state and its peak."""
    x = x.to(compute_dtype(x.dtype), copy=grid_bits is None).contiguous()
    if grid_bits is None:
        return x, torch.zeros((), device=x.device)
    scaled = torch.mul(x, 2.0**grid_bits)
    peak = peak_of(scaled)
    return _rounded(scaled), peak


def decode(state: Tensor, grid_bits: int | None, dtype: torch.dtype) -> Tensor:
    """Convert a state to floats for a step of compute dtype ``dtype``: at least fp32, in new memory."""
    dtype = compute_dtype(dtype)
    if grid_bits is None:
        return state.to(dtype, copy=True)
    if state.is_cuda and dtype == torch.get_default_dtype():
        # The product converts integers to the default dtype, in one pass. On a CPU that would take five times as long.
        return torch.mul(state, 2.0**-grid_bits)
    return state.to(dtype).mul_(2.0**-grid_bits)


def phi(residual: Tensor, branch: Tensor, beta: float) -> Tensor:
    """``Phi = (1 - beta) * r + f``. If ``beta`` is 1 this is the branch itself; otherwise it is at least fp32."""
    if beta == 1:
        return branch
    # The sum converts its inputs while it reads them, so a bf16 branch is not first copied to fp32.
    return torch.add(branch, residual.to(compute_dtype(residual.dtype)), alpha=1 - beta)


def phi_of_layer(state: Tensor, after: Tensor, beta: float) -> Tensor:
    """``Phi = L(s) - beta * s`` of a whole layer ``L``, at least fp32.

    Args:
        state: ``s``, at least fp32.
        after: ``L(s)``, what the stock layer makes of it.
    """
    return torch.sub(after, state, alpha=beta)


def advance(
    value: Tensor, previous: Tensor, plan: LayerPlan, peak: Tensor, keep: bool = False
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``s[i+1]`` from ``Phi_i(s[i])`` and ``s[i-1]``, without a graph.

    Args:
        value: ``Phi``, of any floating-point dtype.
        plan: the coupling of the layer.
        peak: the peak of everything computed before; it may be overwritten.
        keep: whether to return the side bits.

    Returns:
        The state; the packed side bits of ``s[i-1]``, if ``keep``; and ``peak``, raised to those of ``Phi`` and the state.
    """
    if plan.grid_bits is None:
        return torch.add(value, previous, alpha=plan.beta), [], peak
    if runs_fused(value, previous, plan):
        return fused_advance(value, previous, plan, peak, keep)
    return advance_in_passes(value, previous, plan, peak, keep)


def retreat(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor]) -> Tensor:
    """``s[i-1]`` from ``Phi_i(s[i])``, ``s[i+1]`` and the side bits: the inverse of :func:`advance`, without a graph."""
    if runs_fused(value, following, plan):
        return fused_retreat(value, following, plan, sides)
    return retreat_in_passes(value, following, plan, sides)


# On a CPU new memory costs more time than arithmetic, so the next functions overwrite their intermediate results.


def advance_in_passes(
    value: Tensor, previous: Tensor, plan: LayerPlan, peak: Tensor, keep: bool = False
) -> tuple[Tensor, list[Tensor], Tensor]:
    """:func:`advance` with single operations of PyTorch."""
    assert plan.grid_bits is not None
    scaled = _scaled(value, plan.grid_bits)
    peak = torch.maximum(peak, peak_of(scaled))
    units = _rounded(scaled)
    del scaled
    sides, shift = [], 0
    for width in widths(plan.side_bits) if keep else ():
        bits = torch.bitwise_right_shift(previous, shift) if shift else previous
        # A conversion to uint8 keeps the last byte of a number.
        sides.append(pack(bits.to(torch.uint8).bitwise_and_(2**width - 1), width))
        shift += width
    units.add_(torch.bitwise_right_shift(previous, plan.side_bits) if plan.side_bits else previous)
    return units, sides, torch.maximum(peak, peak_of(units))


def retreat_in_passes(value: Tensor, following: Tensor, plan: LayerPlan, sides: Sequence[Tensor]) -> Tensor:
    """:func:`retreat` with single operations of PyTorch."""
    assert plan.grid_bits is not None
    units = _rounded(_scaled(value, plan.grid_bits))
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
    """The largest magnitude, as a 0-d fp32 tensor; NaN if any element is NaN."""
    if not units.numel():
        return torch.zeros((), device=units.device)
    # Two reductions take less time than aminmax on a CPU.
    return torch.maximum(torch.amax(units).float(), -torch.amin(units).float())


def _scaled(value: Tensor, grid_bits: int) -> Tensor:
    """A floating-point tensor converted to units of the grid, in new memory, at least fp32."""
    dtype = compute_dtype(value.dtype)
    return torch.mul(value, 2.0**grid_bits) if value.dtype == dtype else value.to(dtype).mul_(2.0**grid_bits)


def _rounded(scaled: Tensor) -> Tensor:
    """``scaled`` rounded to whole numbers. It is overwritten."""
    scaled.round_()
    if scaled.dtype != torch.float32 or transforming():
        return scaled.to(torch.int32)
    return scaled.view(torch.int32).copy_(scaled)


def poison(peak: Tensor) -> Tensor:
    """0, or NaN if ``peak`` is not finite or is so large that a state may have wrapped around."""
    return torch.where(peak < 2.0**LIMIT_BITS, 0.0, torch.nan)


def checksum(*states: Tensor) -> Tensor:
    """One int64 number by which states can be told from states that were rebuilt with other bits.

    Each row (the last dimension) is summed in 32 bits, which wrap around. The result is the sum of all prefix sums of these
    row sums. That weights every row by its place, so states with rows in another order have another checksum.
    """
    rows = [state.sum(-1, dtype=torch.int32).flatten() for state in states]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).cumsum(0, dtype=torch.int64).sum()


def checksum_of_values(values: Tensor) -> Tensor:
    """:func:`checksum` of a floating-point tensor, computed from its bits."""
    values = values.detach().contiguous()
    return checksum(values.view(torch.int16 if values.element_size() == 2 else torch.int32))


class _Through(torch.autograd.Function):
    """``state`` decoded, with the gradients of ``sum(scale * source)``: they pass through the rounding unchanged."""

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
    """``state`` decoded, with the gradients of the sum of ``terms``. Each term is a factor and a tensor."""
    if transforming():  # torch.func and torch.jit.trace do not support this autograd Function; x - x is exactly 0
        total = torch.stack([source * scale for scale, source in terms]).sum(0)
        return decode(state, grid_bits, dtype) + (total - total.detach())
    return _Through.apply(state, grid_bits, dtype, [scale for scale, _ in terms], *(source for _, source in terms))


def merge_pair(previous: Tensor, current: Tensor, beta: float) -> Tensor:
    """The output ``(s[n] + beta * s[n-1]) / (1 + beta)`` of a decoded pair of states."""
    return torch.add(current, previous, alpha=beta) / (1 + beta)


def runs_fused(value: Tensor, state: Tensor, plan: LayerPlan) -> bool:
    """Whether an update of ``state`` and its inverse run as one kernel each: on CUDA, if the kernels pass their test."""
    if not fits(value, state, plan):
        return False
    return is_fake(value) or fused_are_exact(value.device, value.dtype, plan)


@cache
def fused_are_exact(device: torch.device, value_dtype: torch.dtype, plan: LayerPlan) -> bool:
    """Compare the kernels once, on random numbers, with the operations that they replace. Warn if they do not agree."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 1000, generator=generator).to(device, value_dtype)
    state, _ = encode(torch.randn(8, 1000, generator=generator).to(device), plan.grid_bits)
    none = torch.zeros((), device=device)
    following, sides, peak = advance_in_passes(value, state, plan, none, keep=True)
    try:
        found, kept, highest = fused_advance(value, state, plan, none, keep=True)
        undone = fused_retreat(value, found, plan, kept)
        same = zip((found, undone, highest, *kept), (following, state, peak, *sides), strict=True)
        trouble = "" if all(torch.equal(a, b) for a, b in same) else "other bits"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: Triton needs a C compiler, a driver and a GPU that it supports
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(
            f"hf_pareprop's Triton kernels do not work on {device} ({trouble}): states are updated by PyTorch's operations "
            "instead. The results are the same, but training is slower.",
            stacklevel=2,
        )
    return not trouble
