"""Sharding that a rebuilt layer does not see through: right, or refused before anything is trained."""

import pytest
from families import FAMILIES
from test_distributed import launch

ENGINES = ["reprop", "pareprop"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fsdp2_on_parts_of_a_layer(engine):
    """Their parameters come and go by hooks inside the layer, which therefore stores its activations.

    RoBERTa hands the parameters of a norm to the next layer, which FSDP2 has sharded by then.
    """
    said = launch("sharded_worker.py", "finer", engine)
    assert "vit equal in 56 gradients" in said
    assert "roberta refused" in said


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fsdp2_in_mixed_precision(engine):
    """Which casts the hidden state on its way from layer to layer, by default."""
    said = launch("sharded_worker.py", "mixed", engine)
    assert all(f"{name} equal in" in said for name in FAMILIES), said


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD"])
def test_fsdp1(strategy, engine):
    """It works where a layer needs no parameter of another; RoBERTa's do, and find them hidden."""
    said = launch("sharded_worker.py", strategy, engine)
    assert all(
        f"{name} equal in" in said or f"{name} refused" in said
        for name, family in FAMILIES.items()
        if not family.row.staged
    )
    assert "roberta refused" in said
    assert "use FSDP2, or call" in said or "Use FSDP2 or ZeRO-2" in said
