"""The recurrence, exact and not, by itself."""

import pytest
import torch

from hf_pareprop.coupling import (
    advance,
    advance_undoably,
    enter,
    merge_pair,
    phi,
    retreat,
    round_to_grid,
)
from hf_pareprop.packing import pack, unpack, widths
from hf_pareprop.plan import LayerPlan, plan_layers


def test_round_to_grid_is_straight_through():
    x = torch.tensor([0.3, -0.3, 1.125, 5000.3], requires_grad=True)
    y = round_to_grid(x, 2)
    assert y.tolist() == [0.25, -0.25, 1.0, 5000.25]  # 1.125 lies between 1.0 and 1.25: half to even
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_no_grid_changes_nothing():
    x = torch.randn(5)
    assert round_to_grid(x, None) is x


def there_and_back(plan: LayerPlan, scale: float, with_sides: bool = True) -> bool:
    """Whether undoing 96 updates returns the first pair. Phi is a fixed random sequence."""
    torch.manual_seed(0)
    values = [torch.randn(7, 143) * scale for _ in range(96)]
    previous, current = enter(torch.randn(7, 143), plan), enter(torch.randn(7, 143), plan)
    first, sides = (previous, current), []
    for value in values:
        following, kept = advance_undoably(value, previous, plan)
        assert torch.equal(following, advance(value, previous, plan))
        sides.append(kept if with_sides else [torch.zeros(1001, dtype=torch.uint8)])
        previous, current = current, following
    for value in reversed(values):
        previous, current = retreat(value, current, plan, sides.pop()), previous
    return torch.equal(previous, first[0]) and torch.equal(current, first[1])


@pytest.mark.parametrize("grid_bits", [4, 12, 20])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 2**-8, 2**-11, 2**-40])
def test_undoing_a_chain_returns_the_same_bits(beta, grid_bits):
    """In each of the ways in which side bits fill bytes, and for fp32 and fp64 states."""
    assert there_and_back(plan_layers(beta, 1, grid_bits)[0], scale=30.0)


def test_side_bits_are_needed_and_the_range_is_finite():
    """So the check above can fail."""
    plan = plan_layers(2**-8, 1)[0]
    assert there_and_back(plan, scale=900.0)
    assert not there_and_back(plan, scale=900.0, with_sides=False)
    assert not there_and_back(plan, scale=9000.0)


@pytest.mark.parametrize("beta", [0.5, 1 / 16])
def test_the_gradient_of_an_update_is_that_without_a_grid(beta):
    value, previous = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    following = advance(value, previous, plan_layers(beta, 1)[0])
    torch.testing.assert_close(following, value + beta * previous, rtol=0, atol=2 * 2.0**-12)
    following.backward(torch.arange(5.0))
    assert value.grad.tolist() == [0, 1, 2, 3, 4]
    assert previous.grad.tolist() == [beta * i for i in range(5)]


@pytest.mark.parametrize("elements", [0, 1, 8, 1003])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_packing(width, elements):
    values = torch.randint(0, 2**width, (elements,), dtype=torch.uint8)
    packed = pack(values, width)
    assert packed.dtype == torch.uint8 and len(packed) == -(-elements * width // 8)
    assert torch.equal(unpack(packed, width, values.shape), values)


def test_widths_add_up():
    assert [sum(widths(bits)) for bits in range(40)] == list(range(40))
    assert widths(11) == [8, 2, 1]


def test_phi_and_fuse():
    r, f = torch.tensor([2.0]), torch.tensor([3.0])
    assert phi(r, f, 1.0).item() == 3.0
    assert phi(r, f, 0.5).item() == 4.0
    assert phi(r.bfloat16(), f.bfloat16(), 0.5).dtype == torch.float32
    assert merge_pair(torch.tensor([1.0]), torch.tensor([4.0]), 0.5).item() == 3.0
    assert merge_pair(torch.tensor([1.0]), torch.tensor([4.0]), 0.0).item() == 4.0


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


def test_anchors_are_placed_where_they_are_asked_for():
    assert closing(plan_layers(1.0, 96)) == closing(plan_layers(1 / 16, 96)) == [95]
    assert closing(plan_layers(0.5, 24, anchor_every=10)) == [9, 19, 23]


def test_without_a_grid_anchors_are_placed_where_rounding_errors_would_outgrow_fp32():
    assert closing(plan_layers(1.0, 96, grid_bits=None)) == [95]
    assert closing(plan_layers(0.5, 24, grid_bits=None)) == [23]
    assert closing(plan_layers(0.25, 24, grid_bits=None)) == [13, 23]
    with pytest.raises(ValueError, match=r"layers 0 to 19 .* 2\*\*40 times"):
        plan_layers(0.25, 24, grid_bits=None, anchor_every=20)
    with pytest.raises(ValueError, match="raise beta"):
        plan_layers(2**-40, 1, grid_bits=None)


def test_conventional_layers_split_segments():
    plans = plan_layers([0.5, 0.5, 0, 1, 1], 5)
    assert [p.opens for p in plans] == [True, False, False, True, False]
    assert [p.closes for p in plans] == [False, True, False, False, True]


def test_a_finer_grid_or_none_takes_wider_states():
    def state_dtype(beta, grid_bits):
        return plan_layers(beta, 4, grid_bits)[0].state_dtype

    assert {state_dtype(beta, 12) for beta in (1.0, 0.5, 1 / 16)} == {torch.float32}
    assert {state_dtype(beta, 13) for beta in (1.0, 0.5, 1 / 16)} == {torch.float64}
    assert [state_dtype(beta, None) for beta in (1.0, 0.5)] == [torch.float32, torch.float64]
