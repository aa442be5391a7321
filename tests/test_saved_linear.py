"""SavedLinears that a rebuild takes from the forward pass: the same gradients, and the product is not computed again."""

import pytest
import torch
from families import assert_same, assert_same_on_cuda, cast, step
from torch.utils._python_dispatch import TorchDispatchMode

from hf_pareprop.retention import Retention, RetentionPlan
from hf_pareprop.saved_linear import SavedLinear, SavedLinears

DEPTH = 4


@pytest.fixture
def keep(monkeypatch):
    """Has every forward pass keep so many layers' graphs, and the products of so many layers below."""

    def choose(graphs, products):
        monkeypatch.setattr(Retention, "plan", lambda self, embeddings, plans: RetentionPlan(graphs, products))

    return choose


class Counting(TorchDispatchMode):
    """How often each operator runs."""

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
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, [0.5, 0, 1.0, 0.25]])
@pytest.mark.parametrize("kept", [(0, 4), (0, 2), (1, 3), (2, 1)])
def test_gradients_are_the_same(family, lane, precision, dropout, beta, kept, keep):
    model = family.build(DEPTH, dropout, beta=beta)
    batch, autocast = family.batch(), precision == "autocast"
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=autocast)
    keep(*kept)
    for engine in ("reprop", "pareprop"):
        again = step(model, batch, engine, autocast=autocast)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_computes_one_product_less(family, autocast, keep):
    """Of the products with a bias, the one at the end of the MLP; its graph has the same products backwards."""
    model, counts = family.build(DEPTH, 0.1, beta=0.5), []
    for products in (0, 3):
        keep(0, products)
        with Counting() as counting:
            step(model, family.batch(), "reprop", autocast=autocast)
        counts.append((counting[torch.ops.aten.addmm.default], counting[torch.ops.aten.mm.default]))
    assert counts[0][0] - counts[1][0] == 3 and counts[0][1] == counts[1][1]


def test_backward_twice_through_a_retained_graph(family, lane, keep):
    keep(0, DEPTH)
    model = family.build(DEPTH, 0.1, beta=0.5)
    reference = step(model, family.batch(), "autograd")[1]
    model.set_backward_engine("pareprop")
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**family.batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same({n: 2 * g for n, g in reference.items()}, {n: p.grad for n, p in model.named_parameters()})


def test_low_rank_adapters_of_the_kept_product(family, keep):
    """The adapter's own narrow products are computed; what it wraps is not computed again."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(family.build(DEPTH, beta=0.5), peft.LoraConfig(target_modules=["output.dense"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    inner, counts, found = model.base_model.model, [], []
    for engine, products in (("autograd", 0), ("reprop", 0), ("reprop", DEPTH)):
        keep(0, products)
        with Counting() as counting:
            found.append(step(inner, family.batch(), engine)[1])
        counts.append(counting[torch.ops.aten.addmm.default])
    assert any("lora_A" in name for name in found[0])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert counts[1] - counts[2] == DEPTH


def run_twice(layer, x):
    """The results and gradients of a layer and of its replay, and the counts of operators in the replay's forward."""
    products, found = SavedLinears(), []
    with torch.no_grad(), products.keeping():
        layer(x)
    for role in (SavedLinears().keeping, products.given):
        x = x.detach().requires_grad_(True)
        with Counting() as counting, role():
            result = layer(x)
        found.append([result, *torch.autograd.grad(result.sin().sum(), [x, *layer.parameters()])])
    assert all(map(torch.equal, *found))
    return products, counting


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_of_any_shape(shape, bias):
    products, counting = run_twice(SavedLinear(6, 4, bias=bias), torch.randn(shape))
    assert [result.shape for result in products.results] == [(*shape[:-1], 4)]
    if len(shape) > 1:
        assert counting[torch.ops.aten.addmm.default] + counting[torch.ops.aten.mm.default] == 0


def test_computed_again_where_pytorch_takes_another_operator():
    """A batch that is not contiguous: a product, and the bias added to it, which must not be added twice."""
    run_twice(SavedLinear(6, 4), torch.randn(5, 2, 6).transpose(0, 1))
    run_twice(SavedLinear(6, 4, bias=False), torch.randn(5, 2, 6).transpose(0, 1))


def test_kept_only_where_it_narrows_and_where_a_step_keeps_products():
    products = SavedLinears()
    with products.keeping():
        SavedLinear(6, 6)(torch.randn(5, 6))
        SavedLinear(6, 12)(torch.randn(5, 6))
        torch.nn.Linear(6, 4)(torch.randn(5, 6))
    SavedLinear(6, 4)(torch.randn(5, 6))
    assert not products.results


def test_a_result_that_was_modified_is_noticed():
    layer, products, x = SavedLinear(6, 4), SavedLinears(), torch.randn(5, 6)
    with torch.no_grad(), products.keeping():
        layer(x).add_(1)
    with pytest.raises(RuntimeError, match=r"SavedLinear\(in_features=6.*was modified in place"), products.given():
        layer(x)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_cuda_gradients_are_the_same(family, beta, autocast, dropout, keep):
    """Several times: what is freed on one stream while another reads it would not show every time."""
    model = family.build(5, dropout, beta=beta).cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    keep(0, 0)
    reference = step(model, batch, "autograd", autocast=autocast)
    keep(1, 4)
    for _ in range(5):
        again = step(model, batch, "pareprop", autocast=autocast)
        assert torch.equal(reference[0], again[0])
        assert_same_on_cuda(again[1], reference[1])
