"""One tape per forward pass: what users do between a forward and its backward."""

import gc
import weakref
from itertools import takewhile

import pytest
import torch
from families import FAMILIES, adaptable, assert_same, gradients, linears, put, rebuilt_steps, step

from hf_pareprop.layer_call import named_parameters_of
from hf_pareprop.observer import Observer, observing

ENGINES = ["reprop", "pareprop"]


@pytest.fixture(params=ENGINES)
def engine(request, lane):
    return request.param


def losses_in(model, engine, *batches):
    model.set_backward_engine(engine)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    return [model(**batch).loss for batch in batches]


def other(batch):
    return {k: v.flip(0) for k, v in batch.items()}


def test_two_forwards_before_one_backward(family, engine):
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    found = []
    for name in ("autograd", engine):
        sum(losses_in(model, name, batch, other(batch))).backward()
        found.append(gradients(model))
    assert_same(*found)


def test_backwards_in_the_order_of_the_forwards(family, engine):
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    found = []
    for name in ("autograd", engine):
        for loss in losses_in(model, name, batch, other(batch)):
            loss.backward()
        found.append(gradients(model))
    assert_same(*found)


def test_two_models_interleaved(engine):
    text, image = (FAMILIES[name].build(3, 0.1, beta=0.5) for name in ("roberta", "vit"))
    batches = [FAMILIES[name].batch() for name in ("roberta", "vit")]
    found = []
    for name in ("autograd", engine):
        loss = losses_in(text, name, batches[0])[0] * losses_in(image, name, batches[1])[0]
        loss.backward()
        found.append({**gradients(text), **gradients(image)})
    assert_same(*found)


def test_autograd_grad_of_a_few_parameters(family, engine):
    """Gradients of the upper layers only: the rebuild that was begun for the layer below must not disturb the next step."""
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    wanted = [p for linear in linears(model.encoder_layers[2])[-3:] for p in linear.parameters()]
    found = []
    for name in ("autograd", engine):
        (loss,) = losses_in(model, name, batch)
        found.append(dict(enumerate(torch.autograd.grad(loss, wanted))))
    assert_same(*found)
    assert_same(step(model, batch, "autograd")[1], step(model, batch, engine)[1])


def test_backward_twice_through_a_retained_graph(family, engine):
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    found = []
    for name in ("autograd", engine):
        (loss,) = losses_in(model, name, batch)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(model))
    assert_same(*found)


class SideBits(Observer):
    """The bytes of packed side bits in memory, and how many there were after each rebuild."""

    def __init__(self):
        self.kept = []
        self.after_rebuilds = []

    def layer_keeps(self, position, tensors):
        self.kept += [weakref.ref(tensor) for tensor in tensors if tensor.dtype == torch.uint8]

    def step_rebuilt(self, position, step, rebuilt):
        self.after_rebuilds.append(self.held())

    def held(self):
        return sum(bits.nbytes for ref in self.kept if (bits := ref()) is not None)


@pytest.mark.parametrize("side_bits", [1, 4, 5, 8])
def test_side_bits_live_from_the_forward_to_their_step(family, engine, side_bits):
    """They are freed as steps are undone, unless the graph is retained."""
    model, batch, observer = family.build(2, beta=2**-side_bits), family.batch(), SideBits()
    sizes = []  # of every step

    def count(layer, args):
        size = sum(-(-args[0].numel() * width // 8) for width in (4, 1, 8) if width & side_bits)
        sizes.extend((size, size))

    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(count)
    with observing(observer):
        (loss,) = losses_in(model, engine, batch)
    assert observer.held() == sum(sizes)
    loss.backward(retain_graph=True)
    assert observer.after_rebuilds == [sum(sizes)] * 4
    observer.after_rebuilds.clear()
    loss.backward()
    assert observer.after_rebuilds == [sum(sizes[:n]) for n in (4, 3, 2, 1)] and observer.held() == 0


def test_a_freed_graph_is_noticed(family, engine):
    (loss,) = losses_in(family.build(3), engine, family.batch())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def below(model):
    """The parameters of what comes before the layers."""
    first = next(model.encoder_layers[0].parameters())
    return list(takewhile(lambda parameter: parameter is not first, model.parameters()))


def of_layers(model, *indices):
    return [parameter for i in indices for parameter in model.encoder_layers[i].parameters()]


FROZEN = {
    "embeddings": below,
    "prefix": lambda model: below(model) + of_layers(model, 0, 1),
    "only the head": lambda model: below(model) + model.base_model.layer_parameters(),
    "a middle layer": lambda model: of_layers(model, 1),
    "the last layers": lambda model: of_layers(model, 1, 2),
    "attentions": lambda model: [
        p for layer in model.encoder_layers for m in linears(layer)[:-2] for p in m.parameters()
    ],
    "all but biases": lambda model: below(model) + [p for n, p in model.named_parameters() if "weight" in n],
}


def frozen(model, part):
    for parameter in FROZEN[part](model):
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parameters(family, engine, part):
    model, batch = frozen(family.build(3, 0.1, beta=0.5), part), family.batch()
    assert_same(step(model, batch, "autograd")[1], step(model, batch, engine)[1])


def test_a_frozen_prefix_is_not_rebuilt(family, engine, rebuilt):
    model, batch = family.build(4, beta=0.5), family.batch()
    first = next(model.encoder_layers[2].parameters())
    for parameter in takewhile(lambda parameter: parameter is not first, model.parameters()):
        parameter.requires_grad_(False)
    step(model, batch, engine)
    assert rebuilt == [(3, 1), (3, 0), (2, 1), (2, 0)]


class Trouble(Exception):
    pass


def test_an_exception_in_the_middle_of_a_backward(family, engine):
    """The next step is right, and the stream of random numbers goes on where it was."""
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")

    def fail(parameter):
        raise Trouble

    parameter = linears(model.encoder_layers[2])[0].weight
    handle = parameter.register_post_accumulate_grad_hook(fail)
    (loss,) = losses_in(model, engine, batch)
    state = torch.get_rng_state()
    with pytest.raises(Trouble):
        loss.backward()
    assert torch.equal(state, torch.get_rng_state())
    handle.remove()
    del loss
    again = step(model, batch, engine)
    assert torch.equal(reference[0], again[0])
    assert_same(reference[1], again[1])


def test_an_exception_in_a_rebuild(family, engine):
    model, batch = family.build(4, 0.1, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")
    (loss,) = losses_in(model, engine, batch)
    state = torch.get_rng_state()

    def fail(module, args, output):
        raise Trouble

    handle = linears(model.encoder_layers[1])[-3].register_forward_hook(fail)
    with pytest.raises(Trouble):
        loss.backward()
    handle.remove()
    assert torch.equal(state, torch.get_rng_state())
    assert_same(reference[1], step(model, batch, engine)[1])


def test_eval_and_no_grad_between_forward_and_backward(family, engine):
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")[1]
    (loss,) = losses_in(model, engine, batch)
    model.eval()
    with torch.no_grad():
        model(**batch)
    never_walked = model(**batch).loss
    assert never_walked.requires_grad
    model.train()
    loss.backward()
    assert_same(reference, gradients(model))


def test_evaluation_agrees_with_and_without_gradients(family, engine):
    # PyTorch takes another SDPA kernel if a mask needs a gradient, like the bias of a Swin.
    options = {"attn_implementation": "eager"} if family.row.name == "swin" else {}
    model, batch = family.build(3, 0.1, beta=0.5, **options).eval(), family.batch()
    model.set_backward_engine(engine)
    with torch.no_grad():
        plain = model(**batch).logits
    with torch.inference_mode():
        assert torch.equal(plain, model(**batch).logits)
    assert torch.equal(plain, model(**batch).logits)


def test_second_derivatives(family, engine):
    """A gradient penalty: the gradient of a loss that is made of gradients."""
    model, batch = family.build(3, 0.1, beta=0.5, attn_implementation="eager"), family.batch()
    found = []
    for name in ("autograd", engine):
        (loss,) = losses_in(model, name, batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        (loss + sum(g.square().sum() for g in first if g is not None)).backward()
        found.append(gradients(model))
    assert found[0] and all(g.isfinite().all() for g in found[0].values())
    assert_same(*found)


def test_a_modified_parameter_is_noticed(family, engine):
    """The optimizer may not step between a forward pass and its backward pass, as in plain autograd."""
    model = family.build(2, beta=0.5)
    (loss,) = losses_in(model, engine, family.batch())
    with torch.no_grad():
        linears(model.encoder_layers[0])[-1].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_hook_on_a_parameter_runs_once(family, engine):
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    parameter = linears(model.encoder_layers[1])[-1].weight
    calls = []
    parameter.register_hook(lambda grad: calls.append(1) or grad * 2)
    reference = step(model, batch, "autograd")[1]
    assert_same(reference, step(model, batch, engine)[1])
    assert len(calls) == 2


def test_optimizer_in_the_backward(family, engine):
    """Each parameter is updated as soon as its gradient is there, while lower layers are still being rebuilt."""

    def sgd(parameter):
        parameter.data.sub_(parameter.grad, alpha=0.1)

    found = []
    for name in ("autograd", engine):
        model = family.build(3, 0.1, beta=0.5)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(sgd)
        step(model, family.batch(), name)
        found.append({n: p.detach() for n, p in model.named_parameters()})
    assert_same(*found)


def test_tied_layers(family, engine):
    """One layer's parameters used by another."""
    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    _, lower, upper = model.encoder_layers
    put(upper, -1, linears(lower)[-1])
    put(upper, -3, linears(lower)[-3])
    assert_same(step(model, batch, "autograd")[1], step(model, batch, engine)[1])


def test_lora(family, engine):
    from peft import LoraConfig, get_peft_model

    model, batch = family.build(3, 0.1, beta=0.5), family.batch()
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(target_modules=adaptable(model), lora_dropout=0.1, r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    reference = step(model, batch, "autograd")[1]
    assert reference and all("lora" in name for name in reference)
    assert_same(reference, step(model, batch, engine)[1])


def test_tuned_layer_norms(engine):
    """Post-LN: the norm that ends a layer is applied by the next one, also when PEFT has wrapped it."""
    from peft import LNTuningConfig, get_peft_model

    family = FAMILIES["roberta"]
    model = get_peft_model(family.build(3, 0.1, beta=0.5), LNTuningConfig(target_modules=["LayerNorm"]))
    reference = step(model, family.batch(), "autograd")[1]
    assert any("layer.2.output" in name for name in reference)
    assert_same(reference, step(model, family.batch(), engine)[1])


class Kept(Observer):
    """What a forward pass keeps, and what its backward pass rebuilds."""

    def __init__(self):
        self.references = []

    def layer_keeps(self, position, tensors):
        self.references += map(weakref.ref, tensors)

    def step_rebuilt(self, position, step, rebuilt):
        self.references += [weakref.ref(tensor) for tensor in (rebuilt.previous, *rebuilt.saved) if tensor is not None]


def test_nothing_outlives_the_graph(family, engine):
    """Everything is freed with its graph, by reference counting alone: garbage collection would come too late.

    The observer of a forward pass is held by what the pass leaves for its backward pass, and is freed with it.
    """
    model, batch, observer = family.build(3, 0.1, beta=0.5), family.batch(), Kept()
    gc.disable()
    try:
        with observing(observer):
            step(model, batch, engine)
        plans = model.base_model.layer_plans
        assert len(observer.references) > sum(4 if p.reversible else 1 for p in plans) + 4 * len(rebuilt_steps(model))
        assert all(reference() is None for reference in observer.references)
        with observing(observer):
            (loss,) = losses_in(model, engine, batch)  # a forward whose backward never comes
        assert any(reference() is not None for reference in observer.references)
        references, observer = [*observer.references, weakref.ref(observer)], None
        assert references[-1]() is not None
        del loss
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


def test_parameters_of_a_data_parallel_replica(family):
    """nn.DataParallel's replicas have no registered parameters; missing them would lose gradients silently."""
    layer = family.build(1).encoder_layers[0]
    names = list(named_parameters_of(layer))
    assert names == [name for name, _ in layer.named_parameters()]
    dense = linears(layer)[-1]
    replica = dense._replicate_for_data_parallel()
    replica._former_parameters = dict(dense._parameters)
    assert list(named_parameters_of(replica)) == ["weight", "bias"]


@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
@pytest.mark.parametrize("change", [1.0, 1.5])
def test_states_that_something_casts(family, change, engine):
    """FSDP2 casts states in mixed precision. Layers read the state before the cast, unless it was changed as well."""
    model, batch = family.build(4, beta=0.5), family.batch()
    plain = step(model, batch, "autograd")

    def cast(module, args):
        hidden = args[0].to(torch.bfloat16)
        return (hidden * change if change != 1 else hidden, *args[1:])

    for layer in model.encoder_layers[1::2]:
        layer.register_forward_pre_hook(cast)
    reference, found = step(model, batch, "autograd"), step(model, batch, engine)
    assert torch.equal(reference[0], found[0])
    assert_same(reference[1], found[1])
    if change != 1 or not family.row.staged:  # the first layer of a stage reads what it is given
        assert torch.equal(plain[0], found[0]) == (change == 1)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, found[0])


def test_an_unknown_engine(family):
    model = family.build(1)
    with pytest.raises(ValueError, match="backward_engine='fast' is unknown: use one of 'autograd', 'reprop'"):
        model.set_backward_engine("fast")
    assert model.config.backward_engine == "pareprop"
    with pytest.raises(ValueError, match="backward_engine='fast'"):
        family.config(backward_engine="fast")
