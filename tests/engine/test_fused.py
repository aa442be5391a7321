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
from hf_pareprop.plan import plan_layers

fused = pytest.importorskip("hf_pareprop.fused")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOWEST, HIGHEST = -(2**31), 2**31 - 1


@pytest.fixture(autouse=True)
def proved(monkeypatch):
    """Forget before and after a test whether the kernels work, so that it is tried again. They run on this machine's device."""
    monkeypatch.setattr(fused, "DEVICES", {DEVICE.type})
    coupling.fused_are_exact.cache_clear()
    yield
    coupling.fused_are_exact.cache_clear()


def plan_of(side_bits, grid_bits=16):
    return plan_layers(2.0**-side_bits, 1, grid_bits)[0]


def random_state(shape):
    """A state with values of any size that fits into int32, so that sums wrap around."""
    return torch.randint(LOWEST, HIGHEST + 1, shape, dtype=torch.int32, device=DEVICE)


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def no_peak():
    return torch.zeros((), device=DEVICE)


def assert_equal_sides(found, sides):
    assert [(bits.dtype, bits.tolist()) for bits in found] == [(bits.dtype, bits.tolist()) for bits in sides]


@pytest.mark.parametrize("shape", [(3, 7, 16), (4, 640), (0, 8)])
@pytest.mark.parametrize("grid_bits", [4, 12, 16, 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side_bits", range(8))
def test_the_bits_of_an_update_and_its_inverse(side_bits, dtype, grid_bits, shape):
    """Some values are halfway between two points of the grid, some the largest in int32, and some states wrap around."""
    plan = plan_of(side_bits, grid_bits)
    torch.manual_seed(side_bits)
    value = 30 * torch.randn(shape, device=DEVICE, dtype=dtype)
    previous = random_state(shape)
    if value.numel():
        halves = torch.randint(-(2**20), 2**20, (100,)) * 0.5
        special = torch.tensor([0.5, 1.5, -0.5, -2.5, 3.5, 0.5 - 2**-25, 2**-25 - 0.5, 2.0**31 - 128, 128 - 2.0**31])
        if dtype.itemsize == 2:  # the last two would be rounded to what no int32 holds
            special[-2:] = torch.tensor([2.0**8, -(2.0**8)])
        value.view(-1)[:109] = torch.cat([special, halves]) * 2.0**-grid_bits
        previous.view(-1)[5:9] = torch.tensor([LOWEST, HIGHEST, HIGHEST, LOWEST])
        previous.view(-1)[-2:] = torch.tensor([LOWEST, HIGHEST])
    following, sides, peak = coupling.advance_in_passes(value, previous, plan, no_peak(), keep=True)
    found, kept, highest = fused.advance(value, previous, plan, no_peak(), keep=True)
    assert_equal(found, following)
    assert_equal_sides(kept, sides)
    assert_equal(highest, peak)
    again, none, highest = fused.advance(value, previous, plan, no_peak())
    assert_equal(again, following)
    assert none == []
    assert_equal(highest, peak)
    assert_equal(coupling.retreat_in_passes(value, following, plan, sides), previous)
    assert_equal(fused.retreat(value, found, plan, kept), previous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side_bits", [0, 1, 5, 7])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of NumPy, which interprets
def test_values_that_no_int32_holds(side_bits, dtype):
    """The update can be undone, whatever these values are rounded to, and the peak reports each of them."""
    plan = plan_of(side_bits)
    torch.manual_seed(side_bits)
    nan, inf = float("nan"), float("inf")
    below_zero = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()  # a NaN with a sign
    largest = torch.finfo(dtype).max
    units = 2.0**-16
    for special in (
        [2.0**31 * units],
        [-(2.0**31) * units],
        [2.0**41 * units, 2.0**40],
        [-(2.0**45), 1.0],
        [largest],  # infinite once it is scaled, or as fp32
        [inf],
        [-inf, 1.0],
        [nan],
        [below_zero],
        [nan, inf],
        [-inf, below_zero, inf],
    ):
        value, previous = torch.randn(4, 640, device=DEVICE, dtype=dtype), random_state((4, 640)) // 2**10
        value.view(-1)[-len(special) :] = torch.tensor(special, dtype=dtype)
        _, sides, peak = coupling.advance_in_passes(value, previous, plan, no_peak(), keep=True)
        found, kept, highest = fused.advance(value, previous, plan, no_peak(), keep=True)
        assert_equal(highest, peak)
        assert coupling.poison(highest).isnan()
        assert_equal_sides(kept, sides)
        assert_equal(fused.retreat(value, found, plan, kept), previous)


@pytest.mark.parametrize("columns", [1, 256, 257, 1000])
@pytest.mark.parametrize(
    "at, value, state, peak",
    [
        (0, 0.0, 0, 0.0),
        (0, 3.25, 0, 3.25),  # of what is not yet rounded
        (-1, -3.25, 0, 3.25),
        (-1, -3.25, 8, 5.0),
        (3, 2.0**-30, 0, 2.0**-30),
        (7, 0.0, 2**24 + 3, 2.0**24 + 4),  # rounded to fp32
        (-1, 0.0, HIGHEST, 2.0**31),
        (-1, 0.0, LOWEST, 2.0**31),
        (0, -1.0, LOWEST, 2.0**31),  # wraps around to the highest number
    ],
)
def test_the_peak(at, value, state, peak, columns):
    """It is found anywhere in memory, in the value or the state, with either sign. Memory beyond the end does not count."""
    plan = plan_of(0)
    values = torch.zeros(columns * 8, device=DEVICE)
    states = torch.zeros(columns * 8, device=DEVICE, dtype=torch.int32)
    values[at], states[at] = value * 2.0**-16, state
    found = fused.advance(values, states, plan, no_peak())[2]
    assert found.item() == peak
    assert_equal(found, coupling.advance_in_passes(values, states, plan, no_peak())[2])


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, [0.5, 0, 1.0]])
def test_a_training_step(family, beta, lane, monkeypatch):
    model, batch = family.build(3, 0.1, beta=beta).to(DEVICE), family.batch()
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    launches = []
    launch = fused.launch
    monkeypatch.setattr(fused, "launch", lambda kernel, *a, **k: launches.append(kernel) or launch(kernel, *a, **k))
    found = [step(model, batch, engine) for engine in ("autograd", "reprop", "pareprop")]
    updates = 2 * sum(plan.reversible for plan in model.base_model.layer_plans)
    tries = coupling.fused_are_exact.cache_info().currsize
    assert (
        launches.count(fused.advance_kernel) == 3 * updates + tries
        and launches.count(fused.retreat_kernel) == 2 * updates + tries
    )
    monkeypatch.setattr(fused, "DEVICES", set())
    found.append(step(model, batch, "autograd"))
    for loss, grads, _ in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert_same(grads, found[0][1])


def odd(plan, shape=(3, 5)):
    return torch.ones(shape, device=DEVICE), torch.ones(shape, dtype=torch.int32, device=DEVICE), plan


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (lambda: odd(plan_of(1)), "no multiple of eight elements"),
        (lambda: odd(plan_of(8), (8,)), "more side bits than are packed"),
        (lambda: odd(plan_of(1, None), (8,)), "no grid"),
        (lambda: (odd(plan_of(1), (8, 8))[0].T, *odd(plan_of(1), (8, 8))[1:]), "values in no row order"),
        (lambda: (odd(plan_of(1), (8, 8))[0], odd(plan_of(1), (8, 8))[1].T, plan_of(1)), "states in no row order"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_kernels_do_not_take(tensors, reason):
    assert coupling.runs_fused(*odd(plan_of(1), (8, 8)))
    assert not coupling.runs_fused(*tensors())


@pytest.mark.parametrize("side_bits", [1, 7, 8])
def test_either_way_of_an_update_undoes_the_other(side_bits, monkeypatch):
    """An update by kernels can be undone by PyTorch's operations, and the other way round."""
    plan = plan_of(side_bits)
    value, previous = torch.randn(8, 32, device=DEVICE), random_state((8, 32))
    here = coupling.advance(value, previous, plan, no_peak(), keep=True)
    monkeypatch.setattr(fused, "DEVICES", set())
    assert_equal(coupling.retreat(value, here[0], plan, here[1]), previous)
    there = coupling.advance(value, previous, plan, no_peak(), keep=True)
    monkeypatch.setattr(fused, "DEVICES", {DEVICE.type})
    assert_equal(coupling.retreat(value, there[0], plan, there[1]), previous)


def spoiled(trouble):
    """A replacement of the launch, with kernels that do not work."""
    original = fused.launch

    def launch(kernel, value, state, result, *args, **kwargs):
        if trouble == "raises":
            raise RuntimeError("Failed to find C compiler.")
        original(kernel, value, state, result, *args, **kwargs)
        if trouble == "other bits":
            result.view(-1)[-1] += 1
        elif "peak" in kwargs:
            kwargs["peak"].add_(1)

    return launch


@pytest.mark.parametrize("trouble", ["raises", "other bits", "another peak"])
def test_kernels_are_tried_first(trouble, monkeypatch):
    """Without a compiler, or with a GPU on which they compute something else, there is one warning."""
    tensors = odd(plan_of(1), (8, 8))
    monkeypatch.setattr(fused, "launch", spoiled(trouble))
    with pytest.warns(UserWarning, match="Triton.*(C compiler|other bits)"):
        assert not coupling.runs_fused(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not coupling.runs_fused(*tensors)


@pytest.mark.parametrize("trouble", ["raises", "other bits", "another peak"])
def test_kernels_that_do_not_work_are_not_used(family, trouble, monkeypatch):
    """The results are the same, and there is one warning."""
    model, batch = family.build(2, beta=0.5).to(DEVICE), {k: v.to(DEVICE) for k, v in family.batch().items()}
    reference = step(model, batch, "reprop")
    coupling.fused_are_exact.cache_clear()
    monkeypatch.setattr(fused, "launch", spoiled(trouble))
    with pytest.warns(UserWarning, match="C compiler|other bits") as warned:
        found = step(model, batch, "reprop")
    assert len([w for w in warned if "Triton" in str(w.message)]) == 1
    assert_same(reference[1], found[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, batch, "reprop")


def test_memory_can_be_accounted(monkeypatch):
    """A kernel cannot run on fake tensors, which have no data. Their results have the shapes of real ones."""
    monkeypatch.setattr(fused, "DEVICES", {"cuda"})
    plan = plan_of(5)
    with FakeTensorMode():
        value = torch.empty(4, 8, 8, device="cuda")
        previous = torch.empty(4, 8, 8, dtype=torch.int32, device="cuda")
        assert coupling.runs_fused(value, previous, plan)
        following, sides, peak = coupling.advance(value, previous, plan, torch.zeros((), device="cuda"), keep=True)
        undone = coupling.retreat(value, following, plan, sides)
    assert (following.shape, undone.shape, [len(bits) for bits in sides]) == ((4, 8, 8), (4, 8, 8), [128, 32])
    assert (following.dtype, undone.dtype) == (torch.int32, torch.int32)
    assert (peak.shape, peak.dtype, peak.device.type) == ((), torch.float32, "cuda")


COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_pareprop import fused

KINDS = dict.fromkeys(("previous", "following", "peak"), "*i32") | dict.fromkeys(("fours", "twos", "ones"), "*u8")
KINDS |= dict(columns="i32")

def build(kernel, value, capability, **constants):
    kinds = KINDS | dict(value=f"*{value}")
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))

for capability in (75, 80, 90, 100):
    for value in ("fp32", "fp64"):
        for side_bits in (0, 1, 7):
            common = dict(GRID_BITS=16, SIDE_BITS=side_bits, BLOCK=fused.BLOCK)
            build(fused.advance_kernel, value, capability, **common, KEEP=True)
            build(fused.retreat_kernel, value, capability, **common)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
