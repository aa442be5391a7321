"""The files for `accelerate launch` that the examples have, each with two processes on CPUs."""

import importlib.util
import json
import sys

import pytest
from safetensors.torch import load_file
from test_distributed import TESTS, finish
from transformers import AutoModelForSequenceClassification

ROOT = TESTS.parent
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None
ON_CPU = TESTS / "accelerate_on_cpu.py"


def launch(name, folder, *arguments, script=(ROOT / "examples" / "finetune_text.py",)):
    """What `accelerate launch` prints in a short run. The command itself is not used: it imports libraries that are not needed."""
    launcher = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--main_process_port", 0]
    command = [*launcher, "--config_file", ROOT / "examples" / "accelerate" / f"{name}.yaml", *script]
    short = ["--max_steps", 2, "--max_length", 16, "--per_device_train_batch_size", 8, "--output_dir", folder]
    code, said, errors = finish([*command, *short, *arguments])
    assert code == 0, said[-1000:] + errors[-5000:]
    return said


def about(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The output directory of a run with DDP, and what was printed."""
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launch("ddp", folder, "--use_cpu")


@pytest.mark.slow
def test_ddp(ddp):
    folder, said = ddp
    assert (about(folder)["processes"], about(folder)["distributed_type"]) == (2, "MULTI_CPU")
    assert "in 2 processes (MULTI_CPU)" in said
    for once in ("keep their graphs", "| reversible (pareprop) |", "Activations take", "Load it anywhere"):
        assert said.count(once) == 1, once
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "RevRobertaForSequenceClassification"


def difference(folder, ddp):
    """The largest difference between a weight after two steps and the same weight after two steps with DDP."""
    weights, reference = (load_file(path / "model.safetensors") for path in (folder, ddp[0]))
    assert weights.keys() == reference.keys()
    return max(float((weights[name] - reference[name]).abs().max()) for name in weights)


@pytest.mark.slow
def test_fsdp2(ddp, tmp_path):
    script = (ON_CPU, ROOT / "examples" / "finetune_text.py")
    said = launch("fsdp2", tmp_path, "--beside", "false", script=script)
    assert (about(tmp_path)["processes"], about(tmp_path)["distributed_type"]) == (2, "FSDP")
    assert said.count("| pareprop |") == 1
    assert difference(tmp_path, ddp) == 0  # two numbers have one sum


@pytest.mark.slow
@pytest.mark.every_case
def test_fsdp2_is_ignored_on_cpus(tmp_path):
    """Accelerate ignores it there, as the last line of the example says. So the test above makes accelerate see GPUs."""
    said = launch("fsdp2", tmp_path, "--beside", "false", "--use_cpu")
    assert "in 2 processes (MULTI_CPU)" in said


@pytest.mark.slow
@pytest.mark.skipif(NO_DEEPSPEED, reason="takes pip install deepspeed")
def test_zero2(ddp, tmp_path):
    said = launch("zero2", tmp_path, "--beside", "false", "--ddp_backend", "gloo")
    assert (about(tmp_path)["processes"], about(tmp_path)["distributed_type"]) == (2, "DEEPSPEED")
    assert said.count("| pareprop |") == 1
    assert difference(tmp_path, ddp) < 1e-7  # a thousandth of a step; DeepSpeed scales gradients before it adds them


@pytest.mark.slow
def test_several_runs_in_several_processes_are_refused(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", 2]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    example = [ROOT / "examples" / "finetune_text.py", "--use_cpu", "--seeds", 2, "--output_dir", tmp_path]
    code, _, errors = finish([*command, *example])
    assert code and "2 processes are running already" in errors
