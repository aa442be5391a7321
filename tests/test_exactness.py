"""RebuiltStep states against the originals, at depth, with bf16 compute: where other reversible implementations drift."""

import pytest
import torch
from families import assert_same, cast, gradients, step

import hf_pareprop as hp


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.125, 1 / 16])
@pytest.mark.parametrize("depth", [12, 24])
def test_rebuilt_states_are_bit_equal(family, depth, beta, precision):
    model = family.build(depth, 0.1, beta=beta)
    batch = family.batch()
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = hp.verify(model, batch)
    assert sorted(report.rebuilt) == list(range(depth))  # layer 0's inputs are the embeddings
    assert set(report.rebuilt.values()) == {0.0}
    assert report.exact and report.gradients_equal and report.gradient_error == 0


def test_without_the_grid_states_drift(family):
    """The check above can fail: the same model without the grid is what everybody else trains."""
    model = family.build(24, beta=1.0, grid_bits=None, scale=12.0)
    with torch.autocast("cpu", torch.bfloat16):
        report = hp.verify(model, family.batch())
    assert not report.exact
    assert report.rebuilt[0] > 0
    assert report.gradient_error > 1e-3
    assert "off by up to" in str(report)


def test_verify_leaves_the_model_as_it_was(family):
    model = family.build(2, 0.1, beta=0.5, backward_engine="reprop")
    batch = family.batch()
    rng = torch.get_rng_state()
    assert hp.verify(model, batch).exact
    assert torch.equal(rng, torch.get_rng_state())
    assert model.config.backward_engine == "reprop"
    assert all(p.grad is None for p in model.parameters())
    assert "new_tape" not in vars(model.base_model)


def test_verify_without_labels(family):
    batch = family.batch()
    del batch["labels"]
    assert hp.verify(family.build(2, beta=0.5).eval(), batch).exact


def test_verify_needs_an_engine_that_rebuilds(family):
    with pytest.raises(ValueError, match="rebuilds nothing"):
        hp.verify(family.build(2, backward_engine="autograd"), family.batch())


def test_a_configuration_without_a_grid_is_refused_where_errors_explode(family):
    with pytest.raises(ValueError, match="magnify rounding errors"):
        family.build(24, beta=0.25, grid_bits=None, anchor_every=24)


def test_a_compiled_model_runs_its_layers_as_they_are_rebuilt(family):
    """Compiled kernels in the forward and eager ones in the recomputation would differ in bits: layers stay eager."""
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    model.set_backward_engine("pareprop")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = compiled(**batch).loss
    loss.backward()
    assert graphs and not any("scaled_dot_product_attention" in graph for graph in graphs)
    assert torch.equal(loss, reference[0])
    assert_same(reference[1], gradients(model))
