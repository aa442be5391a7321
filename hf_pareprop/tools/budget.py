"""Describe in words how many bits the states of a model have, and how many are kept."""

from collections.abc import Sequence
from itertools import groupby

from ..plan import LayerPlan


def bit_budget(plans: Sequence[LayerPlan]) -> list[str]:
    """One line for each run of layers with the same coupling: which layers, how they are coupled, the range and the step of
    their states, and what is kept."""
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
    return "changes the shape of the hidden state; its input is stored, and it runs again in the backward pass"


def _segment(plans: Sequence[LayerPlan]) -> str:
    betas = ", ".join(dict.fromkeys(f"{plan.beta:g}" for plan in plans))
    grid_bits = plans[0].grid_bits
    if grid_bits is None:
        return f"reversible, beta {betas}, float states, which only the engine autograd can train"
    kept = ", ".join(dict.fromkeys(str(plan.side_bits) for plan in plans))
    step = "layer" if plans[0].whole else "sub-block"
    return (
        f"reversible, beta {betas}, int32 states below {plans[0].limit:g} in steps of 2**-{grid_bits}, {kept} side bits kept "
        f"per element and {step}, one pair stored"
    )
