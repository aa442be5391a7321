"""The reversible recurrence and the grid that makes undoing it exact: pure functions on tensors.

An encoder is a chain of steps; step ``i`` (an attention or an MLP sub-block) reads the state ``s[i]`` and yields a
residual ``r_i`` and a branch ``f_i``. With ``s[-1] = s[0] =`` the embeddings,

    s[i+1] = Phi_i(s[i]) + beta * s[i-1]            Phi_i = (1 - beta) * r_i + f_i
    s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    output = (s[n] + beta * s[n-1]) / (1 + beta)

``beta = 1`` is the coupling of RevNet (Gomez et al. 2017, arXiv 1707.04585), Rev-ViT and PaReprop (Zhu & Mangalam
2023, arXiv 2306.09342); ``beta = 0`` is the stock residual network, which cannot be undone; ``2**-m`` lies between.

Floating-point addition rounds, so the second line would not return the bits that the first line consumed. Every
``Phi`` is therefore rounded to a grid (multiples of ``2**-grid_bits``, straight-through gradient), and the states are
wide enough that no addition rounds: each update at ``beta = 2**-m`` appends ``m`` bits to a state, and
:func:`plan_layers` counts them against the significand of the state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_GRID_BITS = 12

RANGE_BITS = 12
"""Bits kept for the magnitude of a state: exactness holds while ``|s| < 2**RANGE_BITS``."""

SIGNIFICAND_BITS = {torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is coupled.

    Attributes:
        beta: 0 for a conventional layer, which stores its activations; 1 or ``2**-m`` for a reversible one.
        grid_bits: ``Phi`` is rounded to multiples of ``2**-grid_bits``; ``None`` leaves it unrounded.
        state_dtype: the narrowest dtype in which the segment's states add exactly; unused in a conventional layer.
        opens: whether the layer is the first of a segment, where the pair of states is put on the grid.
        closes: whether it is the last, where the pair is stored and the backward pass starts rebuilding.
    """

    beta: float
    grid_bits: int | None = None
    state_dtype: torch.dtype = torch.float32
    opens: bool = False
    closes: bool = False

    @property
    def reversible(self) -> bool:
        return self.beta > 0


def betas_per_layer(beta: float | Sequence[float], num_layers: int) -> tuple[float, ...]:
    """``beta`` as one float per layer.

    Raises:
        ValueError: a value is not 0, 1 or ``2**-m``, or a list does not have ``num_layers`` entries.
    """
    if isinstance(beta, (list, tuple)):
        if len(beta) != num_layers:
            raise ValueError(
                f"beta has {len(beta)} entries but the model has {num_layers} layers: give one number for all layers "
                "or a list with one per layer."
            )
        betas = beta
    else:
        betas = [beta] * num_layers
    for value in betas:
        # frexp gives a mantissa of exactly 0.5 for powers of two: only those divide without rounding.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value == 0 or (0 < value <= 1 and math.frexp(value)[0] == 0.5)):
            raise ValueError(
                f"beta={value!r} is not 0, 1 or a negative power of two: use 1 (RevNet coupling), 0.5, 0.25, 0.125, … "
                "(close to the stock model) or 0 (a conventional layer that stores its activations)."
            )
    return tuple(float(value) for value in betas)


def plan_layers(
    beta: float | Sequence[float],
    num_layers: int,
    grid_bits: int | None = DEFAULT_GRID_BITS,
    anchor_every: int | None = None,
) -> tuple[LayerPlan, ...]:
    """Cut the layers into segments whose states add exactly, and say where pairs of states are stored.

    Consecutive reversible layers form a segment. A segment needs ``grid_bits + RANGE_BITS`` bits plus ``m`` for every
    layer at ``beta = 2**-m`` (a layer updates each state of the pair once); fp32 has 24 bits and fp64 has 53.

    Args:
        beta: one number, or one per layer.
        num_layers: how many layers.
        grid_bits: bits after the binary point kept in ``Phi``; ``None`` turns the grid, and with it exactness, off.
        anchor_every: store a pair of states (an *anchor*) after every so many reversible layers; ``None`` stores one
            only where the bit budget asks for it.

    Raises:
        ValueError: an argument is out of range, or ``anchor_every`` is longer than the bit budget allows.
    """
    betas = betas_per_layer(beta, num_layers)
    widest = SIGNIFICAND_BITS[torch.float64]
    if grid_bits is not None and not (_is_int(grid_bits) and 1 <= grid_bits <= widest - RANGE_BITS):
        raise ValueError(
            f"grid_bits={grid_bits!r} is not a whole number from 1 to {widest - RANGE_BITS}: keep the default of 12, "
            "or pass None to turn the grid off (rebuilt states then drift)."
        )
    if anchor_every is not None and not (_is_int(anchor_every) and anchor_every >= 1):
        raise ValueError(f"anchor_every={anchor_every!r} is not a whole number of layers: use 1 or more, or None.")

    # Without a grid the drift is multiplied by 1/beta at every update, so segments are kept as short as with one.
    kept = DEFAULT_GRID_BITS if grid_bits is None else grid_bits

    def bits(segment: Sequence[int]) -> int:
        return kept + RANGE_BITS + sum(-int(math.log2(betas[i])) for i in segment)

    segments: list[list[int]] = []
    for i, value in enumerate(betas):
        if value == 0:
            continue
        joins = bool(segments) and segments[-1][-1] == i - 1
        if joins and anchor_every is not None:
            joins = len(segments[-1]) < anchor_every
        elif joins:
            joins = bits([*segments[-1], i]) <= widest
        if joins:
            segments[-1].append(i)
        else:
            segments.append([i])

    plans = [LayerPlan(beta=0.0) for _ in betas]
    for segment in segments:
        if bits(segment) > widest:
            raise ValueError(
                f"layers {segment[0]} to {segment[-1]} need {bits(segment)} bits of state ({kept} for the grid, "
                f"{RANGE_BITS} for the range, and {bits(segment) - kept - RANGE_BITS} appended by "
                f"beta={[betas[i] for i in segment]}) but fp64 has {widest}: lower anchor_every, or raise beta, or leave "
                "anchor_every=None to have anchors placed where they are needed."
            )
        all_rev = all(betas[i] == 1 for i in segment)
        narrow = all_rev and bits(segment) <= SIGNIFICAND_BITS[torch.float32]
        for i in segment:
            plans[i] = LayerPlan(
                beta=betas[i],
                grid_bits=grid_bits,
                state_dtype=torch.float32 if narrow else torch.float64,
                opens=i == segment[0],
                closes=i == segment[-1],
            )
    return tuple(plans)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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


def advance(value: Tensor, previous: Tensor, plan: LayerPlan) -> Tensor:
    """``s[i+1]`` from ``Phi_i(s[i])`` and ``s[i-1]``."""
    return torch.add(round_to_grid(value, plan.grid_bits), previous, alpha=plan.beta)


def retreat(value: Tensor, following: Tensor, plan: LayerPlan) -> Tensor:
    """``s[i-1]`` from ``Phi_i(s[i])`` and ``s[i+1]``: the inverse of :func:`advance`."""
    previous = torch.sub(following, round_to_grid(value, plan.grid_bits))
    return previous if plan.beta == 1 else previous.div_(plan.beta)


def fuse(previous: Tensor, current: Tensor, beta: float) -> Tensor:
    """The output ``(s[n] + beta * s[n-1]) / (1 + beta)`` of a pair of states."""
    return current if beta == 0 else torch.add(current, previous, alpha=beta) / (1 + beta)
