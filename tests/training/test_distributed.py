"""Two processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES

TESTS = Path(__file__).parents[1]


def launch(script, *args, processes=2):
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command += [str(TESTS / script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_wrapped_models():
    """DDP with find_unused_parameters both ways and with static_graph, and FSDP2 per layer."""
    assert f"{20 * len(FAMILIES)} wrappings of 2 processes agree with one" in launch("distributed_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mvit"])  # half a minute each
def test_trainer(name, tmp_path):
    """Trainer's own DDP, as `torchrun` and `accelerate launch` start it, against one process with the whole batch."""
    launch("distributed_trainer.py", name, 8, tmp_path / "alone.pt", processes=1)
    launch("distributed_trainer.py", name, 4, tmp_path / "both.pt")
    alone, both = (torch.load(tmp_path / f"{which}.pt") for which in ("alone", "both"))
    assert alone["world_size"] == 1 and both["world_size"] == 2
    assert alone["gradients"].keys() == both["gradients"].keys()
    whole = sum(g.norm() ** 2 for g in alone["gradients"].values()) ** 0.5
    assert whole > 0
    for parameter, grad in alone["gradients"].items():
        # The same fp32 terms summed in another order over processes: relative error of some ulp (2**-23) of the whole.
        assert (both["gradients"][parameter] - grad).norm() <= 2**-18 * whole, parameter
