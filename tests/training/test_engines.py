"""In two processes, engines have bit for bit the gradients of `autograd` under the same wrapping."""

import pytest
from families import FAMILIES
from test_distributed import launch


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrapping, engine",
    [
        ("ddp", "pareprop"),
        ("fsdp2", "reprop"),
        pytest.param("ddp", "reprop", marks=pytest.mark.every_case),
        pytest.param("fsdp2", "pareprop", marks=pytest.mark.every_case),
    ],
)
def test_gradients_are_equal(wrapping, engine):
    said = launch("engines_worker.py", wrapping, engine)
    assert said.count("gradients are equal") == 9 * len(FAMILIES)
