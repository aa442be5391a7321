"""A process dies in the middle of training, and the run goes on from its last checkpoint."""

import pytest
import torch
from test_distributed import launch


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path):
    """The losses and the weights are those of an uninterrupted run, also with dropout."""
    launch("resumed_worker.py", tmp_path / "whole", "not killed")
    said = launch("resumed_worker.py", tmp_path / "resumed", "killed", fails=True)
    assert "Signal 9 (SIGKILL)" in said
    folder = tmp_path / "resumed"
    assert (folder / "checkpoint-4").is_dir() and not (folder / "result.pt").exists()
    assert not (folder / "checkpoint-6").exists()
    launch("resumed_worker.py", folder, "resumed")
    whole, resumed = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "resumed"))
    assert list(whole["losses"]) == list(range(1, 9))
    assert whole["losses"] == resumed["losses"]
    assert len(set(whole["losses"].values())) > 4
    assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in whole["weights"].items())
