"""Rebuilds use results of linear layers from the forward pass: gradients are the same, and nothing is computed again."""

import pytest
import torch
from families import assert_same, cast, step
from torch.nn import Linear
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from hf_pareprop.retention import Retention, RetentionPlan
from hf_pareprop.saved_linear import SavedLinears

DEPTH = 4


class Fixed(Retention):
    """Every forward pass keeps the graphs of a fixed number of layers, and below them results of linear layers of some more."""

    def __init__(self, graphs, linears):
        super().__init__()
        self.kept = RetentionPlan(graphs, linears)

    def plan(self, embeddings, plans):
        return self.kept


def keep(model, graphs, linears):
    model.base_model.retention = Fixed(graphs, linears)


class Counting(TorchDispatchMode):
    """Counts how often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, func):
        return self.counts.get(func, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, 1 / 256, [0.5, 0, 1.0, 0.25]])
@pytest.mark.parametrize("kept", [(0, 4), (0, 2), (1, 3), (2, 1)])
def test_gradients_are_the_same(family, lane, precision, dropout, beta, kept):
    model = family.build(DEPTH, dropout, beta=beta)
    batch, autocast = family.batch(), precision == "autocast"
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=autocast)
    keep(model, *kept)
    for engine in ("reprop", "pareprop"):
        again = step(model, batch, engine, autocast=autocast)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_computes_one_product_less(family, autocast):
    """The product with a bias at the end of the MLP is not computed. Its graph has the same products in the backward pass."""
    model, counts = family.build(DEPTH, 0.1, beta=0.5), []
    for linears in (0, 3):
        keep(model, 0, linears)
        with Counting() as counting:
            step(model, family.batch(), "reprop", autocast=autocast)
        counts.append((counting[torch.ops.aten.addmm.default], counting[torch.ops.aten.mm.default]))
    assert counts[0][0] - counts[1][0] == sum(plan.reversible for plan in model.base_model.layer_plans[-3:])
    assert counts[0][1] == counts[1][1]


def test_backward_twice_through_a_retained_graph(family, lane):
    model = family.build(DEPTH, 0.1, beta=0.5)
    keep(model, 0, DEPTH)
    reference = step(model, family.batch(), "autograd")[1]
    model.set_backward_engine("pareprop")
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**family.batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same({n: 2 * g for n, g in reference.items()}, {n: p.grad for n, p in model.named_parameters()})


def test_low_rank_adapters_of_the_kept_product(family):
    """Neither the layer that an adapter wraps nor the adapter's product to a low rank is computed again."""
    peft = pytest.importorskip("peft")
    model = family.build(DEPTH, beta=0.5)
    if not any(name.endswith("output.dense") for name, _ in model.named_modules()):
        pytest.skip("what ends its sub-blocks has other names")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["output.dense"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    inner, counts, found = model.base_model.model, [], []
    for engine, linears in (("autograd", 0), ("reprop", 0), ("reprop", DEPTH)):
        keep(inner, 0, linears)
        with Counting() as counting:
            found.append(step(inner, family.batch(), engine)[1])
        counts.append((counting[torch.ops.aten.addmm.default], counting[torch.ops.aten.mm.default]))
    assert any("lora_A" in name for name in found[0])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert [a - b for a, b in zip(*counts[1:], strict=True)] == [DEPTH, 2 * DEPTH]


def run_twice(layer, x):
    """The results and gradients of a layer and of its replay, and the counts of operators in the replay's forward."""
    linears, found = SavedLinears(), []
    with torch.no_grad(), linears.keeping():
        layer(x)
    for role in (SavedLinears().keeping, linears.given):
        x = x.detach().requires_grad_(True)
        with Counting() as counting, role():
            result = layer(x)
        found.append([result, *torch.autograd.grad(result.sin().sum(), [x, *layer.parameters()])])
    assert all(map(torch.equal, *found))
    return linears, counting


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_of_any_shape(shape, bias):
    linears, counting = run_twice(Linear(6, 4, bias=bias), torch.randn(shape))
    assert [result.shape for result in linears.results] == [(*shape[:-1], 4)]
    if len(shape) > 1:
        assert counting[torch.ops.aten.addmm.default] + counting[torch.ops.aten.mm.default] == 0


def test_computed_again_where_pytorch_takes_another_operator():
    """For a batch that is not contiguous PyTorch adds the bias separately. It must not be added twice."""
    run_twice(Linear(6, 4), torch.randn(5, 2, 6).transpose(0, 1))
    run_twice(Linear(6, 4, bias=False), torch.randn(5, 2, 6).transpose(0, 1))


def test_kept_only_where_it_narrows_and_where_a_step_keeps_results():
    """This holds for any module, and for arguments by position or by name."""
    linears, x = SavedLinears(), torch.randn(5, 6)
    with linears.keeping():
        Linear(6, 6)(x)
        Linear(6, 12)(x)
    Linear(6, 4)(x)
    assert not linears.results
    layer, weight, bias = Linear(6, 5), torch.randn(4, 6), torch.randn(4)

    def results():
        return [layer(x), linear(x, weight, bias), linear(x, weight=weight), linear(input=x, weight=weight)]

    with linears.keeping():
        expected = results()
    assert all(map(torch.equal, linears.results, expected)) and len(linears.results) == 4
    with linears.given(), Counting() as counting:
        assert all(map(torch.equal, results(), expected))
    assert counting[torch.ops.aten.addmm.default] + counting[torch.ops.aten.mm.default] == 0


def test_a_result_that_was_modified_is_noticed():
    layer, linears, x = Linear(6, 4), SavedLinears(), torch.randn(5, 6)
    with torch.no_grad(), linears.keeping():
        layer(x).add_(1)
    with pytest.raises(RuntimeError, match=r"linear layer was modified in place after it was kept"), linears.given():
        layer(x)


def test_a_layer_that_did_not_run_before_is_noticed():
    layer, linears, x = Linear(6, 4), SavedLinears(), torch.randn(5, 6)
    with linears.keeping():
        layer(x)
    with linears.given():
        layer(x)
        with pytest.raises(RuntimeError, match="computes more linear layers in the backward pass"):
            layer(x)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_cuda_gradients_are_the_same(family, beta, autocast, dropout):
    """Several runs, because memory that is freed while another stream reads it would not always show."""
    model = family.build(5, dropout, beta=beta).cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = step(model, batch, "autograd", autocast=autocast)
    keep(model, 1, 4)
    for _ in range(5):
        again = step(model, batch, "pareprop", autocast=autocast)
        assert torch.equal(reference[0], again[0])
        assert_same(again[1], reference[1])
