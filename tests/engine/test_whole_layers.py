"""`steps="layer"`: one step is a whole stock layer."""

import pytest
import torch
from families import FAMILIES, assert_same, cast, linears, rebuilt_steps, step
from test_gradients import assert_finite_differences, beta_for
from test_memory import peak
from test_tape import SideBits

import hf_pareprop as hp
from hf_pareprop.observer import observing
from hf_pareprop.plan import plan_layers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", ["1", "1/2", "1/32", "1/256", "mixed", "mixed, all reversible"])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_engines_agree_with_autograd(name, precision, dropout, beta, depth, rebuilt):
    family = FAMILIES[name]
    model = family.build(depth, dropout, beta=beta_for(beta, depth), steps="layer")
    batch = family.batch()
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=precision == "autocast")
    assert all(torch.isfinite(g).all() for g in grads.values())
    for engine in ("reprop", "pareprop"):
        rebuilt.clear()
        again = step(model, batch, engine, autocast=precision == "autocast")
        assert sorted(rebuilt) == rebuilt_steps(model) and all(index == 0 for _, index in rebuilt)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])


@pytest.mark.parametrize("beta", [1.0, 1 / 32, [0.5, 0, 1.0]])
def test_autograd_engine_agrees_with_finite_differences(family, beta):
    assert_finite_differences(family, beta=beta, steps="layer")


def test_the_recurrence(family):
    """`s[i+1] = L(s[i]) + beta * (s[i-1] - s[i])`, of hidden states before they are merged; L is the layer at beta 0."""
    beta, states = 0.25, []
    model = family.build(4, beta=beta, steps="layer", one_stage=True).eval()
    for layer in model.encoder_layers:
        layer.register_forward_hook(lambda module, args, output: states.append((args[0].detach(), output.detach())))
    with torch.no_grad():
        model(**family.batch())
    coupled, states = states, []
    model.set_beta(0)
    for i, layer in enumerate(model.encoder_layers):
        layer.register_forward_pre_hook(lambda module, args, i=i: (coupled[i][0], *args[1:]))
    with torch.no_grad():
        model(**family.batch())
    before = coupled[0][0]
    for (current, after), (_, stock) in zip(coupled, states, strict=True):
        # The grid rounds by 2**-17, and sums of numbers of this size by as much.
        torch.testing.assert_close(after, stock + beta * (before - current), rtol=0, atol=2**-14)
        before = current


@pytest.mark.parametrize("training", [False, True])
def test_the_stock_model_at_beta_0(family, training):
    """Outputs, hidden states and gradients."""
    stock = family.build_stock(3, 0.1).train(training)
    model = hp.to_reversible(stock, beta=0, steps="layer")
    found = []
    for each in (stock, model):
        each.zero_grad()
        torch.manual_seed(3)
        output = each(**family.batch(), output_hidden_states=True)
        output.loss.backward()
        found.append((output, sorted(p.grad.double().norm().item() for p in each.parameters() if p.grad is not None)))
    (a, norms), (b, again) = found
    assert torch.equal(a.logits, b.logits) and norms == again
    assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))


@pytest.mark.parametrize("steps", ["layer", "sublayer"])
@pytest.mark.parametrize("beta", [0, 0.5])
def test_no_layer_uses_parameters_of_another(family, steps, beta):
    """The hidden state after the first layer depends on all of its parameters: post-LN layers leave out one norm otherwise."""
    model = family.build(3, beta=beta, steps=steps, backward_engine="autograd", one_stage=True)
    first, seen = model.encoder_layers[0], []
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**family.batch())
    # Weighted, because a LayerNorm makes a plain sum of squares nearly constant.
    weights = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0))
    (seen[0] * weights).sum().backward()
    without = {n for n, p in first.named_parameters() if p.grad is None}
    norm = {"output.LayerNorm.weight", "output.LayerNorm.bias"}
    assert without == (norm if family.row.name == "roberta" and steps == "sublayer" else set())
    assert all(p.grad is None for layer in model.encoder_layers[1:] for p in layer.parameters())


@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_side_bits_of_one_step_per_layer(family, engine):
    """Half as many as with two sub-blocks. They are freed layer by layer."""
    found = {}
    for steps in ("layer", "sublayer"):
        model, observer = family.build(4, beta=1 / 16, steps=steps, one_stage=True), SideBits()
        model.set_backward_engine(engine)
        with observing(observer):
            loss = model(**family.batch()).loss
        found[steps] = observer.held()
        loss.backward()
        assert observer.held() == 0
    assert 0 < 2 * found["layer"] == found["sublayer"]
    plan, per_sub_block = (plan_layers(1 / 128, 1, steps=steps)[0] for steps in ("layer", "sublayer"))
    assert (plan.side_bits_of_layer, per_sub_block.side_bits_of_layer) == (7, 14)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_memory_per_added_layer(name):
    """An added layer takes at most 3 % of what plain training stores for it, with both engines."""
    family = FAMILIES[name]
    few, many = ((2, 2), (2, 6)) if family.row.staged else ((2,), (6,))

    def growth(**fields):
        return (peak(family, many, **fields) - peak(family, few, **fields)) / 4

    plain = growth(beta=0.0, backward_engine="autograd", steps="layer")
    assert plain > 100_000
    for engine in ("reprop", "pareprop"):
        for beta in (1.0, 1 / 128):
            assert growth(beta=beta, backward_engine=engine, steps="layer") <= 0.03 * plain


@pytest.mark.parametrize("budget", ["2 layers", "gradients"])
def test_what_is_kept(family, budget):
    model, batch = family.build(4, 0.1, beta=0.5, steps="layer"), family.batch()
    _, reference, _ = step(model, batch, "autograd")
    model.set_memory_budget(budget)
    for _ in range(2):  # what layers keep is measured in the first step
        assert_same(reference, step(model, batch, "pareprop")[1])


def test_adapters_and_frozen_layers(family):
    """Only one linear layer is trained."""
    model, batch = family.build(3, 0.1, beta=0.5, steps="layer"), family.batch()
    model.requires_grad_(False)
    for parameter in linears(model.encoder_layers[1])[-1].parameters():
        parameter.requires_grad_(True)
    found = [step(model, batch, engine)[1] for engine in ("autograd", "reprop", "pareprop")]
    assert len(found[0]) == 2
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_saved_and_loaded(family, tmp_path):
    model = family.build(3, beta=1 / 128, steps="layer").eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert (again.config.steps, again.config.beta) == ("layer", 1 / 128)
    other = type(model).from_pretrained(tmp_path, steps="sublayer").eval()
    assert (other.config.steps, other.config.beta) == ("sublayer", 1 / 128)
    batch = family.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
        assert not torch.equal(model(**batch).logits, other(**batch).logits)
    assert "steps" not in hp.to_stock(again).config.to_dict() if family.has_stock else True


def test_verify_says_what_is_coupled(family):
    from hf_pareprop.tools.budget import bit_budget

    report = hp.verify(family.build(3, beta=0.5, steps="layer"), family.batch())
    assert report.exact
    lines = bit_budget(family.build(3, beta=1 / 128, steps="layer").layer_plans)
    assert any("7 side bits kept per element and layer" in line for line in lines)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1 / 128])
def test_cuda_engines_agree(family, beta, autocast):
    model = family.build(4, 0.1, beta=beta, steps="layer").cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items()}
    loss, grads, _ = step(model, batch, "autograd", autocast=autocast)
    for engine in ("reprop", "pareprop"):
        again = step(model, batch, engine, autocast=autocast)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
