"""Layers that change the shape of the hidden state run again in the backward pass, with the same gradients or an error."""

from itertools import pairwise

import pytest
import torch
from families import assert_same, gradients
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_pareprop.engine import get_engine
from hf_pareprop.memory_probe import SavedBytes
from hf_pareprop.plan import plan_layers
from hf_pareprop.retention import Retention
from hf_pareprop.tape import Tape

ENGINES = ["reprop", "pareprop"]
DEPTHS, TRANSITIONS = [2, 3, 2], {2, 5}
BETAS = [1.0, 0.5, 1 / 32, [0, 1, 0.5, 0.5, 0.5, 1, 1], [1, 1, 0, 1, 1, 0.5, 0.5]]


class Block(nn.Module):
    """Two steps of width `before`. If `after` is another width, it also pools tokens in pairs and is a transition."""

    def __init__(self, before, after, dropout):
        super().__init__()
        self.pools = before != after
        self.first, self.second = nn.LayerNorm(before), nn.LayerNorm(after)
        self.attention, self.widen = nn.Linear(before, 3 * after), nn.Linear(before, after)
        self.mlp, self.dropout = nn.Linear(after, after), nn.Dropout(dropout)

    def forward(self, hidden, mask, *, tape):
        dtype = tape.dtype

        def pooled(tokens):
            return nn.functional.avg_pool1d(tokens.transpose(1, 2), 2).transpose(1, 2) if self.pools else tokens

        def attention_step(state, mask):
            normed = self.first(state.to(dtype))
            query, key, value = (pooled(part)[:, None] for part in self.attention(normed).chunk(3, dim=-1))
            mask = mask[:, :, : query.shape[2], : query.shape[2]]
            branch = nn.functional.scaled_dot_product_attention(query, key, value, mask)[:, 0]
            return pooled(self.widen(normed)) if self.pools else state, self.dropout(branch)

        def mlp_step(state, mask):
            return state, self.dropout(torch.tanh(self.mlp(self.second(state.to(dtype)))))

        return tape.layer(self, (attention_step, mlp_step), hidden, (mask,))


class Pyramid(nn.Module):
    def __init__(self, dropout=0.0, beta=0.5):
        super().__init__()
        torch.manual_seed(0)
        widths = [8, 8, 8, 16, 16, 16, 32, 32]
        self.blocks = nn.ModuleList(Block(*pair, dropout) for pair in pairwise(widths))
        self.mask = nn.Parameter(torch.randn(1, 1, 12, 12))
        self.beta, self.engine, self.retention = beta, "autograd", Retention()

    def forward(self, tokens, every_stage=False):
        plans = plan_layers(self.beta, DEPTHS, transitions=TRANSITIONS)
        tape = Tape(get_engine(self.engine), plans, self.retention)
        hidden, found = tape.start(tokens), []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, self.mask, tape=tape)
            if every_stage and i + 1 in (2, 5):
                found.append(tape.finish(hidden).square().mean())
        return tape.finish(hidden).square().mean() + sum(found)


def tokens(requires_grad=True):
    return torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def step(model, engine, autocast=False, **options):
    model.engine = engine
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(inputs := tokens(), **options)
    loss.backward()
    return loss.detach(), {"inputs": inputs.grad, **gradients(model)}, torch.get_rng_state()


def assert_equal_steps(a, b):
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    assert_same(a[1], b[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("every_stage", [False, True])
def test_gradients(engine, beta, dropout, autocast, every_stage, lane):
    model = Pyramid(dropout, beta)
    reference = step(model, "autograd", autocast, every_stage=every_stage)
    assert_equal_steps(reference, step(model, engine, autocast, every_stage=every_stage))


def test_what_is_stored():
    """The hidden state that a transition reads is stored, and not its activations. At beta 0 activations are stored."""

    def saved(engine, beta):
        model = Pyramid(beta=beta)
        model.engine = engine
        meter = SavedBytes(model.parameters())
        with meter.counting():
            _loss = model(tokens())
        return meter.total

    transitions_stored = [1, 1, 0, 1, 1, 0, 1]
    assert saved("reprop", 1.0) < saved("reprop", transitions_stored) < saved("autograd", 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_runs_again_once_and_in_its_turn(engine, rebuilt):
    step(Pyramid(beta=[1, 1, 1, 1, 1, 0, 1]), engine)
    expected = [(6, 1), (6, 0), (4, 1), (4, 0), (3, 1), (3, 0), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)]
    assert rebuilt == expected


@pytest.mark.parametrize("budget", ["1 layer", "3 layers", "6 layers", "1TB", "1KB", "20KB", "gradients"])
def test_budgets_count_the_layers_of_all_stages(budget, rebuilt):
    model = Pyramid(0.2)
    reference = step(model, "autograd")
    model.retention = Retention(budget, model.parameters)
    for _ in range(3):
        rebuilt.clear()
        assert_equal_steps(reference, step(model, "pareprop"))
    if "layer" in budget:
        assert {position for position, _ in rebuilt} == set(range(7 - int(budget[0])))
    if budget == "1TB":
        assert not rebuilt
    if "KB" in budget:
        ((sizes),) = model.retention.measured.values()
        assert set(sizes) == {(0, False), (1, False), (1, True), (2, False), (2, True)}
        meter = SavedBytes(model.parameters())
        with meter.counting():
            model(tokens())
        kept, bound = meter.total, int(budget[:-2]) * 1024
        model.retention = Retention()
        meter = SavedBytes(model.parameters())
        with meter.counting():
            model(tokens())
        assert kept <= meter.total + bound


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "frozen", [["blocks.0", "blocks.1"], ["blocks.0", "blocks.1", "blocks.2"], ["blocks.2", "mask"], ["blocks.5"]]
)
def test_frozen_parameters(engine, frozen):
    model = Pyramid(0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    assert_equal_steps(step(model, "autograd"), step(model, engine))


def begun(engine, dropout=0.2):
    model = Pyramid(dropout, beta=[1, 1, 1, 0, 0, 0, 0])  # nothing is rebuilt above the transition
    reference = step(model, "autograd")
    model.engine = engine
    model.zero_grad()
    torch.manual_seed(2)
    return model, model(tokens()), reference


def eval_mode(model):
    model.eval()


def hooked(model):
    model.blocks[2].mlp.weight.register_hook(lambda grad: grad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [eval_mode, hooked])
def test_what_is_changed_before_the_backward_pass_is_replayed(engine, change):
    model, loss, reference = begun(engine)
    change(model)
    loss.backward()
    assert_same({n: g for n, g in reference[1].items() if n != "inputs"}, gradients(model))


def replaced(model):
    model.blocks[2].mlp = nn.Linear(16, 16)


def other_input(model):
    model.mask.data.add_(1.0)


def other_weight(model):
    model.blocks[2].mlp.weight.data.add_(1.0)


def other_dropout(model):
    model.blocks[2].dropout.p = 0.9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [replaced, other_input, other_weight, other_dropout])
def test_what_cannot_be_replayed_is_refused(engine, change):
    model, loss, _ = begun(engine)
    change(model)
    with pytest.raises(RuntimeError, match="rebuilt|pass, and|drew other random numbers"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_modified_parameter_is_noticed(engine):
    model, loss, _ = begun(engine)
    with torch.no_grad():
        model.blocks[2].mlp.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_kernel_of_the_forward_pass_is_used_again(engine):
    model = Pyramid(beta=1.0)
    found = []
    for name in ("autograd", engine):
        model.engine = name
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(tokens())
        loss.backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_retained_graph_and_a_freed_one(engine):
    model, found = Pyramid(0.2), []
    for name in ("autograd", engine):
        model.engine = name
        model.zero_grad()
        torch.manual_seed(2)
        loss = model(tokens())
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(model))
    assert_same(*found)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", [0.5, [0, 0, 1, 0, 0, 0, 0]], ids=str)
def test_second_derivatives(engine, beta):
    model, found = Pyramid(0.2, beta), []
    for name in ("autograd", engine):
        model.engine = name
        model.zero_grad()
        torch.manual_seed(2)
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            loss = model(tokens())
            (first,) = torch.autograd.grad(loss, model.blocks[2].mlp.weight, create_graph=True)
            first.square().sum().backward()
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_inside_sees_what_a_loss_can_use(engine, rebuilt):
    """The layer is rebuilt all the same, and the hook runs once."""
    model = Pyramid(beta=[0, 0, 1, 0, 0, 0, 0])
    seen = []
    model.blocks[2].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    found = []
    for name in ("autograd", engine):
        seen.clear()
        model.engine = name
        model.zero_grad()
        (model(tokens()) + seen[0].square().mean()).backward()
        found.append(gradients(model))
    assert_same(*found)
    assert rebuilt == [(2, 0)] and len(seen) == 1
