"""The recurrence alone: how numbers become states, undoing updates, and reporting states out of range."""

import math

import pytest
import torch

from hf_pareprop.coupling import (
    advance,
    checksum,
    decode,
    encode,
    merge_pair,
    peak_of,
    phi,
    poison,
    retreat,
    straight_through,
)
from hf_pareprop.packing import pack, unpack, widths
from hf_pareprop.plan import LayerPlan, plan_layers

LOWEST, HIGHEST = -(2**31), 2**31 - 1


def plan_of(beta, grid_bits=16):
    return plan_layers(beta, 1, grid_bits)[0]


def test_a_state_is_the_nearest_whole_number_of_units():
    x = torch.tensor([0.3, -0.3, 1.125, 1.375, 5000.3])  # 1.125 lies between 1.0 and 1.25: half to even
    state, peak = encode(x, 2)
    assert state.dtype == torch.int32 and state.tolist() == [1, -1, 4, 6, 20001]
    assert decode(state, 2, torch.float32).tolist() == [0.25, -0.25, 1.0, 1.5, 5000.25]
    assert peak.item() == pytest.approx(20001.2)
    assert x.tolist() == pytest.approx([0.3, -0.3, 1.125, 1.375, 5000.3])


@pytest.mark.parametrize("grid_bits", [1, 12, 16, 22, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_of_every_dtype(dtype, grid_bits):
    """States are decoded to fp32 at least, in new memory. Encoding the result gives the same state."""
    x = torch.randn(3, 5).to(dtype)
    state, peak = encode(x, grid_bits)
    read = decode(state, grid_bits, dtype)
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert len({tensor.data_ptr() for tensor in (x, state, read)}) == 3
    assert torch.equal(encode(read, grid_bits)[0], state)
    assert (read - x).abs().max() <= (0 if grid_bits is None else 2.0 ** -(grid_bits + 1))
    if grid_bits is not None:
        assert peak == pytest.approx(x.abs().max().item() * 2**grid_bits)


NO_PEAK = torch.zeros(())

VALUES = {
    "ordinary": lambda: 30 * torch.randn(7, 143),
    "at the limit": lambda: 16384 * torch.randn(7, 143),
    "beyond int32": lambda: 1e12 * torch.randn(7, 143),
    "not finite": lambda: torch.randn(7, 143).masked_fill(torch.rand(7, 143) < 0.1, torch.inf).sqrt(),
}


def there_and_back(plan: LayerPlan, values, with_sides: bool = True) -> bool:
    """Whether undoing 96 updates returns the first pair. Phi is a fixed random sequence."""
    torch.manual_seed(0)
    values = [values() for _ in range(96)]
    previous, current = torch.randint(LOWEST, HIGHEST, (2, 7, 143), dtype=torch.int32).unbind()
    first, sides = (previous.clone(), current.clone()), []
    for value in values:
        following, kept, _ = advance(value, previous, plan, NO_PEAK, keep=True)
        again, none, _ = advance(value, previous, plan, NO_PEAK)
        assert torch.equal(following, again) and none == []
        sides.append(kept if with_sides else [torch.zeros_like(bits) for bits in kept])
        previous, current = current, following
    for value in reversed(values):
        previous, current = retreat(value, current, plan, sides.pop()), previous
    return torch.equal(previous, first[0]) and torch.equal(current, first[1])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("grid_bits", [1, 12, 16, 22])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 2**-8, 2**-11, 2**-31])
def test_undoing_a_chain_returns_the_same_bits(beta, grid_bits, values):
    """For every way in which side bits fill bytes, and for values of any size: sums wrap around."""
    assert there_and_back(plan_of(beta, grid_bits), VALUES[values])


@pytest.mark.parametrize("beta", [0.5, 1 / 32, 2**-8])
def test_side_bits_are_needed(beta):
    """A control: without side bits the check above fails."""
    assert not there_and_back(plan_of(beta), VALUES["ordinary"], with_sides=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32])
def test_an_update_is_that_without_a_grid(beta, dtype):
    """Except for the rounding of Phi, by half a unit, and of the previous state, by less than one unit."""
    plan = plan_of(beta)
    value, before = torch.randn(2, 50, dtype=dtype).unbind()
    following, _, _ = advance(value, encode(before, 16)[0], plan, NO_PEAK)
    found = decode(following, 16, dtype)
    torch.testing.assert_close(found, value + beta * before, rtol=0, atol=2 * 2.0**-16)
    assert following.dtype == torch.int32 and found.dtype == dtype


def test_an_update_of_floats():
    """Without a grid, for the engine that stores activations and undoes nothing."""
    following, sides, peak = advance(torch.tensor([1.0]), torch.tensor([3.0]), plan_of(0.25, None), NO_PEAK)
    assert (following.tolist(), sides, peak.item()) == ([1.75], [], 0.0)


def test_gradients_pass_straight_through():
    """Gradients are those of the sum of the terms, in the dtype of each. The value is the state, whatever the terms are."""
    a, b = torch.randn(5, requires_grad=True), torch.randn(5, dtype=torch.bfloat16, requires_grad=True)
    state = torch.arange(5, dtype=torch.int32) * 2**16
    result = straight_through(state, 16, torch.float32, (1.0, a), (0.25, b))
    assert result.tolist() == [0, 1, 2, 3, 4]
    result.backward(torch.arange(5.0))
    assert a.grad.tolist() == [0, 1, 2, 3, 4]
    assert b.grad.tolist() == [0, 0.25, 0.5, 0.75, 1] and b.grad.dtype == torch.bfloat16


def test_gradients_pass_straight_through_in_a_transform():
    state = torch.arange(5, dtype=torch.int32) * 2**16

    def total(a, b):
        return (straight_through(state, 16, torch.float32, (1.0, a), (0.25, b)) * torch.arange(5.0)).sum()

    value = total(torch.randn(5), torch.randn(5))
    grads, found = torch.func.grad_and_value(total, argnums=(0, 1))(torch.randn(5), torch.randn(5))
    assert value == found == 30
    assert [grad.tolist() for grad in grads] == [[0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1]]


def test_the_peak_is_the_largest_magnitude():
    for state, expected in (([3, -7, 5], 7), ([LOWEST, HIGHEST], 2.0**31), ([], 0)):
        peak = peak_of(torch.tensor(state, dtype=torch.int32))
        assert (peak.shape, peak.dtype, peak.item()) == ((), torch.float32, expected)
    assert peak_of(torch.tensor([1.0, math.nan, 2.0])).isnan()


@pytest.mark.parametrize(
    "of", [encode, lambda x, bits: advance(x, torch.zeros(3, dtype=torch.int32), plan_of(1, bits), NO_PEAK)]
)
def test_values_that_leave_the_range_are_told(of):
    """At 16 bits the limit is 16384, where the sum of two still fits into int32. Wrapping around does not hide an overflow."""
    for value, right in ((16383.9, True), (-16383.9, True), (16384.0, False), (2.0**20, False), (math.inf, False)):
        assert poison(of(torch.tensor([0.0, value, 1.0]), 16)[-1]).isnan() == (not right)
    assert poison(of(torch.tensor([math.nan, 1.0, 1.0]), 16)[-1]).isnan()
    assert poison(of(torch.tensor([1.0, 1.0, 1.0]), 16)[-1]).item() == 0


def test_states_that_leave_the_range_are_told():
    """Two numbers are within the range, and their sum is not."""
    previous, _ = encode(torch.tensor([9000.0]), 16)
    assert poison(advance(torch.tensor([7000.0]), previous, plan_of(1.0), NO_PEAK)[2]).item() == 0
    assert poison(advance(torch.tensor([8000.0]), previous, plan_of(1.0), NO_PEAK)[2]).isnan()
    assert poison(advance(torch.tensor([8000.0]), previous, plan_of(0.5), NO_PEAK)[2]).item() == 0


def test_a_checksum_tells_states_apart():
    """It changes if one bit is flipped, rows change places, or the two states of a pair are swapped."""
    torch.manual_seed(0)
    a, b = torch.randint(LOWEST, HIGHEST, (2, 6, 7, 5), dtype=torch.int32).unbind()
    found = checksum(a, b)
    assert (found.shape, found.dtype) == ((), torch.int64) and found == checksum(a.clone(), b.clone())
    others = [checksum(b, a), checksum(a), checksum(a.roll(1, 0), b), checksum(a.roll(1, 1), b)]
    for bit in range(32):
        changed = a.clone()
        changed[3, 4, 2] ^= -(2**31) if bit == 31 else 2**bit
        others.append(checksum(changed, b))
    assert len({found.item(), *(other.item() for other in others)}) == 1 + len(others)


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


def test_phi_and_the_end_of_a_segment():
    r, f = torch.tensor([2.0]), torch.tensor([3.0])
    assert phi(r, f, 1.0).item() == 3.0
    assert phi(r, f, 0.5).item() == 4.0
    assert phi(r.bfloat16(), f.bfloat16(), 0.5).dtype == torch.float32
    assert merge_pair(torch.tensor([1.0]), torch.tensor([4.0]), 0.5).item() == 3.0
    assert merge_pair(torch.tensor([1.0]), torch.tensor([4.0]), 1.0).item() == 2.5


@pytest.mark.parametrize("beta", [0, 1, 1.0, 0.5, 2**-10, 2**-31, [1, 0, 0.5], (1, 0, 0.5)])
def test_accepted_betas(beta):
    assert len(plan_layers(beta, 3)) == 3


@pytest.mark.parametrize(
    "beta", [0.3, 2, -0.5, -1, float("nan"), "half", None, True, 0.75, 2**-32, [0.5, 0.5, 0.7], [0.5, None, 0.5]]
)
def test_refused_betas(beta):
    with pytest.raises(ValueError, match="beta="):
        plan_layers(beta, 3)


def test_list_of_the_wrong_length():
    with pytest.raises(ValueError, match="2 entries .* 3 layers"):
        plan_layers([0.5, 0.5], 3)


@pytest.mark.parametrize("grid_bits", [0, 23, 1.5, -1, True, "16"])
def test_refused_grids(grid_bits):
    with pytest.raises(ValueError, match="grid_bits=.* is not a whole number from 1 to 22"):
        plan_layers(0.5, 3, grid_bits)


def test_what_a_plan_says():
    plans = plan_layers([1, 0, 0.5, 1 / 32, 2**-31], 5)
    assert [plan.reversible for plan in plans] == [True, False, True, True, True]
    assert [plan.side_bits for plan in plans] == [0, 0, 1, 5, 31]
    assert {plan.limit for plan in plans} == {16384}
    assert [plan_of(0.5, bits).limit for bits in (1, 12, 22, None)] == [2**29, 262144, 256, math.inf]
    assert plan_of(0.5, None).side_bits == 0
