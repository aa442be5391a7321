"""Reversible layers communicate no more than activation checkpointing."""

import json
import sys

import pytest
from test_distributed import TESTS, finish

from benchmarks import collectives

ROOT = TESTS.parent
RESULTS = ROOT / "benchmarks" / "results" / "collectives-vit-s.json"


@pytest.mark.slow
def test_nothing_is_gathered_more_often(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.collectives", "--batch-size", 1, "--depths", 1, 2]
    code, said, errors = finish([*command, "--out", tmp_path])
    assert code == 0, errors
    rows = json.loads((tmp_path / "collectives-vit-s.json").read_text())["rows"]
    assert said.strip() == collectives.table(rows)
    found = {(row["wrapping"], row["way"]): row["layer"] for row in rows}
    for wrapping in collectives.WRAPPINGS:
        checkpointing = found[wrapping, "checkpointing"]
        for way in collectives.WAYS:
            assert found[wrapping, way]["calls"] == checkpointing["calls"]
            assert found[wrapping, way]["bytes"] == checkpointing["bytes"]
            assert way in ("plain", "checkpointing") or found[wrapping, way]["held"] < 0.4 * checkpointing["held"]
    sent = found["FSDP2", "reprop, beta 1"]
    assert sent["calls"] == {"all_gather": 2, "reduce_scatter": 1, "all_reduce": 0}
    assert sent["bytes"]["all_gather"] == 2 * sent["bytes"]["reduce_scatter"] > 0
    assert found["DDP", "plain"]["bytes"]["all_reduce"] == sent["bytes"]["reduce_scatter"]


def test_a_collective_that_is_not_known_is_not_left_out():
    event = {"cat": "cpu_op", "name": "c10d::alltoall_", "args": {"Input type": ["float"], "Input Dims": [[2]]}}
    with pytest.raises(ValueError, match="unknown collective c10d::alltoall_"):
        collectives.counted([event])


def test_the_page_shows_the_results():
    table = collectives.table(json.loads(RESULTS.read_text())["rows"])
    assert table in (ROOT / "docs" / "distributed.md").read_text()
