"""Compare every engine with plain autograd through the same network, for all combinations of options.

Gradients are bit-equal: a state receives two gradients (from the step that reads it and from the step after), a sum of two
terms does not depend on their order, and everything else is computed by the same kernels on the same bits.
"""

import pytest
import torch
from families import FAMILIES, assert_same, cast, gradients, step

BETAS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "1/32": 1 / 32, "1/256": 1 / 256}
MIXED = {"mixed": (0.5, 0, 1.0, 0.25, 0), "mixed, all reversible": (1 / 256, 1.0, 1 / 32, 0.5, 1.0)}


def beta_for(name: str, depth: int):
    return list(MIXED[name][:depth]) if name in MIXED else BETAS[name]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", [*BETAS, *MIXED])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_engines_agree_with_autograd(name, attention, precision, dropout, beta, depth):
    family = FAMILIES[name]
    if attention == "sdpa" and not family.model._supports_sdpa:
        pytest.skip("it has no SDPA")
    model = family.build(depth, dropout, beta=beta_for(beta, depth), attn_implementation=attention)
    batch = family.batch()
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=precision == "autocast")
    assert all(torch.isfinite(g).all() for g in grads.values())
    for engine in ("reprop", "pareprop"):
        again = step(model, batch, engine, autocast=precision == "autocast")
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 256, [0.5, 0, 1.0]])
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_gradient_of_the_input(beta, engine, lane):
    """The gradient of inputs_embeds has to be right as well."""
    family = FAMILIES["roberta"]
    model = family.build(3, 0.1, beta=beta)
    batch = family.batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    found = []
    for name in ("autograd", engine):
        leaf = embeds.clone().requires_grad_()
        step(model, {**batch, "inputs_embeds": leaf}, name)
        found.append(leaf.grad)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_gradient_of_the_image():
    family = FAMILIES["vit"]
    model = family.build(3, beta=0.5)
    batch = family.batch()
    found = []
    for engine in ("autograd", "pareprop"):
        pixels = batch["pixel_values"].clone().requires_grad_()
        step(model, {**batch, "pixel_values": pixels}, engine)
        found.append(pixels.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 1 / 32, [0.5, 0, 1.0]])
def test_autograd_engine_agrees_with_finite_differences(family, beta):
    """The reference is compared with central differences along a random direction, in fp64 and without a grid.

    (With a grid the function is piecewise constant.) With a step e = 1e-7 the rounding error is eps * |loss| / e = 2e-9 and
    the truncation error e^2, both relative to a directional derivative of order 1. A larger step would cross kinks of max
    pooling; with 1e-5 it crosses several in this MViT.
    """
    assert_finite_differences(family, beta=beta)


def assert_finite_differences(family, **fields):
    model = family.build(3, grid_bits=None, scale=1.0, **fields).double()
    batch = cast(family.batch(), torch.float64)
    _, grads, _ = step(model, batch, "autograd")
    torch.manual_seed(3)
    direction = {n: torch.randn_like(g) for n, g in grads.items()}
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(direction[name], alpha=sign * 1e-7)
            losses.append(model(**batch).loss.item())
            for name, parameter in model.named_parameters():
                parameter.sub_(direction[name], alpha=sign * 1e-7)
    numeric = (losses[0] - losses[1]) / 2e-7
    analytic = sum((grads[n] * direction[n]).sum().item() for n in grads)
    assert numeric == pytest.approx(analytic, rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, 1 / 256])
def test_lanes_agree(family, beta, lane):
    model, batch = family.build(4, 0.1, beta=beta), family.batch()
    assert_same(step(model, batch, "autograd")[1], step(model, batch, "pareprop")[1])


def test_more_threads_than_one(family):
    """The worker thread has to use as many intra-op threads as the forward pass; otherwise kernels round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, batch = family.build(3, 0.1, beta=0.5), family.batch()
        assert_same(step(model, batch, "autograd")[1], step(model, batch, "pareprop")[1])
    finally:
        torch.set_num_threads(threads)


def test_chunked_feed_forward():
    family = FAMILIES["roberta"]
    model, batch = family.build(3, 0.1, beta=0.5, chunk_size_feed_forward=4), family.batch()
    assert_same(step(model, batch, "autograd")[1], step(model, batch, "pareprop")[1])


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("grid_bits", [4, 12, 20, 22])
def test_grids(family, grid_bits, beta):
    """On a coarse grid the model computes something else, but its gradients are exact as well."""
    model, batch = family.build(5, 0.1, beta=beta, grid_bits=grid_bits), family.batch()
    assert_same(step(model, batch, "autograd")[1], step(model, batch, "pareprop")[1])


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_backward_inside_an_autocast_region(family, engine, forward):
    """The backward pass runs in the autocast region of the forward pass, or in a region of its own.

    A weight cast that was cached without gradients in the forward pass would cut the gradients of the rebuild. And autocast
    that was off in the forward pass must not be on in the rebuild.
    """
    model, batch = family.build(2, beta=0.5), family.batch()
    found = []
    for name in ("autograd", engine):
        model.set_backward_engine(name)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=forward, dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        found.append(gradients(model))
    assert_same(*found)
