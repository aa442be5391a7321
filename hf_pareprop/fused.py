"""Triton kernels for an update of a state and for its inverse, each in one pass over memory.

Single operations of PyTorch take about twenty passes. The kernels compute the same bits as :mod:`coupling`: every operation
is exact, or rounds the same number as its counterpart there. Products with powers of two are exact, so it does not matter if
the compiler fuses them with additions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import widths
from .torch_private import is_fake

if TYPE_CHECKING:
    from .plan import LayerPlan

DEVICES = {"cuda"}

WIDTHS = (4, 2, 1)
"""Widths of packed side bits. With more side bits than these add up to, PyTorch's operations are used."""

ROWS = 8
"""A tensor is treated as this many rows. Elements that share a byte are then in one column, as in :mod:`packing`."""

BLOCK = 256
"""The number of columns that one program works on."""


def fits(value: Tensor, state: Tensor, plan: "LayerPlan") -> bool:
    """Whether the kernels can handle these tensors. Otherwise PyTorch's operations are used."""
    return (
        value.device.type in DEVICES
        and plan.grid_bits is not None
        and plan.side_bits <= sum(WIDTHS)
        and value.numel() % ROWS == 0
        and value.is_contiguous()
        and state.is_contiguous()
    )


def advance(
    value: Tensor, previous: Tensor, plan: "LayerPlan", peak: Tensor, keep: bool = False
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``s[i+1]`` from ``Phi_i(s[i])`` and ``s[i-1]``, which have the same shape.

    Returns:
        The state; the packed side bits of ``s[i-1]``, if ``keep``; and ``peak``, raised to those of ``Phi`` and the state.
    """
    following = torch.empty_like(previous)
    sides = {
        w: previous.new_empty(previous.numel() * w // 8, dtype=torch.uint8) for w in widths(plan.side_bits) if keep
    }
    launch(advance_kernel, value, previous, following, plan, sides, peak=peak.view(torch.int32), KEEP=keep)
    return following, list(sides.values()), peak


def retreat(value: Tensor, following: Tensor, plan: "LayerPlan", sides: Sequence[Tensor]) -> Tensor:
    """``s[i-1]`` from ``Phi_i(s[i])``, ``s[i+1]`` and the side bits that :func:`advance` kept."""
    previous = torch.empty_like(following)
    launch(retreat_kernel, value, following, previous, plan, dict(zip(widths(plan.side_bits), sides, strict=True)))
    return previous


def launch(
    kernel: Any,
    value: Tensor,
    state: Tensor,
    result: Tensor,
    plan: "LayerPlan",
    sides: dict[int, Tensor],
    **others: Tensor | bool,
) -> None:
    columns = value.numel() // ROWS
    if columns == 0 or is_fake(value):  # nothing to compute, or nothing to compute it from
        return
    buffers = (sides.get(width, result) for width in WIDTHS)  # a width without bits gets a pointer that is not used
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(columns, BLOCK),)](
            *(value, state, result, *buffers, columns),
            GRID_BITS=plan.grid_bits,
            SIDE_BITS=plan.side_bits,
            BLOCK=BLOCK,
            **others,
        )


# Sums of states may wrap around: sanitize_overflow=False switches off the overflow check of Triton's debug mode.


@triton.jit
def advance_kernel(
    value,
    previous,
    following,
    fours,
    twos,
    ones,
    columns,
    peak,
    GRID_BITS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, inside = _columns(columns, BLOCK)
    at = _rows(8) * columns + column
    # Beyond the end zeros are read, which do not raise the peak.
    scaled = _scaled(tl.load(value + at, inside, other=0.0), GRID_BITS)
    units = tl.load(previous + at, inside, other=0)
    if SIDE_BITS & 4:
        units = _shift_out(units, fours, 4, column, columns, inside, KEEP)
    if SIDE_BITS & 2:
        units = _shift_out(units, twos, 2, column, columns, inside, KEEP)
    if SIDE_BITS & 1:
        units = _shift_out(units, ones, 1, column, columns, inside, KEEP)
    units = tl.add(units, _rounded(scaled), sanitize_overflow=False)
    tl.store(following + at, units, inside)
    highest = tl.max(tl.maximum(_magnitude(scaled), _magnitude(units)))
    tl.atomic_max(peak, highest, sem="relaxed")


@triton.jit
def retreat_kernel(
    value,
    following,
    previous,
    fours,
    twos,
    ones,
    columns,
    GRID_BITS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, inside = _columns(columns, BLOCK)
    at = _rows(8) * columns + column
    scaled = _scaled(tl.load(value + at, inside, other=0.0), GRID_BITS)
    units = tl.sub(tl.load(following + at, inside, other=0), _rounded(scaled), sanitize_overflow=False)
    if SIDE_BITS & 1:
        units = _shift_in(units, ones, 1, column, columns, inside)
    if SIDE_BITS & 2:
        units = _shift_in(units, twos, 2, column, columns, inside)
    if SIDE_BITS & 4:
        units = _shift_in(units, fours, 4, column, columns, inside)
    tl.store(previous + at, units, inside)


@triton.jit
def _columns(columns, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return column, column < columns


@triton.jit
def _rows(ROWS: tl.constexpr):
    return tl.arange(0, ROWS).to(tl.int64)[:, None]


@triton.jit
def _scaled(x, GRID_BITS: tl.constexpr):
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x * 2.0**GRID_BITS


@triton.jit
def _rounded(x):
    """Round to int32, half to even. The result is 0 for a number out of range, whose conversion would be undefined."""
    floor = tl.floor(x)
    above = x - floor
    odd = floor != 2 * tl.floor(floor * 0.5)
    whole = floor + tl.where((above > 0.5) | ((above == 0.5) & odd), 1.0, 0.0)
    return tl.where(tl.abs(whole) < 2.0**31, whole, 0.0).to(tl.int32)


@triton.jit
def _magnitude(x):
    """The bits of ``|x|`` in fp32. Compared as integers they have the order of the magnitudes, and NaN is the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _shift_out(units, sides, WIDTH: tl.constexpr, column, columns, inside, KEEP: tl.constexpr):
    """Shift the last WIDTH bits out of ``units``. If ``KEEP``, store them, for 8 / WIDTH elements in a byte."""
    if KEEP:
        bits = (units & (2**WIDTH - 1)) << _places(WIDTH)
        packed = tl.sum(tl.reshape(bits, (8 // WIDTH, WIDTH, bits.shape[1])), axis=0)
        tl.store(sides + _rows(WIDTH) * columns + column, packed.to(tl.uint8), inside)
    return units >> WIDTH


@triton.jit
def _shift_in(units, sides, WIDTH: tl.constexpr, column, columns, inside):
    """The inverse of :func:`_shift_out`."""
    packed = tl.load(sides + _rows(WIDTH) * columns + column, inside).to(tl.int32)
    rows = tl.broadcast_to(packed[None, :, :], (8 // WIDTH, WIDTH, packed.shape[1]))
    bits = (tl.reshape(rows, (8, packed.shape[1])) >> _places(WIDTH)) & (2**WIDTH - 1)
    return (units << WIDTH) | bits


@triton.jit
def _places(WIDTH: tl.constexpr):
    """The position in the byte of each row's bits."""
    return (tl.arange(0, 8) // WIDTH * WIDTH)[:, None]
