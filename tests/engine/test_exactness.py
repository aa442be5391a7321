"""Compare rebuilt states with the originals in deep models with bf16, where other reversible implementations drift."""

import pytest
import torch
from families import cast, linears, rebuilt_steps

import hf_pareprop as hp
from hf_pareprop.observer import Observer, current_observer, observing
from hf_pareprop.tools.verify import Report


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 256])
@pytest.mark.parametrize("depth", [12, 24])
def test_rebuilt_states_are_bit_equal(family, depth, beta, precision):
    model = family.build(depth, 0.1, beta=beta)
    batch = family.batch()
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = hp.verify(model, batch)
    reversible = [i for i, plan in enumerate(model.base_model.layer_plans) if plan.reversible]
    assert report.rebuilt == dict.fromkeys(reversed(reversible), 0)  # layer 0's inputs are the embeddings
    assert report.exact and report.gradients_equal and report.gradient_error == 0
    assert 0 < report.largest < report.limit == 16384
    assert str(report) == (
        f"{len(reversible)} reversible layers: rebuilt states bit-equal, gradients bit-equal, loss bit-equal; "
        f"states up to {report.largest:.3g} of 16384"
    )


def test_of_a_hybrid_the_reversible_layers_are_rebuilt(family):
    model = family.build(5, 0.1, beta=[0, 0.5, 0, 1 / 256, 1])
    report = hp.verify(model, family.batch())
    assert report.exact and report.gradients_equal
    assert report.rebuilt == {i: 0 for i, step in rebuilt_steps(model) if step == 1} == {4: 0, 3: 0} | report.rebuilt


def call_counted(model, change):
    """Replace the output of the last linear layer of the second layer by ``change(result, call)``. Calls count from 1."""
    dense, calls = linears(model.encoder_layers[1])[-1], []
    original = dense.forward

    def forward(x):
        calls.append(1)
        return change(original(x), len(calls))

    dense.forward = forward


@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_a_layer_that_computes_something_else_is_noticed(family, engine, beta):
    """A control for the check above: one element changes by less than a thousandth."""
    model = family.build(4, beta=beta, backward_engine=engine)

    def change(result, call):
        result.view(-1)[0] += 2.0**-11 * call
        return result

    call_counted(model, change)
    with pytest.raises(RuntimeError, match="are not those of the forward pass"):
        hp.verify(model, family.batch())


def test_wrong_gradients_of_right_states_are_noticed(family):
    """A layer returns the same numbers at every call, but its gradient changes."""
    model = family.build(4, beta=0.5)
    call_counted(model, lambda result, call: result + call * (result - result.detach()))
    report = hp.verify(model, family.batch())
    assert report.exact and not report.gradients_equal
    assert report.gradient_error > 1e-3
    assert "gradients off by up to" in str(report)


@pytest.mark.parametrize("calls", [{1, 2}, {3}])
def test_gradients_of_other_parameters_are_noticed(family, calls):
    """A layer uses a parameter with the value 0 only when it is rebuilt, or only in the reference run."""
    model = family.build(4, beta=0.5, backward_engine="reprop")
    extra = model.encoder_layers[1].extra = torch.nn.Parameter(torch.zeros(()))
    call_counted(model, lambda result, call: result + extra if call in calls else result)
    report = hp.verify(model, family.batch())
    assert report.exact and not report.gradients_equal and report.gradient_error == float("inf")


def test_a_report_of_wrong_states():
    report = Report(rebuilt={1: 0, 0: 3}, largest=2.0, limit=16384.0, gradient_error=0.25)
    assert not report.exact and not Report(loss_equal=True, rebuilt={0: 1}).exact
    assert str(report) == (
        "2 reversible layers: rebuilt states different in 3 elements, gradients off by up to 2.5e-01 (relative), "
        "loss different; states up to 2 of 16384"
    )


def test_verify_leaves_the_model_as_it_was(family):
    model = family.build(2, 0.1, beta=0.5, backward_engine="reprop")
    batch = family.batch()
    rng, mine = torch.get_rng_state(), Observer()
    with observing(mine):
        assert hp.verify(model, batch).exact
        assert current_observer() is mine
    assert torch.equal(rng, torch.get_rng_state())
    assert model.config.backward_engine == "reprop"
    assert all(p.grad is None for p in model.parameters())


def test_verify_without_labels(family):
    batch = family.batch()
    del batch["labels"]
    assert hp.verify(family.build(2, beta=0.5).eval(), batch).exact


def test_verify_needs_an_engine_that_rebuilds(family):
    with pytest.raises(ValueError, match="rebuilds nothing"):
        hp.verify(family.build(2, backward_engine="autograd"), family.batch())
