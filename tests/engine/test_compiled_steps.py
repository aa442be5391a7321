"""Steps that run as compiled code."""

from functools import partial

import pytest
import torch
from families import FAMILIES, assert_same, gradients, step
from stock_models import FIELDS, LLAMA_LIKE, stock_batch, stock_model
from torch._inductor.utils import run_and_get_code

import hf_pareprop as hp
from hf_pareprop import compiled_steps
from hf_pareprop.observer import Observer, observing
from hf_pareprop.torch_private import compile_for_each_shape


@pytest.fixture
def graphs(monkeypatch):
    """Trace steps, but generate no code, which would take seconds. Yields the traced graphs."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def quickly(function):
        return torch.compile(function, dynamic=False, backend=backend)

    torch._dynamo.reset()
    compiled_steps.compiled_phi_of_step.cache_clear()
    monkeypatch.setattr(compiled_steps, "compile_for_each_shape", quickly)
    yield found
    compiled_steps.compiled_phi_of_step.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def generated():
    """Compile as users do: trace and generate code."""
    torch._dynamo.reset()
    compiled_steps.compiled_phi_of_step.cache_clear()
    yield
    torch._dynamo.reset()


def results(model, batch, engine, autocast=None):
    """Loss, gradients, and the state of the random number generator after a step."""
    device = model.device
    model.set_backward_engine(engine)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss = model(**batch).loss
    loss.backward()
    state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    return loss.detach(), gradients(model), state


def assert_engines_agree(model, batch, autocast=None):
    loss, grads, state = results(model, batch, "autograd", autocast)
    for engine in ("reprop", "pareprop"):
        found = results(model, batch, engine, autocast)
        assert torch.equal(found[0], loss) and torch.equal(found[2], state)
        assert_same(found[1], grads)
    return loss


def test_engines_agree(family, graphs, lane):
    model = family.build(3, 0.1, beta=0.5, compile_steps=True)
    assert_engines_agree(model, family.batch(), torch.bfloat16)
    assert graphs


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        pytest.param("ModernBertForMaskedLM", marks=pytest.mark.slow),
        *(
            pytest.param(n, marks=[pytest.mark.slow, pytest.mark.every_case])
            for n in FIELDS
            if n[:5] not in ("Llama", "Moder")
        ),
    ],
)
def test_layers_of_stock_models(name, graphs):
    """One compiled code for all layers of a kind, so that compile time does not grow with depth; ModernBERT has two kinds."""
    layers = "n_layer" if name.startswith("GPT2") else "num_hidden_layers"
    for depth in (3, 5):
        torch._dynamo.reset()
        graphs.clear()
        model = hp.to_reversible(stock_model(name, **{layers: depth}), beta=0.5, compile_steps=True)
        assert_engines_agree(model, stock_batch(name), torch.bfloat16)
        assert len(graphs) == (2 if name.startswith("ModernBert") else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [LLAMA_LIKE[0], *(pytest.param(name, marks=pytest.mark.every_case) for name in LLAMA_LIKE[1:])]
)
def test_sub_blocks_of_stock_models(name, graphs):
    model = hp.to_reversible(stock_model(name), beta=0.5, steps="sublayer", compile_steps=True)
    assert_engines_agree(model, stock_batch(name), torch.bfloat16)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", *(pytest.param(n, marks=pytest.mark.every_case) for n in FIELDS if n[:5] != "Llama")]
)
def test_layers_of_stock_models_with_generated_code(name, generated):
    """Compiling takes some ten seconds for each."""
    model = hp.to_reversible(stock_model(name), beta=1 / 128, compile_steps=True)
    assert_engines_agree(model, stock_batch(name), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("budget", ["gradients", "1 layers"])
def test_engines_agree_within_a_budget(family, graphs, autocast, budget):
    model = family.build(3, 0.1, beta=0.5, compile_steps=True, memory_budget=budget)
    for _ in range(2):  # the budget is known in the second step
        assert_engines_agree(model, family.batch(), autocast)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_engines_agree_with_generated_code(beta, generated):
    """Fused code draws other dropout masks, and does not round in between, but it does so in every engine."""
    family = FAMILIES["vit"]
    model = family.build(3, 0.1, beta=beta, compile_steps=True)
    with_dropout = assert_engines_agree(model, family.batch(), torch.bfloat16)
    model.set_compile_steps(False)
    assert not torch.equal(with_dropout, results(model, family.batch(), "reprop", torch.bfloat16)[0])


def code_for_a_table(compile_it):
    """The generated code that reads rows of a table, and the code for its gradient."""
    table, rows = torch.randn(7, 16, requires_grad=True), torch.randint(0, 7, (64,))

    def work():
        compile_it(lambda table, rows: (table[rows] * 2).sin())(table, rows).sum().backward()

    torch._dynamo.reset()
    return "\n".join(run_and_get_code(work)[1])


@pytest.mark.slow
def test_gradients_of_tables_are_summed_in_one_order(generated):
    """By default, Inductor's threads add rows of a gradient atomically, in any order."""
    in_one_order = "aten.index_put_("  # instead of a loop of its own, which takes numbers of rows as they come
    assert in_one_order not in code_for_a_table(partial(torch.compile, dynamic=False))
    assert in_one_order in code_for_a_table(compile_for_each_shape)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_cuda_engines_agree_with_generated_code(family, beta, dropout, generated):
    model = family.build(3, dropout, beta=beta, compile_steps=True).cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items()}
    assert_engines_agree(model, batch, torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIELDS)
def test_cuda_layers_of_stock_models(name, generated):
    """One by one, and in a CUDA graph."""
    model = hp.to_reversible(stock_model(name), beta=1 / 128, compile_steps=True).cuda()
    batch = {each: tensor.cuda() for each, tensor in stock_batch(name).items() if each != "attention_mask"}
    assert_engines_agree(model, batch, torch.bfloat16)
    loss, grads, _ = results(model, batch, "pareprop", torch.bfloat16)
    graphed = hp.GraphedStep(model, batch, autocast=torch.bfloat16)
    torch.manual_seed(3)
    assert torch.equal(graphed(**batch), loss)
    assert_same(gradients(model), grads)


@pytest.mark.cuda
def test_cuda_replays_of_generated_code(family, generated):
    """A CUDA graph of compiled steps is the same steps one by one."""
    model = family.build(3, 0.1, beta=0.5, compile_steps=True).cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items() if name != "attention_mask"}
    graphed = hp.GraphedStep(model, batch, autocast=torch.bfloat16)
    torch.manual_seed(3)
    loss, found = graphed(**batch).clone(), gradients(model)
    reference = results(model, batch, "autograd", torch.bfloat16)
    assert torch.equal(loss, reference[0])
    assert_same(found, reference[1])


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth(family, graphs):
    counts = []
    for depth in (10, 14):  # both have layers of all kinds
        torch._dynamo.reset()
        graphs.clear()
        step(family.build(depth, 0.1, beta=0.5, compile_steps=True), family.batch(), "reprop")
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_other_shapes_are_compiled_for_themselves(family, graphs):
    """So a rebuild never runs code that was compiled for another forward pass, and gradients of the first stay exact."""
    model = family.build(3, beta=0.5, compile_steps=True)
    batch = family.batch()
    smaller = {name: tensor[:2] for name, tensor in batch.items()}
    reference = step(model, batch, "autograd")[1]
    model.set_backward_engine("reprop")
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    before = len(graphs)
    model(**smaller)
    assert len(graphs) > before
    loss.backward()
    assert_same(gradients(model), reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "LlamaForCausalLM", "ModernBertForMaskedLM"])
def test_a_compiled_model_has_compiled_steps(name, graphs):
    """In a compiled model, as with Trainer's `torch_compile=True`, gradients are those of compiled steps alone.

    Layers are not compiled together with the code around them: a rebuild could not run such code again.
    """
    if family := FAMILIES.get(name):
        model, batch = family.build(3, beta=0.5, compile_steps=True), family.batch()
    else:
        model, batch = hp.to_reversible(stock_model(name), beta=0.5, compile_steps=True), stock_batch(name)
    around = []

    def backend(graph, inputs):
        around.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(model, backend=backend)
    reference = step(model, batch, "reprop")[1]
    model.set_compile_steps(False)
    torch._dynamo.reset()
    graphs.clear()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    compiled(**batch).loss.backward()
    assert graphs and around and not any("scaled_dot_product_attention" in graph for graph in around)
    assert_same(gradients(model), reference)


def test_evaluation_is_not_compiled(family, graphs):
    """Without gradients it would be compiled again, and compute other bits than the same model loaded elsewhere."""
    model = family.build(3, beta=0.5).eval()
    with torch.no_grad():
        expected = model(**family.batch()).logits
        model.set_compile_steps(True)
        assert torch.equal(model(**family.batch()).logits, expected)
    assert not graphs


def test_nothing_is_stored_that_is_not_stored_otherwise(family, graphs):
    kept = []

    class Noting(Observer):
        def layer_keeps(self, position, tensors):
            kept[-1] += sum(tensor.nbytes for tensor in tensors)

    model = family.build(3, 0.1, beta=0.5)
    for on in (False, True):
        model.set_compile_steps(on)
        kept.append(0)
        with observing(Noting()):
            step(model, family.batch(), "reprop")
    assert kept[0] == kept[1] > 0


def test_the_field_is_checked(family):
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="compile_steps=.* is not True or False"):
            family.build(3, compile_steps=value)
    model = family.build(3)
    with pytest.raises(ValueError, match="compile_steps='no'"):
        model.set_compile_steps("no")
    model.set_compile_steps(True)
    assert model.config.compile_steps is True
