"""Whatever users do around a training step, gradients are bit for bit those of plain autograd, or an exception is raised.

An event is something that a user does. Each event runs around one training step of a model of six layers, with the `autograd`
engine, which stores everything, and with the engines that rebuild.
"""

import copy
import gc
import threading
from functools import partial

import pytest
import torch
from families import FAMILIES, adaptable, assert_same, cast, gradients, linears, put, rebuilt_steps, step
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hf_pareprop import lanes, replay
from hf_pareprop.retention import share_out

WORKER = lanes.ThreadLane()
BETAS = [1.0, 0.5, 1 / 32, 1 / 256]

REFUSED = "are not those of the forward pass|set_backward_engine\\('autograd'\\)|modified by an inplace operation"


@pytest.fixture(params=["reprop", "pareprop"])
def engine(request):
    """The engines. `pareprop` overlaps even if the cores of this machine are busy."""
    with lanes.replaced(lambda device: WORKER):
        yield request.param


def layers(model):
    return model.encoder_layers


def last_stage(model):
    """The ModuleList with the layers of the last or only stage, which has at least two thirds of the layers."""
    return model.base_model.encoder.stages()[-1]


def loss_of(model, batch):
    return model(**batch).loss


def outcome(event, model, batch, engine):
    """The gradients by name after ``event``, which trains one step of a copy of ``model``."""
    model = copy.deepcopy(model)
    model.set_backward_engine(engine)
    torch.manual_seed(7)
    event(model, batch)
    return gradients(model)


def assert_right(event, model, batch, engine):
    reference = outcome(event, model, batch, "autograd")
    assert sum(g.abs().sum() for g in reference.values()) > 0
    assert_same(reference, outcome(event, model, batch, engine))


# Between the layers


def changing(change):
    def event(model, batch):
        layers(model)[2].register_forward_hook(lambda module, args, output: change(output))
        loss_of(model, batch).backward()

    return event


def add_in_place(hidden):
    hidden.add_(0.3)


def learned_prompt(model, batch):
    """Deep prompt tuning: learned states in place of the first two tokens of a layer's input."""
    width = linears(layers(model)[3])[-1].out_features
    prompt = nn.Parameter(torch.linspace(-1, 1, 2 * width).view(2, width))
    model.register_parameter("prompt", prompt)

    def put(module, args):
        return (torch.cat([prompt.expand(len(args[0]), -1, -1), args[0][:, 2:]], dim=1), *args[1:])

    layers(model)[3].register_forward_pre_hook(put)
    loss_of(model, batch).backward()


def auxiliary(where, weight=1.0):
    """A loss on the output of a layer, in addition to the model's own loss or alone."""

    def event(model, batch):
        kept = []
        layers(model)[where].register_forward_hook(lambda module, args, output: kept.append(output))
        (weight * loss_of(model, batch) + kept[0].sin().mean()).backward()

    return event


def auxiliary_alone(model, batch):
    kept = []
    layers(model)[3].register_forward_hook(lambda module, args, output: kept.append(output))
    loss_of(model, batch)
    kept[0].sin().mean().backward()


def of_hidden_states(model, batch):
    outputs = model(**batch, output_hidden_states=True)
    (outputs.loss + sum(state.float().sin().mean() for state in outputs.hidden_states)).backward()


def of_one_hidden_state_alone(model, batch):
    model(**batch, output_hidden_states=True).hidden_states[-2].float().sin().mean().backward()


def detached_by_a_pre_hook(model, batch):
    layers(model)[3].register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(), *args[1:]))
    loss_of(model, batch).backward()


def detached_by_a_wrapper(model, batch):
    layer = layers(model)[3]
    layer.forward = lambda hidden, *args, forward=layer.forward, **kwargs: forward(hidden.detach(), *args, **kwargs)
    loss_of(model, batch).backward()


class Elsewhere(torch.autograd.Function):
    """A view of its first argument whose gradient goes to the second."""

    @staticmethod
    def forward(ctx, hidden, other):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def gradient_sent_elsewhere(model, batch):
    other = nn.Parameter(torch.zeros(()))
    model.register_parameter("other", other)

    def send(module, args):
        return (Elsewhere.apply(args[0].detach(), other.expand_as(args[0])), *args[1:])

    layers(model)[3].register_forward_pre_hook(send)
    loss_of(model, batch).backward()


def large_hidden_states(model, batch):
    """Hidden states beyond 2**24 units, where fp32 cannot hold all bits of a state."""
    with torch.no_grad():
        bias = linears(layers(model)[1])[-1].bias
        bias.copy_(1000 * torch.linspace(-1, 1, len(bias)))
    of_hidden_states(model, batch)


BETWEEN = {
    "detached by a pre-hook": detached_by_a_pre_hook,
    "detached by a wrapper": detached_by_a_wrapper,
    "gradient sent elsewhere": gradient_sent_elsewhere,
    "large hidden states": large_hidden_states,
    "steering": changing(lambda hidden: hidden + 0.3),
    "copied": changing(lambda hidden: hidden.clone()),
    "detached": changing(lambda hidden: hidden.detach()),
    "replaced by a constant": changing(lambda hidden: torch.full_like(hidden, 0.1)),
    "scaled in place": changing(add_in_place),
    "normalised": changing(lambda hidden: nn.functional.normalize(hidden, dim=-1)),
    "transposed memory": changing(lambda hidden: hidden.transpose(0, 1).contiguous().transpose(0, 1)),
    "gradient scaled": changing(lambda hidden: hidden.detach() + 0.5 * (hidden - hidden.detach())),
    "deep prompt": learned_prompt,
    "auxiliary loss, first layer": auxiliary(0),
    "auxiliary loss, middle": auxiliary(2),
    "auxiliary loss, last layer": auxiliary(5),
    "auxiliary loss alone": auxiliary_alone,
    "hidden states": of_hidden_states,
    "one hidden state alone": of_one_hidden_state_alone,
}


@pytest.mark.parametrize("beta", [*BETAS, [0.5, 0, 1, 0.25, 0.25, 1]], ids=str)
@pytest.mark.parametrize("event", BETWEEN.values(), ids=BETWEEN)
def test_hidden_states_between_layers(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


@pytest.mark.parametrize(
    "change", [lambda h: h[:, :3], lambda h: h.mean(1, keepdim=True), lambda h: torch.cat([h, h])]
)
def test_a_hidden_state_of_another_shape_is_refused(family, change):
    model = family.build(4, beta=0.5)
    layers(model)[2].register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(RuntimeError, match="has to keep the shape"):
        model(**family.batch())


def test_hidden_states_are_those_of_the_autograd_engine(family):
    """Nothing is stored for them but a pair of states each: the engine does not fall back to `autograd`."""
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    found = []
    for engine in ("autograd", "reprop"):
        model.set_backward_engine(engine)
        torch.manual_seed(3)
        found.append(model(**batch, output_hidden_states=True).hidden_states)
    assert len(found[0]) == 1 + model.config.num_hidden_layers  # or stages, of a Swin
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Inside the layers


def captured(part, observe):
    """An auxiliary loss on an activation that was taken from inside a layer."""

    def event(model, batch):
        kept = []
        observe(part(layers(model)[1]), kept)
        (loss_of(model, batch) + 10 * kept[0].float().pow(2).mean()).backward()

    return event


def by_hook(module, kept):
    module.register_forward_hook(
        lambda m, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )


def by_pre_hook(module, kept):
    module.register_forward_pre_hook(lambda m, args: kept.append(args[0]))


def by_patched_forward(module, kept):
    original = module.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        kept.append(output[0] if isinstance(output, tuple) else output)
        return output

    module.forward = forward


def input_by_patched_forward(module, kept):
    original = module.forward

    def forward(first, *args, **kwargs):
        kept.append(first)
        return original(first, *args, **kwargs)

    module.forward = forward


PARTS = {
    "attention": lambda layer: getattr(layer, "attention", None) or layer.attn,
    "attention output": lambda layer: linears(layer)[-3],
    "intermediate": lambda layer: linears(layer)[-2],
    "norm": lambda layer: next(module for module in layer.modules() if isinstance(module, nn.LayerNorm)),
}


OBSERVE = [by_hook, by_pre_hook, by_patched_forward, input_by_patched_forward]


@pytest.mark.parametrize("observe", OBSERVE)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_loss_on_an_activation_inside_a_layer(family, engine, part, observe, rebuilt):
    """The layer is rebuilt all the same."""
    model = family.build(6, 0.1, beta=0.5)
    assert_right(captured(part, observe), model, family.batch(), engine)
    assert rebuilt == rebuilt_steps(model)[::-1]


@pytest.mark.parametrize("observe", OBSERVE)
def test_such_a_loss_alone(family, engine, observe):
    """The backward pass begins inside the chain: what is above is rebuilt on the way, and gets no gradient."""

    def event(model, batch):
        kept = []
        observe(PARTS["intermediate"](layers(model)[2]), kept)
        loss_of(model, batch)
        kept[0].float().pow(2).mean().backward()

    model, batch = family.build(6, 0.1, beta=0.5), family.batch()
    assert_right(event, model, batch, engine)
    assert not any(name.startswith("classifier") for name in outcome(event, model, batch, engine))


def one_after_the_other(model, batch):
    """The losses have no step in common that is freed by the first: the second goes on above it."""
    kept = []
    by_hook(PARTS["norm"](layers(model)[1]), kept)
    loss = loss_of(model, batch)
    upper = [parameter for layer in layers(model)[3:] for parameter in layer.parameters()]
    kept[0].float().pow(2).mean().backward()
    found = torch.autograd.grad(loss, upper, allow_unused=True)
    for parameter, gradient in zip(upper, found, strict=True):
        parameter.grad = gradient


def ends_and_begins_inside(model, batch):
    """The gradient of the upper layers first, and then, from where that ended, of the lower ones."""
    kept = []
    by_hook(PARTS["intermediate"](layers(model)[2]), kept)
    loss = loss_of(model, batch)
    (gradient,) = torch.autograd.grad(loss, kept)
    kept[0].backward(gradient)


@pytest.mark.parametrize("event", [one_after_the_other, ends_and_begins_inside])
@pytest.mark.parametrize("beta", BETAS)
def test_backward_passes_that_end_inside(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def counting(register):
    """Hooks that only look are called as often as in plain training, and see the same."""

    def event(model, batch, seen):
        for module in [module for layer in layers(model) for module in linears(layer)]:
            getattr(module, register)(lambda module, args, *output: seen.append((output or args)[0].detach().sum()))
        loss_of(model, batch).backward()

    return event


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_only_looks_runs_once(family, engine, register):
    model, batch, found = family.build(4, 0.1, beta=0.5), family.batch(), []
    for name in ("autograd", engine):
        seen = []
        outcome(lambda model, batch, seen=seen: counting(register)(model, batch, seen), model, batch, name)
        found.append(seen)
    assert len(found[0]) == sum(len(linears(layer)) for layer in layers(model))
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def of_every_sample(model, batch):
    """Norms of the gradients of every sample, as Opacus computes them: hooks store activations, and count calls on parameters."""
    found = {}

    def forward(module, args, output):
        module.activations.append(args[0].detach())
        for parameter in module.parameters(recurse=False):
            parameter.calls += 1

    def backward(name, module, grads_in, grads_out):
        activations = module.activations.pop()
        for parameter in module.parameters(recurse=False):
            parameter.calls -= 1
            assert parameter.calls == 0
        rows = (tensor.flatten(1, -2) for tensor in (grads_out[0], activations))
        found[name] = torch.einsum("bti,btj->bij", *rows).flatten(1).norm(dim=1)

    for i, layer in enumerate(layers(model)):
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.activations = []
                for parameter in module.parameters(recurse=False):
                    parameter.calls = 0
                module.register_forward_hook(forward)
                module.register_full_backward_hook(partial(backward, f"{i}.{name}"))
    loss_of(model, batch).backward()
    return found


def test_gradients_of_every_sample(family, engine):
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    found = []
    for name in ("autograd", engine):
        outcome(lambda model, batch: found.append(of_every_sample(model, batch)), model, batch, name)
    assert len(found[0]) > 20
    assert_same(*found)


def returning(module, args, output):
    return 1.5 * output


def in_place(module, args, output):
    output.mul_(1.5)


def with_kept_graph(module, args, output):
    return output + 0.1 * output.sin()  # which saves the output for its own gradient


@pytest.mark.parametrize("change", [returning, in_place, with_kept_graph])
def test_a_hook_that_changes_an_activation_runs_again(family, engine, change):
    def event(model, batch):
        linears(layers(model)[1])[-2].register_forward_hook(change)
        loss_of(model, batch).backward()

    assert_right(event, family.build(4, 0.1, beta=0.5), family.batch(), engine)


def add_to_the_input(module, args):
    args[0].add_(1)


@pytest.mark.parametrize("name", ["autograd", "engine"])
def test_a_saved_activation_that_is_modified(family, engine, name):
    """Plain autograd refuses that as well: the activation's gradient would be computed from other numbers."""

    def event(model, batch):
        dense = linears(layers(model)[1])[-1]
        dense.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
        dense.register_forward_pre_hook(add_to_the_input)
        loss_of(model, batch).backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outcome(event, family.build(3, beta=0.5), family.batch(), engine if name == "engine" else name)


def by_the_layer_itself(model, batch):
    """An activation is modified after a nonlinearity has saved it."""
    inner, original = linears(layers(model)[1])[-2], linears(layers(model)[1])[-2].forward
    inner.forward = lambda x: original(x).tanh().add_(1)
    loss_of(model, batch).backward()


@pytest.mark.parametrize("budget", [None, "3 layers", "1TB"])  # the last one is measured in this step
def test_a_layer_that_modifies_what_it_saves(family, engine, budget):
    for name in ("autograd", engine):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outcome(by_the_layer_itself, family.build(3, beta=0.5, memory_budget=budget), family.batch(), name)


def test_a_stored_layer_that_modifies_what_it_saves_while_it_is_measured(family):
    """Bytes of a new shape of batch are counted by hooks, where PyTorch does not check versions by itself."""

    def event(model, batch):
        model.set_memory_budget("1TB")
        loss_of(model, batch).backward()
        by_the_layer_itself(model, {name: tensor[:2] for name, tensor in batch.items()})

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outcome(event, family.build(3, beta=0.5), family.batch(), "reprop")


def test_a_step_that_modifies_its_state(engine):
    """The first norm of a ViT's layer reads the state itself."""
    family = FAMILIES["vit"]

    def event(model, batch):
        layers(model)[1].layernorm_after.forward = lambda hidden: hidden.add_(1)
        loss_of(model, batch)

    for name in ("autograd", engine):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outcome(event, family.build(3, beta=0.5), family.batch(), name)


@pytest.mark.parametrize("where", [0, 1, 3])
def test_a_step_that_runs_a_third_time_is_checked(family, engine, where):
    """One backward pass ends inside a step, and another one begins there: meanwhile a module was replaced."""
    model, kept = family.build(4, beta=0.5), []
    by_hook(PARTS["intermediate"](layers(model)[where]), kept)
    model.set_backward_engine(engine)
    loss = loss_of(model, family.batch())
    (gradient,) = torch.autograd.grad(loss, kept)
    put(layers(model)[where], -1, copy.deepcopy(linears(layers(model)[where])[-1]))
    with torch.no_grad():
        linears(layers(model)[where])[-1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        kept[0].backward(gradient)


def test_a_hook_that_computes_a_loss(family, engine):
    """It runs once, so that the loss is there once, and autograd stores what it needs."""

    def event(model, batch):
        found = []
        linears(layers(model)[1])[-2].register_forward_hook(lambda m, args, output: found.append(output.pow(3).mean()))
        (loss_of(model, batch) + sum(found)).backward()
        assert len(found) == 1

    assert_right(event, family.build(4, 0.1, beta=0.5), family.batch(), engine)


def test_a_global_hook(family, engine):
    kept = []

    def event(model, batch):
        kept.clear()
        loss = loss_of(model, batch)
        (loss + sum(o.float().sin().mean() for o in kept)).backward()

    def keep(module, args, output):
        if isinstance(module, nn.LayerNorm):
            kept.append(output)

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        assert_right(event, family.build(3, 0.1, beta=0.5), family.batch(), engine)
    finally:
        handle.remove()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_inside_a_layer(family, engine, register):
    """They see the gradients of a rebuilt layer, and may change them, as in any other layer."""
    calls = []

    def double(module, *grads):
        calls.append(module)
        return tuple(None if g is None else 2 * g for g in grads[0])

    def event(model, batch):
        getattr(linears(layers(model)[1])[-1], register)(double)
        loss_of(model, batch).backward()

    assert_right(event, family.build(4, beta=0.5), family.batch(), engine)
    assert len(calls) == 2


# What layers there are


def begins_at(stage):
    """The index of the first layer that keeps the shape of the hidden state."""
    return int(stage[0].changes_shape)


def truncated(model, batch):
    del last_stage(model)[-3:]
    loss_of(model, batch).backward()


def topped(model, batch):
    first = begins_at(last_stage(model))
    del last_stage(model)[first : first + 2]
    loss_of(model, batch).backward()


def shared(model, batch):
    last_stage(model)[-2] = last_stage(model)[-1]
    loss_of(model, batch).backward()


def repeated(model, batch):
    last_stage(model).append(last_stage(model)[-2])
    loss_of(model, batch).backward()


def reversed_order(model, batch):
    stage = last_stage(model)
    first = begins_at(stage)
    for i, layer in enumerate(reversed(list(stage)[first:])):
        stage[first + i] = layer
    loss_of(model, batch).backward()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("event", [truncated, topped, shared, repeated, reversed_order])
def test_layers_changed_after_construction(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def test_a_list_of_betas_has_to_fit_the_layers(family):
    model = family.build(4, beta=[1, 0.5, 0, 1])
    del last_stage(model)[0]
    with pytest.raises(ValueError, match="4 entries but the model has 3 layers"):
        model(**family.batch())


def test_a_layer_that_runs_twice_in_one_pass_is_refused(family):
    model = family.build(3, beta=0.5)
    layer = layers(model)[-1]
    original = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: original(original(hidden, *args, **kwargs), *args, **kwargs)
    with pytest.raises(RuntimeError, match="more than 3 layers were called"):
        model(**family.batch())


# Conditions and values that change between the forward pass and its backward


def evaluated(model, batch):
    loss = loss_of(model, batch)
    model.eval()
    loss.backward()
    assert not any(module.training for module in model.modules())


def with_other_kernels(model, batch):
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(model, batch)
    loss.backward()


def with_kernels_of_the_backward(model, batch):
    loss = loss_of(model, batch)
    with sdpa_kernel(SDPBackend.MATH):
        loss.backward()


def without_mkldnn(model, batch):
    with torch.backends.mkldnn.flags(enabled=False):
        loss = loss_of(model, batch)
    loss.backward()


def with_another_default_dtype(model, batch):
    loss = loss_of(model, batch)
    torch.set_default_dtype(torch.float64)
    try:
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)


def switched_attention(model, batch):
    loss = loss_of(model, batch)
    model.set_attn_implementation("eager")
    loss.backward()


CONDITIONS = [evaluated, with_other_kernels, with_kernels_of_the_backward, without_mkldnn, with_another_default_dtype]
CONDITIONS += [switched_attention]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("event", CONDITIONS)
def test_conditions_of_the_forward_pass_are_replayed(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def test_kernels_that_are_chosen_in_the_forward_pass(family, engine):
    """PyTorch sets the order in which it tries the kernels of attention when attention runs for the first time."""
    model, seen = family.build(3, beta=0.5), []
    first = linears(layers(model)[0])[0]
    run = first.forward

    def choosing(hidden):
        torch.backends.mkldnn.set_flags(False)
        seen.append(torch.backends.mkldnn.enabled)
        return run(hidden)

    def as_found(hidden):
        seen.append(torch.backends.mkldnn.enabled)
        return run(hidden)

    model.set_backward_engine(engine)
    try:
        first.forward = choosing
        loss = loss_of(model, family.batch())
        first.forward = as_found
        loss.backward()
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert seen == ([False] if engine == "autograd" else [False, False])


def functional(model, batch):
    """Parameters and buffers for one call of the model, other than its own."""
    given = {n: (p.detach() * 0.9).requires_grad_() for n, p in model.named_parameters()}
    functional_call(model, given, (), batch).loss.backward()
    for name, parameter in model.named_parameters():
        parameter.grad = given[name].grad


def computed_parameters(model, batch):
    """Parameters that are computed, as in hypernetworks: the gradient goes on to what they were computed from."""
    factor = nn.Parameter(torch.ones(()))
    given = {n: p.detach() * factor for n, p in model.named_parameters()}
    functional_call(model, given, (), batch).loss.backward()
    model.register_parameter("factor", factor)


def replaced_parameter(model, batch):
    loss = loss_of(model, batch)
    dense = linears(layers(model)[1])[-1]
    before, dense.weight = dense.weight, nn.Parameter(torch.zeros_like(dense.weight))
    loss.backward()
    dense.weight = before


def frozen_afterwards(model, batch):
    loss = loss_of(model, batch)
    linears(layers(model)[1])[-1].weight.requires_grad_(False)
    loss.backward()


def weight_norm(model, batch):
    nn.utils.parametrizations.weight_norm(linears(layers(model)[2])[-1])
    loss_of(model, batch).backward()


def shared_weight(model, batch):
    linears(layers(model)[2])[-1].weight = linears(layers(model)[4])[-1].weight
    loss_of(model, batch).backward()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "event", [functional, computed_parameters, replaced_parameter, frozen_afterwards, weight_norm, shared_weight]
)
def test_parameters_as_the_forward_pass_saw_them(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def replaced_module(model, batch):
    loss = loss_of(model, batch)
    put(layers(model)[2], -1, copy.deepcopy(linears(layers(model)[3])[-1]))
    loss.backward()


def written_past_the_version(model, batch):
    loss = loss_of(model, batch)
    linears(layers(model)[1])[-1].weight.data = linears(layers(model)[1])[-1].weight.data * 1.1
    loss.backward()


def modified_buffer(model, batch):
    layer = layers(model)[1]
    layer.register_buffer("shift", torch.zeros(()))
    dense, original = linears(layer)[-1], linears(layer)[-1].forward
    dense.forward = lambda x: original(x) + layer.shift
    loss = loss_of(model, batch)
    layer.shift.add_(1)
    loss.backward()


def with_every_call_other(model, batch, change):
    """Run a training step with a layer whose result is ``change(result, call)``. Calls are counted."""
    calls = []
    dense, original = linears(layers(model)[1])[-1], linears(layers(model)[1])[-1].forward

    def forward(x):
        calls.append(1)
        return change(original(x), len(calls))

    dense.forward = forward
    loss_of(model, batch).backward()


def not_a_function(model, batch):
    with_every_call_other(model, batch, lambda result, call: result + call)


def other_rows(model, batch):
    """The same numbers in another order of rows, which a plain sum would not notice."""
    with_every_call_other(model, batch, lambda result, call: result.roll(call, dims=0))


REFUSABLE = [replaced_module, written_past_the_version, modified_buffer, not_a_function, other_rows]


def other_input_of_a_kept_result(model, batch):
    """Change the input of a kept result: because the result is given, the states do not show the change."""
    calls = []
    inner, original = linears(layers(model)[1])[-2], linears(layers(model)[1])[-2].forward
    inner.forward = lambda x: calls.append(1) or original(x).roll(len(calls), dims=0)
    loss_of(model, batch).backward()


@pytest.mark.parametrize("event", [other_input_of_a_kept_result, not_a_function, other_rows, replaced_module])
def test_what_cannot_be_replayed_is_refused_where_results_are_kept(family, engine, event):
    model, batch = family.build(6, beta=0.5), family.batch()
    kept = budget_for_linears(model, batch)

    def keeping(model, batch):
        model.set_memory_budget(kept)
        loss_of(model, batch).backward()  # measures
        model.zero_grad()
        event(model, batch)

    with pytest.raises(RuntimeError, match=REFUSED):
        outcome(keeping, model, batch, engine)


def budget_for_linears(model, batch):
    """A budget that keeps the results of linear layers in all layers, and nothing else."""
    model = copy.deepcopy(model)
    model.set_memory_budget("1TB")
    loss_of(model, batch)
    (sizes,) = model.base_model.retention.measured.values()
    layers = [sizes[plan.stage, plan.transition] for plan in model.base_model.layer_plans]
    kept = sum(size.linears for size in layers)
    assert share_out(kept, layers)[:2] == (0, len(layers))
    return f"{kept / 1024}KB"


def switched_on_afterwards(model, batch):
    """A parameter that only the rebuild uses, and that changes nothing: it gets no gradient, as in plain autograd."""
    dense, original = linears(layers(model)[1])[-1], linears(layers(model)[1])[-1].forward
    dense.extra = nn.Parameter(torch.zeros(()))
    dense.on = False
    dense.forward = lambda x: original(x) + dense.extra if dense.on else original(x)
    loss = loss_of(model, batch)
    dense.on = True
    loss.backward()
    assert dense.extra.grad is None


def test_a_parameter_that_only_the_rebuild_uses(family, engine):
    assert_right(switched_on_afterwards, family.build(4, beta=0.5), family.batch(), engine)


def test_a_backward_pass_in_inference_mode_is_refused(family, engine):
    """In inference mode a rebuild would have no graph."""
    model = family.build(4, beta=0.5, backward_engine=engine)
    for layer in layers(model):
        layer.requires_grad_(False)
    loss = loss_of(model, family.batch())
    with pytest.raises(RuntimeError, match="within torch.inference_mode"), torch.inference_mode():
        loss.backward()


def test_dropout_that_was_changed(family, engine):
    """It is noticed even in a branch that adds nothing, where the states do not show it."""
    model, batch = family.build(4, 0.3, beta=0.5), family.batch()
    layer = layers(model)[1]
    with torch.no_grad():
        linears(layer)[-1].weight.zero_()
    inner, original = linears(layer)[-2], linears(layer)[-2].forward
    dropout = nn.Dropout(0.3)
    inner.forward = lambda x: dropout(original(x))
    model.set_backward_engine(engine)
    loss = loss_of(model, batch)
    dropout.p = 0.0
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        loss.backward()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapped_layer(family, engine):
    def event(model, batch):
        last_stage(model)[-2] = Wrapper(last_stage(model)[-2])
        loss_of(model, batch).backward()

    assert_right(event, family.build(4, 0.1, beta=0.5), family.batch(), engine)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("event", REFUSABLE)
def test_what_cannot_be_replayed_is_refused(family, engine, beta, event):
    with pytest.raises(RuntimeError, match=REFUSED):
        outcome(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def test_nothing_wrong_is_accumulated_before_the_check(family, engine):
    """Every layer is checked before its gradients leave it. Above a wrong layer they are right, and below there are none."""
    model, batch = family.build(6, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")[1]
    model.zero_grad()
    model.set_backward_engine(engine)
    loss = loss_of(model, batch)
    put(layers(model)[2], -1, copy.deepcopy(linears(layers(model)[3])[-1]))
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    found = gradients(model)
    assert all(parameter.grad is not None for parameter in layers(model)[4].parameters())
    below = [p for module in (model.get_input_embeddings(), *layers(model)[:3]) for p in module.parameters()]
    if family.row.name == "roberta":  # the layer above has applied the norm that ends the wrong layer
        below = [p for p in below if not any(p is norm for norm in layers(model)[2].output.LayerNorm.parameters())]
    assert all(parameter.grad is None for parameter in below)
    assert all(torch.equal(grad, reference[name]) for name, grad in found.items())


def test_the_check_sees_a_backward_pass_of_a_few_layers(family, engine):
    """`torch.autograd.grad` for parameters of upper layers never reaches the bottom of the chain."""
    model, batch = family.build(6, beta=0.5), family.batch()
    model.set_backward_engine(engine)
    loss = loss_of(model, batch)
    put(layers(model)[4], -1, copy.deepcopy(linears(layers(model)[3])[-1]))
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(loss, list(layers(model)[3].parameters()))


def spectral(register):
    def event(model, batch):
        register(linears(layers(model)[2])[-1])
        loss_of(model, batch).backward()

    return event


def test_a_parametrization_that_changes_its_buffers_is_refused(family, engine):
    """Spectral normalisation changes its buffers at every use in training."""
    event = spectral(nn.utils.parametrizations.spectral_norm)
    with pytest.raises(RuntimeError, match="changes its buffer .*set_backward_engine"):
        outcome(event, family.build(4, beta=0.5), family.batch(), engine)


def test_the_older_spectral_norm_is_refused(family, engine):
    with pytest.raises(RuntimeError, match="changes its buffer .*set_backward_engine"):
        outcome(spectral(nn.utils.spectral_norm), family.build(4, beta=0.5), family.batch(), engine)


def test_a_mask_that_is_overwritten(engine):
    """A padding mask of the size of the attention mask, which the model reads without copying it."""
    family = FAMILIES["roberta"]
    model, batch = family.build(4, beta=0.5, attn_implementation="eager"), family.batch()
    batch["attention_mask"] = torch.zeros(3, 1, 11, 11)

    def event(model, batch):
        mask = batch["attention_mask"].clone()
        loss = model(**{**batch, "attention_mask": mask}).loss
        mask.fill_(-1e4)
        loss.backward()

    with pytest.raises(RuntimeError, match=REFUSED):
        outcome(event, model, batch, engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beta", BETAS)
def test_a_learned_mask(engine, precision, attention, beta):
    """PyTorch chooses other kernels for a mask that needs a gradient, so the forward pass has to run with one."""
    family = FAMILIES["roberta"]
    model, batch = family.build(6, beta=beta, attn_implementation=attention), family.batch()
    dtype = torch.float32
    if precision == "bf16":
        model, batch, dtype = model.to(torch.bfloat16), cast(batch, torch.bfloat16), torch.bfloat16
    bias = torch.linspace(-2, 2, 11 * 11).view(1, 1, 11, 11).expand(3, 4, 11, 11).to(dtype)
    found = []
    for name in ("autograd", engine):
        mask = bias.clone().requires_grad_()
        _, grads, _ = step(model, {**batch, "attention_mask": mask}, name)
        found.append({**grads, "mask": mask.grad})
    assert found[0]["mask"].abs().sum() > 0
    assert_same(*found)


def with_a_foreign_parameter(model, batch):
    """A layer uses a parameter of another module. Its gradient flows through the graph of the forward pass."""
    scale = nn.Parameter(torch.ones(()))
    model.register_parameter("scale", scale)
    dense, original = linears(layers(model)[1])[-1], linears(layers(model)[1])[-1].forward
    dense.forward = lambda x: original(x) * scale
    loss_of(model, batch).backward()
    assert scale.grad is not None


def test_a_tensor_that_the_layer_does_not_own(family, engine):
    assert_right(with_a_foreign_parameter, family.build(3, 0.1, beta=0.5), family.batch(), engine)


def test_an_adapter_that_is_switched(family, engine):
    """Before training two adapters compute the same, so the states do not show which one ran: the gradients do."""
    peft = pytest.importorskip("peft")
    model = family.build(3, beta=0.5)
    config = peft.LoraConfig(target_modules=adaptable(model), r=2)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    model.base_model.model.set_backward_engine(engine)
    loss = model(**family.batch()).loss
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match="lora_A.default.weight in the forward pass, and .*lora_A.other.weight in the backward"
    ):
        loss.backward()


# Numbers of any size


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("planted, grid_bits", [(9e3, 16), (3e4, 12), (1e6, 8)])
def test_large_states_are_exact(family, engine, beta, planted, grid_bits):
    def event(model, batch):
        with torch.no_grad():
            linears(layers(model)[3])[-1].bias[5] = planted
        loss_of(model, batch).backward()

    assert_right(event, family.build(6, beta=beta, grid_bits=grid_bits), family.batch(), engine)


@pytest.mark.parametrize("engine", ["autograd", "reprop", "pareprop"])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
@pytest.mark.parametrize("value", [3e4, -1e6, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_what_leaves_the_range_reaches_the_loss(family, engine, beta, value, where):
    model = family.build(6, beta=beta, backward_engine=engine)
    with torch.no_grad():
        linears(layers(model)[where])[-1].bias[1] = value
    with pytest.warns(UserWarning, match="the outputs of that forward pass are NaN"):
        loss = loss_of(model, family.batch())
    assert loss.isnan()
    loss.backward()


@pytest.mark.parametrize("engine", ["autograd", "reprop", "pareprop"])
def test_a_peak_inside_the_chain_reaches_the_loss(family, engine):
    """A state leaves the range and comes back. Integers that wrap around would hide it."""
    model = family.build(6, beta=1.0, backward_engine=engine)
    with torch.no_grad():
        linears(layers(model)[4])[-3].bias[3] = -20000
        linears(layers(model)[5])[-3].bias[3] = 20000
    with pytest.warns(UserWarning, match="reached 2e\\+04, and at grid_bits=16 they have to stay below 16384"):
        assert loss_of(model, family.batch()).isnan()


@pytest.mark.parametrize("engine", ["autograd", "reprop", "pareprop"])
def test_a_nan_in_one_sample(engine):
    family = FAMILIES["vit"]
    model, batch = family.build(3, beta=0.5, backward_engine=engine), family.batch()
    batch["pixel_values"][1, 0, 3, 3] = float("nan")
    with pytest.warns(UserWarning, match="held an infinity or a NaN"):
        assert loss_of(model, batch).isnan()


def test_a_nan_reaches_a_loss_on_what_a_hook_sees(family):
    model = family.build(4, beta=0.5)
    kept = []
    with torch.no_grad():
        linears(layers(model)[1])[-1].bias[1] = float("nan")
    layers(model)[2].register_forward_hook(lambda module, args, output: kept.append(output))
    with pytest.warns(UserWarning, match="held an infinity or a NaN"):
        model(**family.batch())
    assert kept[0].sin().mean().isnan()


# Threads, random numbers


def test_two_models_in_two_threads(engine):
    """Each step gives the results that it would give alone."""
    models = {name: FAMILIES[name].build(4, beta=0.5) for name in FAMILIES}
    references = {name: step(model, FAMILIES[name].batch(), "autograd")[1] for name, model in models.items()}
    trouble = []

    def train(name):
        model, batch = models[name], FAMILIES[name].batch()
        model.set_backward_engine(engine)
        try:
            for _ in range(15):
                model.zero_grad()
                loss_of(model, batch).backward()
                assert_same(references[name], gradients(model))
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=train, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble


def test_a_thread_that_draws_random_numbers_is_noticed(family, engine):
    """It draws between the two dropouts of a step, so the step cannot be replayed."""
    model, batch = family.build(4, 0.3, beta=0.5), family.batch()
    dense, original = linears(layers(model)[1])[-1], linears(layers(model)[1])[-1].forward
    calls = []

    def forward(x):
        calls.append(1)
        if len(calls) == 1:  # in the forward pass
            thread = threading.Thread(target=torch.rand, args=(3,))
            thread.start()
            thread.join()
        return original(x)

    dense.forward = forward
    model.set_backward_engine(engine)
    loss = loss_of(model, batch)
    with pytest.raises(RuntimeError, match="draws? (other )?random numbers"):
        loss.backward()


def test_the_check_would_notice_dropout_that_is_not_replayed(family, monkeypatch):
    """A control: if generators are not restored, every step with dropout is refused."""
    monkeypatch.setattr(replay, "generators", lambda device: [])
    with pytest.raises(RuntimeError, match="are not those of the forward pass"):
        step(family.build(3, 0.3, beta=0.5), family.batch(), "reprop")


# Ways to run a step


def checkpointed(reentrant):
    def event(model, batch):
        anchor = torch.ones((), requires_grad=True)

        def run(anchor):
            return loss_of(model, batch) * anchor

        checkpoint(run, anchor, use_reentrant=reentrant).backward()

    return event


def saved_by_hooks(model, batch):
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, batch)
    loss.backward()


def in_another_thread(model, batch):
    loss = loss_of(model, batch)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


def of_several_parts(model, batch):
    """Compute the gradients of the upper layers first, then all gradients."""
    loss = loss_of(model, batch)
    torch.autograd.grad(loss, list(layers(model)[4].parameters()), retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("beta", [1.0, 1 / 32])
@pytest.mark.parametrize(
    "event",
    [checkpointed(False), checkpointed(True), saved_by_hooks, in_another_thread, of_several_parts],
    ids=["checkpointed", "checkpointed, reentrant", "saved by hooks", "in another thread", "of several parts"],
)
def test_ways_to_run_a_step(family, engine, beta, event):
    assert_right(event, family.build(6, 0.1, beta=beta), family.batch(), engine)


def upper_part_then_a_middle_one(model, batch):
    """A backward pass begins at a layer that an earlier one, of the layers above, has come to."""
    kept = []
    layer = layers(model)[2]

    def forward(*args, original=layer.forward, **kwargs):
        kept.append(original(*args, **kwargs))
        return kept[-1]

    layer.forward = forward
    loss = loss_of(model, batch)
    torch.autograd.grad(loss, list(layers(model)[3].parameters()), retain_graph=True, allow_unused=True)
    kept[0].sum().backward()


def test_a_partial_backward_leaves_nothing_for_the_next(family, engine):
    assert_right(upper_part_then_a_middle_one, family.build(5, beta=0.5), family.batch(), engine)


@pytest.mark.slow
def test_a_failed_step_leaves_no_memory_behind(family, engine):
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    model.set_backward_engine(engine)

    def failing_step():
        model.zero_grad()
        loss = loss_of(model, batch)
        with torch.no_grad():
            linears(layers(model)[2])[-1].weight.mul_(1.0)
        with pytest.raises(RuntimeError):
            loss.backward()

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    failing_step()
    model.zero_grad()
    before = tensors()
    for _ in range(3):
        failing_step()
    model.zero_grad()
    assert tensors() == before


def test_torch_func_needs_the_autograd_engine(family):
    model, batch = family.build(3, beta=0.5), family.batch()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (), batch).loss

    model.set_backward_engine("pareprop")
    with pytest.raises(RuntimeError, match="torch.func .*set_backward_engine"):
        torch.func.grad(loss)(parameters)
    reference = step(model, batch, "autograd")[1]
    found = torch.func.grad(loss)(parameters)
    assert_same(reference, {name: found[name] for name in reference})


def test_a_traced_model(family):
    model, batch = family.build(3, beta=0.5).eval(), family.batch()
    model.set_backward_engine("autograd")
    del batch["labels"]
    names = list(batch)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *values):
            return self.model(**dict(zip(names, values, strict=True))).logits

    traced = torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
    others = {n: v.flip(0) for n, v in batch.items()}
    assert torch.equal(traced(*others.values()), model(**others).logits)


def test_dynamic_quantisation_reaches_every_linear_layer(family):
    model = family.build(3, beta=0.5).eval()
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = sum("quantized" in type(module).__module__ for module in quantised.modules())
    assert linears > 0 and not any(type(module) is nn.Linear for module in quantised.modules())
    assert found >= linears
    assert quantised(**family.batch()).logits.isfinite().all()
