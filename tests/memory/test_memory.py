"""Activation memory does not grow with depth, in any stage of the model."""

import pytest
import torch
from families import FAMILIES

from hf_pareprop.lanes import replaced
from hf_pareprop.tools.accounting import AheadLane
from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.memory import peak_bytes

STAGES = [(name, stage) for name, family in FAMILIES.items() for stage in range(2 if family.row.staged else 1)]
DEPTH, ADDED = 2, 4
"""Layers of every stage, and how many one stage gets in addition."""


def peak(family, depths, **fields) -> int:
    """The peak of a training step in bytes, on top of weights and gradients."""
    shape = family.row.small._replace(width=2 * family.row.small.width, depths=depths)
    given = {**family.row.small_fields, **family.row.shape_fields(shape), **family.row.dropout_fields(0.1)}
    model = family.model(family.config(**given, **fields)).train()
    batch = resized(family.batch(), 24 if family.row.staged else 64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with replaced(lambda device: AheadLane()):
        model(**batch).loss.backward()  # what only a first step does
        return peak_bytes(lambda: model(**batch).loss.backward(), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name, stage", STAGES)
def test_memory_per_added_layer(name, stage):
    """An added layer takes at most 3 % of what plain training (beta 0) stores for it, in every stage, with both engines."""
    family = FAMILIES[name]
    few = [DEPTH] * (2 if family.row.staged else 1)
    many = [depth + ADDED * (i == stage) for i, depth in enumerate(few)]

    def growth(**fields) -> float:
        return (peak(family, tuple(many), **fields) - peak(family, tuple(few), **fields)) / ADDED

    plain = growth(beta=0.0, backward_engine="autograd")
    assert plain > 100_000
    for engine in ("reprop", "pareprop"):
        for beta in (1.0, 1 / 32):
            found = growth(beta=beta, backward_engine=engine)
            assert found <= 0.03 * plain, f"{engine}, beta {beta}: {found:.0f} of {plain:.0f} bytes"
