"""The recurrence and the bit budget, by themselves."""

import pytest
import torch

from hf_pareprop.coupling import RANGE_BITS, advance, enter, fuse, phi, plan_layers, retreat, round_to_grid


def test_round_to_grid_is_straight_through():
    x = torch.tensor([0.3, -0.3, 1.125, 5000.3], requires_grad=True)
    y = round_to_grid(x, 2)
    assert y.tolist() == [0.25, -0.25, 1.0, 5000.25]  # 1.125 lies between 1.0 and 1.25: half to even
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_no_grid_changes_nothing():
    x = torch.randn(5)
    assert round_to_grid(x, None) is x


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.125])
def test_undoing_a_chain_returns_the_same_bits(beta):
    """As many layers as the budget allows in one segment, states up to the range: Phi is a fixed random sequence."""
    layers = 40
    plans = plan_layers(beta, layers)
    length = next(i for i, plan in enumerate(plans) if plan.closes) + 1
    torch.manual_seed(0)
    scale = 2 ** (RANGE_BITS - 7)
    values = [torch.randn(1000) * scale for _ in range(2 * length)]
    previous, current = enter(torch.randn(1000), plans[0]), enter(torch.randn(1000), plans[0])
    first = previous.clone(), current.clone()
    for value in values:
        previous, current = current, advance(value, previous, plans[0])
    for value in reversed(values):
        previous, current = retreat(value, current, plans[0]), previous
    assert torch.equal(previous, first[0])
    assert torch.equal(current, first[1])


def test_one_layer_more_than_the_budget_is_inexact():
    """The budget is not generous: past it, and at the edge of the range, bits are lost. So it can fail."""
    plan = plan_layers(0.5, 1)[0]
    torch.manual_seed(0)
    values = [torch.rand(1000) * 2**11 for _ in range(2 * 36)]
    previous = current = enter(torch.rand(1000), plan)
    first = previous.clone()
    for value in values:
        previous, current = current, advance(value, previous, plan)
    for value in reversed(values):
        previous, current = retreat(value, current, plan), previous
    assert not torch.equal(previous, first)


def test_phi_and_fuse():
    r, f = torch.tensor([2.0]), torch.tensor([3.0])
    assert phi(r, f, 1.0).item() == 3.0
    assert phi(r, f, 0.5).item() == 4.0
    assert phi(r.bfloat16(), f.bfloat16(), 0.5).dtype == torch.float32
    assert fuse(torch.tensor([1.0]), torch.tensor([4.0]), 0.5).item() == 3.0
    assert fuse(torch.tensor([1.0]), torch.tensor([4.0]), 0.0).item() == 4.0


@pytest.mark.parametrize("beta", [0, 1, 1.0, 0.5, 2**-10, [1, 0, 0.5]])
def test_accepted_betas(beta):
    assert len(plan_layers(beta, 3)) == 3


@pytest.mark.parametrize("beta", [0.3, 2, -0.5, -1, float("nan"), "half", None, True, 0.75, [0.5, 0.5, 0.7]])
def test_refused_betas(beta):
    with pytest.raises(ValueError, match="beta="):
        plan_layers(beta, 3)


def test_list_of_the_wrong_length():
    with pytest.raises(ValueError, match="2 entries .* 3 layers"):
        plan_layers([0.5, 0.5], 3)


@pytest.mark.parametrize("fields", [dict(grid_bits=0), dict(grid_bits=42), dict(grid_bits=1.5), dict(anchor_every=0)])
def test_refused_knobs(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        plan_layers(0.5, 3, **fields)


def closing(plans):
    return [i for i, plan in enumerate(plans) if plan.closes]


def test_anchors_are_placed_where_the_budget_ends():
    assert closing(plan_layers(1.0, 96)) == [95]
    assert closing(plan_layers(0.5, 24)) == [23]
    assert closing(plan_layers(0.25, 12)) == [11]
    assert closing(plan_layers(0.25, 24)) == [13, 23]
    assert closing(plan_layers(0.5, 24, anchor_every=10)) == [9, 19, 23]


def test_an_overrun_is_refused():
    with pytest.raises(ValueError, match="layers 0 to 19 need 64 bits"):
        plan_layers(0.25, 24, anchor_every=20)
    with pytest.raises(ValueError, match="need 64 bits"):
        plan_layers(2**-40, 1)


def test_conventional_layers_split_segments():
    plans = plan_layers([0.5, 0.5, 0, 1, 1], 5)
    assert [p.opens for p in plans] == [True, False, False, True, False]
    assert [p.closes for p in plans] == [False, True, False, False, True]
    assert [p.state_dtype for p in plans] == [torch.float64] * 2 + [torch.float32] * 3


def test_a_finer_grid_takes_wider_states():
    assert plan_layers(1.0, 4)[0].state_dtype == torch.float32
    assert plan_layers(1.0, 4, grid_bits=13)[0].state_dtype == torch.float64
