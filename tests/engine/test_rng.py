"""Random numbers are exactly those that plain training draws."""

import pytest
import torch
from families import FAMILIES, assert_same, step
from transformers import set_seed

from hf_pareprop.replay import Conditions, StepContext

ENGINES = ["reprop", "pareprop"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_global_state_after_a_step(family, engine, lane):
    model, batch = family.build(3, 0.3, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")
    again = step(model, batch, engine)
    assert torch.equal(reference[2], again[2])
    assert_same(reference[1], again[1])


@pytest.mark.parametrize("engine", ["autograd", *ENGINES])
def test_same_seed_same_loss_curve(family, engine):
    curves = []
    for _ in range(2):
        model, batch = family.build(2, 0.3, beta=0.5), family.batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.set_backward_engine(engine)
        set_seed(3)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == 4


def test_successive_steps_draw_different_masks(family):
    """Reseeding in the forward, as some implementations do, would draw the same dropout masks in every step."""
    model, batch = family.build(2, 0.3, beta=0.5), family.batch()
    torch.manual_seed(0)
    assert model(**batch).loss.item() != model(**batch).loss.item()


def new_context():
    return StepContext(Conditions([torch.nn.Dropout()], torch.device("cpu")))


def test_a_replay_draws_the_same_numbers():
    """It starts from the generator's state before the step, and leaves the generator as it found it."""
    context, before = new_context(), torch.get_rng_state()
    drawn = context.record(lambda: torch.rand(3))
    torch.rand(5)
    found = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(context.replay(lambda: torch.rand(3)), drawn)
        assert torch.equal(context.replay(lambda: (torch.get_rng_state(), torch.rand(3)))[0], before)
        assert torch.equal(found, torch.get_rng_state())


def test_a_replay_that_draws_other_numbers_is_refused():
    context = new_context()
    context.record(lambda: torch.rand(3))
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        context.replay(lambda: torch.rand(4))


def test_generators_are_moved_only_if_random_numbers_were_drawn():
    context = new_context()
    context.record(lambda: torch.ones(3).mul(2))
    torch.rand(5)
    found = torch.get_rng_state()
    assert torch.equal(context.replay(torch.get_rng_state), found)


def test_the_state_is_restored_when_the_replay_raises():
    context = new_context()
    context.record(lambda: torch.rand(3))
    torch.rand(5)
    found = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        context.replay(lambda: torch.rand(3) / (1 // 0))
    assert torch.equal(found, torch.get_rng_state())


def test_evaluation_stores_no_states():
    family = FAMILIES["roberta"]
    model = family.build(2, 0.5, beta=0.5).eval()
    state = torch.get_rng_state()
    model(**family.batch()).loss.backward()
    assert torch.equal(state, torch.get_rng_state())
