"""How the layers of a model are coupled, and which options there are: what a configuration can check without the engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ENGINE_NAMES = ("autograd", "reprop", "pareprop")

DEFAULT_GRID_BITS = 12

RANGE_BITS = 12
"""Bits that a state must have for its magnitude: exactness holds at least while ``|s| < 2**RANGE_BITS``."""

SIGNIFICAND_BITS = {torch.float32: 24, torch.float64: 53}
DRIFT_BITS = SIGNIFICAND_BITS[torch.float64] - SIGNIFICAND_BITS[torch.float32]


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is coupled.

    Attributes:
        beta: 0 for a conventional layer, which stores its activations; 1 or ``2**-m`` for a reversible one.
        grid_bits: states are multiples of ``2**-grid_bits``; ``None`` leaves them unrounded.
        state_dtype: the narrowest dtype in which the states add exactly; unused in a conventional layer.
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

    @property
    def side_bits(self) -> int:
        """How many bits each update shifts out of every element of a state."""
        return 0 if self.grid_bits is None else shift_of(self.beta)


def shift_of(beta: float) -> int:
    """``m`` of ``beta = 2**-m``."""
    return -int(math.log2(beta))


def limit_of(plan: LayerPlan, dtype: torch.dtype) -> float:
    """The magnitude below which states of ``dtype`` add exactly; 0 without a grid."""
    return 0.0 if plan.grid_bits is None else 2.0 ** (SIGNIFICAND_BITS[dtype] - plan.grid_bits)


def grid_of(plan: LayerPlan) -> float:
    """The distance between two neighbouring values on the grid of ``plan``, which has one."""
    assert plan.grid_bits is not None
    return 2.0**-plan.grid_bits


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
    """Cut the layers into segments, and say in which dtype their states add exactly.

    Consecutive reversible layers form a segment, of which only the last pair of states is stored. A state on the grid
    needs ``grid_bits + RANGE_BITS`` bits; fp32 has 24 and fp64 has 53.

    Without a grid nothing is exact, and undoing an update multiplies the error by ``1 / beta``. There the states are
    fp64 below ``beta = 1``, and a segment ends (its pair is an *anchor*) before errors outgrow fp32's: when the ``m`` of
    its layers (each updates a state once) add up to more than the 29 bits that fp64 has above fp32.

    Args:
        beta: one number, or one per layer.
        num_layers: how many layers.
        grid_bits: bits after the binary point of the states; ``None`` turns the grid, and with it exactness, off.
        anchor_every: store a pair of states (an anchor) after every so many reversible layers; ``None`` stores none
            but where the absence of a grid asks for it.

    Raises:
        ValueError: an argument is out of range, or without a grid ``anchor_every`` is too long or ``beta`` too small.
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

    def drift(segment: Sequence[int]) -> int:
        return sum(shift_of(betas[i]) for i in segment) if grid_bits is None else 0

    segments: list[list[int]] = []
    for i, value in enumerate(betas):
        if value == 0:
            continue
        joins = bool(segments) and segments[-1][-1] == i - 1
        if joins and anchor_every is not None:
            joins = len(segments[-1]) < anchor_every
        elif joins:
            joins = drift([*segments[-1], i]) <= DRIFT_BITS
        if joins:
            segments[-1].append(i)
        else:
            segments.append([i])

    plans = [LayerPlan(beta=0.0) for _ in betas]
    for segment in segments:
        if drift(segment) > DRIFT_BITS:
            raise ValueError(
                f"layers {segment[0]} to {segment[-1]} at beta={[betas[i] for i in segment]} would magnify rounding errors "
                f"2**{drift(segment)} times, but fp64 has {DRIFT_BITS} bits to spare: lower anchor_every, or raise beta, or "
                "keep the grid, with which nothing is magnified."
            )
        in_fp32 = (
            drift(segment) == 0 if grid_bits is None else grid_bits + RANGE_BITS <= SIGNIFICAND_BITS[torch.float32]
        )
        for i in segment:
            plans[i] = LayerPlan(
                beta=betas[i],
                grid_bits=grid_bits,
                state_dtype=torch.float32 if in_fp32 else torch.float64,
                opens=i == segment[0],
                closes=i == segment[-1],
            )
    return tuple(plans)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_engine(name: str) -> None:
    """
    Raises:
        ValueError: there is no engine called ``name``.
    """
    if name not in ENGINE_NAMES:
        raise ValueError(f"backward_engine={name!r} is unknown: use one of {', '.join(map(repr, ENGINE_NAMES))}.")


def check_retention(layers: int, budget: str | int | float | None) -> None:
    """
    Raises:
        ValueError: one of the two is out of range, or both are given.
    """
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
        raise ValueError(f"retained_layers={layers!r} is not a number of layers: give 0 or more.")
    if budget is None:
        return
    if layers:
        raise ValueError(
            f"retained_layers={layers} and memory_budget={budget!r} exclude each other: give one of them."
        )
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        sound = budget >= 0 if isinstance(budget, int) else 0 <= budget <= 1
    else:
        sound = budget in ("auto", "gradients")
    if not sound:
        raise ValueError(
            f"memory_budget={budget!r} is not None, 'auto', 'gradients', a whole number of bytes, or a fraction of the free "
            "memory from 0.0 to 1.0."
        )
