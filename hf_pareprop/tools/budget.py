"""The bit budget of a model in words."""

import math
from collections.abc import Sequence

from ..coupling import RANGE_BITS, SIGNIFICAND_BITS, LayerPlan


def bit_budget(plans: Sequence[LayerPlan]) -> list[str]:
    """One line per run of layers that are coupled alike: which, how, and how many bits of state they need."""
    lines, first = [], 0
    for i, plan in enumerate(plans):
        ends = plan.closes if plan.reversible else i == len(plans) - 1 or plans[i + 1].reversible
        if ends:
            run = plans[first : i + 1]
            lines.append(
                f"layers {first}-{i}: " + (_segment(run) if plan.reversible else "conventional, activations stored")
            )
            first = i + 1
    return lines


def _segment(plans: Sequence[LayerPlan]) -> str:
    betas = ", ".join(dict.fromkeys(f"{plan.beta:g}" for plan in plans))
    grid_bits, dtype = plans[0].grid_bits, plans[0].state_dtype
    states = f"{str(dtype).removeprefix('torch.')} states, one pair stored"
    if grid_bits is None:
        return f"reversible, beta {betas}, no grid (states drift), {states}"
    needed = grid_bits + RANGE_BITS - sum(int(math.log2(plan.beta)) for plan in plans)
    return f"reversible, beta {betas}, {needed} of {SIGNIFICAND_BITS[dtype]} bits, {states}"
