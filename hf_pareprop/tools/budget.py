"""The bit budget of a model in words."""

from collections.abc import Sequence
from itertools import groupby

from ..plan import LayerPlan


def bit_budget(plans: Sequence[LayerPlan]) -> list[str]:
    """One line per run of layers that are coupled alike: which, how, how many bits before and after the point states have,
    and what is kept."""
    lines, first = [], 0
    for _, run in groupby(plans, key=lambda plan: (plan.reversible, plan.stores_activations, plan.stage)):
        segment = list(run)
        lines.append(f"layers {first}-{first + len(segment) - 1}: {_in_words(segment)}")
        first += len(segment)
    return lines


def _in_words(plans: Sequence[LayerPlan]) -> str:
    if plans[0].reversible:
        return _segment(plans)
    if plans[0].stores_activations:
        return "conventional, activations stored"
    return "changes the shape of the hidden state, runs again in the backward pass, its input stored"


def _segment(plans: Sequence[LayerPlan]) -> str:
    betas = ", ".join(dict.fromkeys(f"{plan.beta:g}" for plan in plans))
    grid_bits = plans[0].grid_bits
    if grid_bits is None:
        return f"reversible, beta {betas}, float states, which only the engine autograd can train"
    kept = ", ".join(dict.fromkeys(str(plan.side_bits) for plan in plans))
    return (
        f"reversible, beta {betas}, int32 states below {plans[0].limit:g} in steps of 2**-{grid_bits}, {kept} side bits kept "
        "per element and sub-block, one pair stored"
    )
