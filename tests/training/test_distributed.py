"""Compare training in two processes with training in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES

TESTS = Path(__file__).parents[1]


def launch(script, *args, processes=2, fails=False, seconds=300):
    """Run a script of the tests in several processes and return what it prints. A failure may be expected."""
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    code, said, errors = finish([*command, TESTS / script, *args], seconds)
    assert (code != 0) == fails, said[-1000:] + errors[-3000:]
    return said + errors if fails else said


def finish(command, seconds=300, **variables):
    """The exit status and the output of a command that starts processes. When the time is over, they are ended."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [TESTS.parent, TESTS, Path(__file__).parent])),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=TESTS.parent,
    ) as running:
        try:
            said, errors = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            running.terminate()
            raise
    return running.returncode, said, errors


@pytest.mark.slow
def test_wrapped_models():
    """DDP with find_unused_parameters on and off and with static_graph, and FSDP2 for each layer."""
    assert f"{20 * len(FAMILIES)} wrappings of 2 processes agree with one" in launch("distributed_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mvit"])  # half a minute each
def test_trainer(name, tmp_path):
    """Trainer's own DDP, started as `torchrun` and `accelerate launch` do, compared with one process on the whole batch."""
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
