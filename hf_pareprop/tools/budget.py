"""The bit budget of a model in words."""

from collections.abc import Sequence

from ..plan import SIGNIFICAND_BITS, LayerPlan


def bit_budget(plans: Sequence[LayerPlan]) -> list[str]:
    """One line per run of layers that are coupled alike: which, how, how many bits before and after the point states have,
    and what is kept."""
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
    name = str(dtype).removeprefix("torch.")
    if grid_bits is None:
        return f"reversible, beta {betas}, no grid (states drift), {name} states, one pair stored"
    whole = SIGNIFICAND_BITS[dtype] - grid_bits
    kept = ", ".join(dict.fromkeys(str(plan.side_bits) for plan in plans))
    return (
        f"reversible, beta {betas}, {name} states of {whole} + {grid_bits} bits, {kept} side bits kept per element and "
        "sub-block, one pair stored"
    )
