"""Memory runs out in one of two processes: the other one does not wait for it forever."""

import pytest
from test_distributed import launch


@pytest.mark.slow
def test_ddp():
    """The process repeats its forward pass alone and keeps half as much. Nothing is communicated in that pass."""
    said = launch("out_of_memory_worker.py", "ddp", "1TB", seconds=60)
    assert said.count("a step after memory ran out") == 2


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1TB", "gradients"])
def test_fsdp2(budget):
    """If it repeated the pass, it would gather the first layer's parameters again, and the others those of the next layer."""
    said = launch("out_of_memory_worker.py", "fsdp2", budget, fails=True, seconds=60)
    assert f"out of memory in the forward pass of rank 1 of 2 processes, with memory_budget='{budget}'" in said
    assert "smaller memory_budget in all processes" in said
