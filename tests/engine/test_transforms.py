"""Backward passes that are batched or compiled: many gradients at once, for Jacobians, and compiled autograd."""

import pytest
import torch
from families import FAMILIES, assert_same, gradients

from hf_pareprop import lanes

ENGINES = ["reprop", "pareprop"]
WORKER = lanes.ThreadLane()


@pytest.fixture(params=ENGINES)
def engine(request):
    with lanes.replaced(lambda device: WORKER):
        yield request.param


def by_autograd(logits, parameters, directions):
    return torch.autograd.grad(logits, parameters, directions, is_grads_batched=True, allow_unused=True)


def by_vmap(logits, parameters, directions):
    def one(direction):
        found = torch.autograd.grad(logits, parameters, direction, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros(()) if gradient is None else gradient for gradient in found)

    return torch.vmap(one)(directions)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("jacobian", [by_autograd, by_vmap])
def test_jacobian_of_the_logits(family, engine, jacobian, dropout):
    """One backward pass for all directions. The rebuild itself is not batched, so dropout is replayed as always."""
    model, batch = family.build(3, dropout, beta=0.5, attn_implementation="eager"), family.batch()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for name in ("autograd", engine):
        model.set_backward_engine(name)
        torch.manual_seed(3)
        logits = model(**batch).logits
        directions = torch.eye(logits.numel()).view(-1, *logits.shape)
        gradients = jacobian(logits, parameters, directions)
        found.append({str(i): gradient for i, gradient in enumerate(gradients) if gradient is not None})
    assert any(gradient.abs().sum() > 0 for gradient in found[0].values())
    assert_same(*found)


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["roberta", pytest.param("vit", marks=pytest.mark.every_case)])
@pytest.mark.parametrize("engine", ["reprop", pytest.param("pareprop", marks=pytest.mark.every_case)])
def test_compiled_autograd(name, engine):
    family = FAMILIES[name]
    model, batch, found = family.build(1, 0.1, beta=0.5), family.batch(), []
    for each in ("autograd", engine):
        model.set_backward_engine(each)
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**batch).loss
        torch._dynamo.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        found.append(gradients(model))
    assert found[0]
    assert_same(*found)
