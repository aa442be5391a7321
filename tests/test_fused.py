"""The kernels that update states: the same bits as PyTorch's operations. Without a GPU they run in Triton's interpreter."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from families import assert_same, step
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_pareprop import coupling
from hf_pareprop.coupling import enter
from hf_pareprop.plan import plan_layers

fused = pytest.importorskip("hf_pareprop.fused")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def proved(monkeypatch):
    """What is known of the kernels, forgotten before and after a test; they run on this machine's device."""
    monkeypatch.setattr(fused, "DEVICES", {DEVICE.type})
    coupling.fused_are_exact.cache_clear()
    yield
    coupling.fused_are_exact.cache_clear()


@pytest.mark.parametrize("shape", [(3, 7, 16), (4, 640), (0, 8)])
@pytest.mark.parametrize("grid_bits", [4, 12, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side_bits", range(8))
def test_the_bits_of_an_update_and_its_inverse(side_bits, dtype, grid_bits, shape):
    """Values halfway between two points of the grid, far out of range and not finite among them."""
    plan = plan_layers(2.0**-side_bits, 1, grid_bits)[0]
    torch.manual_seed(side_bits)
    value, previous = (30 * torch.randn(2, *shape, device=DEVICE, dtype=dtype)).unbind()
    special = torch.tensor([0.5, 1.5, -0.5, -2.5, 3.5, 2.0**30, 2.0**41]) * 2.0**-grid_bits
    if value.numel():
        value.view(-1)[:9] = torch.tensor([*special, float("inf"), float("nan")])
    previous = enter(previous, plan)
    following, sides = coupling.advance_in_passes(value, previous, plan)
    found, kept = fused.advance(value, previous, plan, keep=True)
    assert_equal(found, following)
    assert [bits.tolist() for bits in kept] == [bits.tolist() for bits in sides]
    assert_equal(fused.advance(value, previous, plan)[0], following)
    undone = fused.retreat(value, found, plan, kept)
    assert_equal(undone, coupling.retreat_in_passes(value, following, plan, sides))
    assert torch.equal(undone.view(-1)[9:], previous.view(-1)[9:])


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, [0.5, 0, 1.0]])
def test_a_training_step(family, beta, lane, monkeypatch):
    model, batch = family.build(3, 0.1, beta=beta).to(DEVICE), family.batch()
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    launches = []
    launch = fused._launch
    monkeypatch.setattr(fused, "_launch", lambda kernel, *a, **k: launches.append(kernel) or launch(kernel, *a, **k))
    found = [step(model, batch, engine) for engine in ("autograd", "reprop", "pareprop")]
    updates = 2 * sum(plan.reversible for plan in model.base_model.layer_plans)
    tries = coupling.fused_are_exact.cache_info().currsize
    assert (
        launches.count(fused._advance) == 3 * updates + tries and launches.count(fused._retreat) == 2 * updates + tries
    )
    monkeypatch.setattr(fused, "DEVICES", set())
    found.append(step(model, batch, "autograd"))
    for loss, grads, _ in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert_same(grads, found[0][1])


def odd(plan, shape=(3, 5)):
    return torch.ones(shape, device=DEVICE), torch.ones(shape, device=DEVICE), plan


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (lambda: odd(plan_layers(0.5, 1)[0]), "no multiple of eight elements"),
        (lambda: odd(plan_layers(2.0**-8, 1)[0], (8,)), "more side bits than are packed"),
        (lambda: odd(plan_layers(0.5, 1, None)[0], (8,)), "no grid"),
        (lambda: (torch.ones(8, 8).to(DEVICE).T, torch.ones(8, 8).to(DEVICE), plan_layers(0.5, 1)[0]), "no row order"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_kernels_do_not_take(tensors, reason):
    assert not coupling.runs_fused(*tensors())


@pytest.mark.parametrize("trouble", ["raises", "other bits"])
def test_kernels_that_do_not_work_are_not_used(family, trouble, monkeypatch):
    """No compiler, or a GPU on which they would compute something else: said once, and the results are the same."""
    model, batch = family.build(2, beta=0.5).to(DEVICE), {k: v.to(DEVICE) for k, v in family.batch().items()}
    reference = step(model, batch, "reprop")
    coupling.fused_are_exact.cache_clear()
    if trouble == "raises":

        def launch(*args, **kwargs):
            raise RuntimeError("Failed to find C compiler.")

    else:
        original = fused._launch

        def launch(kernel, value, state, result, *args, **kwargs):
            original(kernel, value, state, result, *args, **kwargs)
            result.view(-1)[-1] += 2.0**-12

    monkeypatch.setattr(fused, "_launch", launch)
    with pytest.warns(UserWarning, match="C compiler|other bits") as warned:
        found = step(model, batch, "reprop")
    assert len([w for w in warned if "Triton" in str(w.message)]) == 1
    assert_same(reference[1], found[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, batch, "reprop")


def test_memory_can_be_accounted(monkeypatch):
    """Fake tensors have no data to launch a kernel on; their results have the shapes of real ones."""
    monkeypatch.setattr(fused, "DEVICES", {"cuda"})
    plan = plan_layers(1 / 32, 1)[0]
    with FakeTensorMode():
        value, previous = torch.empty(2, 4, 8, 8, device="cuda").unbind()
        following, sides = coupling.advance_undoably(value, previous, plan)
        undone = coupling.retreat(value, following, plan, sides)
    assert (following.shape, undone.shape, [len(bits) for bits in sides]) == ((4, 8, 8), (4, 8, 8), [128, 32])


COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_pareprop import fused

def build(kernel, value, state, capability, **constants):
    kinds = [f"*{value}", f"*{state}", f"*{state}", "*u8", "*u8", "*u8", "i32"]
    signature = dict(zip(kernel.arg_names, kinds + ["constexpr"] * len(constants)))
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))

for capability in (75, 80, 90, 100):
    for value, state in (("fp32", "fp32"), ("fp32", "fp64")):
        for side_bits in (0, 1, 7):
            common = dict(GRID_BITS=12, SIDE_BITS=side_bits)
            build(fused._advance, value, state, capability, **common, KEEP=True, BLOCK=fused.BLOCK)
            build(fused._retreat, value, state, capability, **common, BLOCK=fused.BLOCK)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
