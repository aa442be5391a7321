"""Training steps in CUDA graphs. Without CUDA: what a capture refuses, and how rebuilds find their random numbers."""

import random
from contextlib import nullcontext

import numpy
import pytest
import torch
from families import FAMILIES, assert_same, gradients, linears, put, step
from stock_models import stock_batch, stock_model
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_pareprop as hp
from hf_pareprop import cuda_rng, replay
from hf_pareprop.cuda_rng import Schedule, draws, seed_and_offset, state_of
from hf_pareprop.findings import Findings, collected
from hf_pareprop.tools.graphs import check_capturable, check_like, no_draws_on_the_host
from hf_pareprop.tools.mask_decisions import MaskDecisions


class FakeGenerator:
    """A stand-in for a CUDA generator outside of captures: a seed, and an offset that grows as numbers are drawn."""

    def __init__(self, seed=0, offset=0):
        self.seed, self.offset = seed, offset

    def get_state(self):
        return state_of(self.seed, self.offset)

    def set_state(self, state):
        self.seed, self.offset = seed_and_offset(state)

    def clone_state(self):
        return FakeGenerator(self.seed, self.offset)

    def draw(self, increment):
        self.offset += increment
        return self.seed, self.offset - increment


def forward_pass(generator, schedule=None):
    """Draw numbers as embeddings and three steps do. One of the steps draws nothing."""
    drawn = [generator.draw(4)]
    for increment in (8, 0, 12):
        before = generator.get_state()
        drawn.append(generator.draw(increment) if increment else None)
        if schedule is not None:
            schedule.note(before, bool(increment))
    return drawn


def test_rebuilds_draw_what_steps_drew():
    """At every replay, also after several replays and after another seed."""
    generator = FakeGenerator(seed=-5, offset=40)
    schedule = Schedule(generator)
    with schedule.learning():
        assert cuda_rng.schedule() is schedule
        forward_pass(generator, schedule)
    assert cuda_rng.schedule() is None
    with schedule.followed(graph=object()):
        replicas = [schedule.take() for _ in range(3)]
    assert replicas[1] is None
    for _ in range(3):
        for seed in (3, 2**62, -(2**63)):
            generator.set_state(state_of(seed, generator.offset))
            schedule.set_out()
            drawn = forward_pass(generator)
            assert [replicas[0].draw(8), replicas[2].draw(12)] == [drawn[1], drawn[3]]


def test_generators_are_registered_where_pytorch_asks_for_it():
    class Graph:
        registered = []

        def register_generator_state(self, generator):
            self.registered.append(generator)

    generator = FakeGenerator()
    schedule = Schedule(generator)
    with schedule.learning():
        forward_pass(generator, schedule)
    with schedule.followed(Graph()):
        assert [schedule.take() for _ in range(3)] == [Graph.registered[0], None, Graph.registered[1]]


def test_another_number_of_steps_is_an_error():
    generator = FakeGenerator()
    schedule = Schedule(generator)
    with schedule.learning():
        forward_pass(generator, schedule)
    with pytest.raises(RuntimeError, match="2 reversible steps were captured, and 3 ran"), schedule.followed(object()):
        _ = [schedule.take() for _ in range(2)]
    with pytest.raises(RuntimeError, match="more than 3 reversible steps are"), schedule.followed(object()):
        _ = [schedule.take() for _ in range(4)]
    assert cuda_rng.schedule() is None


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_capture_without_schedule_refuses_dropout(family, monkeypatch, where, attention):
    """It refuses nothing else: the gradients are those of the reference."""
    if where not in family.row.dropout_fields(0.1):
        pytest.skip(f"the family has no {where}")
    if attention == "sdpa" and not family.model._supports_sdpa:
        pytest.skip("it has no SDPA")
    monkeypatch.setattr(replay, "capturing", lambda device: True)
    batch = family.batch()
    model = family.build(2, beta=0.5, attn_implementation=attention)
    assert_same(step(model, batch, "autograd")[1], step(model, batch, "pareprop")[1])
    drops = family.model(family.config(**family.config_fields(2, 0.0) | {where: 0.1}, attn_implementation=attention))
    with pytest.raises(RuntimeError, match=r"draws random numbers in a CUDA graph.*hf_pareprop.GraphedStep"):
        drops.train()(**batch)
    drops.eval()(**batch).loss.backward()


def test_attention_is_the_same_in_a_capture(family, monkeypatch):
    """Without a padding mask attention gets no mask either, so a capture uses the same kernels as an ordinary step."""
    model = family.build(2, beta=0.5).eval()
    batch = {name: tensor for name, tensor in family.batch().items() if name != "attention_mask"}
    masks = []

    def seen():
        masks.append([])
        with monkeypatch.context() as patch:
            for name in ALL_ATTENTION_FUNCTIONS:
                attend = ALL_ATTENTION_FUNCTIONS[name]
                noting = lambda *a, attend=attend, **k: masks[-1].append(a[4]) or attend(*a, **k)  # noqa: E731
                patch.setitem(ALL_ATTENTION_FUNCTIONS, name, noting)
            model(**batch)
        return [mask is None or mask.shape for mask in masks[-1]]

    ordinary = seen()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert seen() == ordinary


def outcome(monkeypatch, model, batch, decisions):
    """The logits, and whether each layer's attention got a mask."""
    masks = []
    with monkeypatch.context() as patch, decisions:
        for name in ALL_ATTENTION_FUNCTIONS:
            attend = ALL_ATTENTION_FUNCTIONS[name]
            noting = lambda *a, attend=attend, **k: masks.append(a[4] is not None) or attend(*a, **k)  # noqa: E731
            patch.setitem(ALL_ATTENTION_FUNCTIONS, name, noting)
        return model(**batch).logits.detach(), masks


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "RobertaForMaskedLM"])
def test_masks_of_stock_models_are_the_same_in_a_capture(monkeypatch, name):
    """An ordinary pass leaves masks out, and so does a capture here. Transformers 5.17 would make all of them there."""
    model, batch = stock_model(name).eval(), {"input_ids": stock_batch(name)["input_ids"]}
    masks = MaskDecisions(batch)
    logits, ordinary = outcome(monkeypatch, model, batch, masks.learned())
    for look in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
        monkeypatch.setattr(masking_utils, look, lambda *args, **kwargs: False)
    again, captured = outcome(monkeypatch, model, batch, masks.followed())
    assert not any(ordinary) and not any(captured) and torch.equal(logits, again)
    assert all(outcome(monkeypatch, model, batch, nullcontext())[1])
    with pytest.raises(RuntimeError, match="makes other attention masks"), MaskDecisions(batch).followed():
        model(**batch)


def test_masks_that_a_batch_brings_are_made_in_both_passes(monkeypatch):
    """The padding of one batch says nothing about that of the next. So also the ordinary pass makes a mask that hides nothing.

    Otherwise the capture would run another attention kernel, which draws other random numbers for dropout.
    """
    model, batch = stock_model("LlamaForCausalLM").eval(), stock_batch("LlamaForCausalLM")
    masks, unpadded = MaskDecisions(batch), {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    logits = model(**batch).logits
    assert not any(outcome(monkeypatch, model, unpadded, nullcontext())[1])
    _, learned = outcome(monkeypatch, model, unpadded, masks.learned())
    assert all(learned)
    assert not any(outcome(monkeypatch, model, unpadded, nullcontext())[1])
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    again, captured = outcome(monkeypatch, model, batch, masks.followed())
    assert all(captured) and torch.equal(logits, again)


def test_checks_of_a_capture_are_made_at_every_replay(monkeypatch):
    """While it is captured there is nothing to read. Afterwards every replay computes the number anew."""
    findings, told, number = Findings(), [], torch.ones(())
    with monkeypatch.context() as patch, collected() as checks:
        patch.setattr("hf_pareprop.findings.capturing", lambda device: True)
        findings.expect(number, told.append)
    assert told == [] and len(checks) == 1
    for value in (1.0, 3.0):
        number.fill_(value)
        checks[0].settle()
        checks[0].expect()
    assert told == [1.0, 3.0]
    with monkeypatch.context() as patch:
        patch.setattr("hf_pareprop.findings.capturing", lambda device: True)
        findings.expect(number, told.append)
    assert len(told) == 2 and len(checks) == 1


HOST_DRAWS = {"torch": lambda: torch.rand(()), "random": random.random, "numpy": numpy.random.rand}


@pytest.mark.parametrize("library", HOST_DRAWS)
def test_draws_on_the_host_are_refused(library):
    with no_draws_on_the_host():
        pass
    with (
        pytest.raises(RuntimeError, match="it draws random numbers on the host, as LayerDrop does"),
        no_draws_on_the_host(),
    ):
        HOST_DRAWS[library]()


def test_a_capture_that_runs_out_of_memory_is_not_repeated(monkeypatch):
    """It has to keep what the ordinary pass kept, so another try could not need less."""
    model, batch = FAMILIES["vit"].build(3, memory_budget="1TB"), FAMILIES["vit"].batch()
    model(**batch).loss.backward()
    tries = []

    def out_of_memory(module, args):
        tries.append(module)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.encoder_layers[2].register_forward_pre_hook(out_of_memory)
    monkeypatch.setattr("hf_pareprop.modeling_reversible.capturing", lambda device: True)
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch)
    assert len(tries) == 1


@pytest.mark.parametrize(
    "operator, args, kwargs, expected",
    [
        ("native_dropout", (None, 0.1, True), {}, True),
        ("native_dropout", (None, 0.0, True), {}, False),
        ("_scaled_dot_product_flash_attention", (None, None, None), {}, False),
        ("_scaled_dot_product_flash_attention", (None, None, None, 0.1), {}, True),
        ("_scaled_dot_product_efficient_attention", (None, None, None, None, False), {"dropout_p": 0.1}, True),
        ("_scaled_dot_product_cudnn_attention", (None, None, None, None, False), {}, False),
        ("rand_like", (None,), {}, True),
        ("addmm", (None, None, None), {}, False),
    ],
)
def test_operators_that_draw(operator, args, kwargs, expected):
    assert draws(getattr(torch.ops.aten, operator).default, args, kwargs) is expected


def test_bad_values(family):
    model, batch = family.build(2), family.batch()
    with pytest.raises(ValueError, match="the model is on cpu: CUDA graphs need it on a CUDA device"):
        hp.GraphedStep(model, batch)
    with pytest.raises(ValueError, match=r"AdamW has capturable=False.*AdamW\(..., capturable=True\)"):
        check_capturable(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="SGD has no state yet"):
        check_capturable(torch.optim.SGD(model.parameters(), momentum=0.9))
    check_like(batch, family.batch())
    for other in ({n: t[:2] for n, t in batch.items()}, {n: t.double() for n, t in batch.items()}, {}):
        with pytest.raises(ValueError, match="the batch is .* but the graph was captured for"):
            check_like(other, batch)


def on_cuda(family, depth=3, dropout=0.0, **fields):
    """A model and three batches without a padding mask, which transformers would read on the host."""
    model = family.build(depth, dropout, **fields).cuda()
    batch = {name: tensor.cuda() for name, tensor in family.batch().items() if name != "attention_mask"}
    return model, [{name: tensor.roll(i, 0) for name, tensor in batch.items()} for i in range(3)]


@pytest.mark.cuda
@pytest.mark.parametrize("engine", ["autograd", "reprop", "pareprop"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("beta", [1.0, 0.5, [0.5, 0, 1.0]])
@pytest.mark.parametrize("budget", [None, "gradients"])
def test_cuda_replays_are_ordinary_steps(family, engine, dropout, autocast, beta, budget):
    """Loss, gradients and the generator's state are those of the reference engine, for several batches in turn."""
    model, batches = on_cuda(family, dropout=dropout, beta=beta, memory_budget=budget)
    model.set_backward_engine(engine)
    graphed = hp.GraphedStep(model, batches[0], autocast=autocast)
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = graphed(**batch).clone()
        found, state = gradients(model), torch.cuda.get_rng_state()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        model.set_backward_engine("autograd")
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            reference = model(**batch).loss
        reference.backward()
        assert torch.equal(loss, reference) and torch.equal(state, torch.cuda.get_rng_state())
        assert_same(found, gradients(model))


@pytest.mark.cuda
@pytest.mark.parametrize("padded", [False, True])
def test_cuda_replays_with_masks(padded):
    """Engines have the same gradients in a graph, with dropout in attention, for batches that bring a mask."""
    found = []
    for engine in ("autograd", "pareprop"):
        model = FAMILIES["roberta"].build(3, 0.1, beta=0.5, backward_engine=engine).cuda()
        batch = {name: tensor.cuda() for name, tensor in FAMILIES["roberta"].batch().items()}
        if not padded:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        graphed = hp.GraphedStep(model, batch, autocast=torch.bfloat16)
        for seed in (1, 2):
            torch.manual_seed(seed)
            loss = graphed(**batch).clone()
        found.append({**{name: g.clone() for name, g in gradients(model).items()}, "loss": loss})
    assert_same(*found)
    assert all(value.isfinite().all() for value in found[0].values())


class Unsteady(torch.nn.Module):
    """Computes something else in every call, but only during a capture, so that no earlier check fails."""

    calls = 0

    def forward(self, x):
        self.calls += torch.cuda.is_current_stream_capturing()
        return x * (1 + self.calls)


@pytest.mark.cuda
def test_cuda_a_wrong_rebuild_in_a_replay_is_an_error():
    """Its gradients are NaN, and a later replay raises, once the device has said so."""
    model, (batch, *_) = on_cuda(FAMILIES["vit"], beta=0.5)
    layer = model.encoder_layers[1]
    put(layer, 0, torch.nn.Sequential(linears(layer)[0], Unsteady()))
    graphed = hp.GraphedStep(model, batch)
    graphed(**batch)
    torch.cuda.synchronize()
    assert any(gradient.isnan().any() for gradient in gradients(model).values())
    with pytest.raises(RuntimeError, match="In an earlier training step, .* were NaN"):
        graphed(**batch)


@pytest.mark.cuda
def test_cuda_reading_on_the_host_is_an_error_with_advice():
    class Reads(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > -1e9 else -x

    model, (batch, *_) = on_cuda(FAMILIES["vit"])
    model.classifier = torch.nn.Sequential(Reads(), model.classifier)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: .* must not read tensors on the host"):
        hp.GraphedStep(model, batch)
    torch.cuda.synchronize()
    model.classifier = model.classifier[1]
    assert hp.GraphedStep(model, batch)(**batch).isfinite()


@pytest.mark.cuda
def test_cuda_replays_train(family):
    """Three steps with the optimizer in the graph give the weights of three ordinary steps."""
    weights = []
    for graph in (False, True):
        model, batches = on_cuda(family, dropout=0.1, beta=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True, fused=True)
        torch.manual_seed(3)

        def ordinary(model=model, optimizer=optimizer, **batch):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

        ordinary(**batches[0])
        take = hp.GraphedStep(model, batches[0], optimizer) if graph else ordinary
        for batch in batches:
            take(**batch)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_cuda_capture_by_hand(family):
    """Without dropout a step can be captured like that of any model. With dropout the capture raises an error with advice."""
    for dropout in (0.0, 0.1):
        model, (batch, *_) = on_cuda(family, dropout=dropout, beta=0.5)
        reference = step(model, batch, "pareprop")[1]
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        if dropout:
            with pytest.raises(RuntimeError, match="GraphedStep"), torch.cuda.graph(graph):
                model(**batch)
            continue
        with torch.cuda.graph(graph):
            model(**batch).loss.backward()
        graph.replay()
        assert_same(gradients(model), reference)


@pytest.mark.cuda
def test_cuda_no_loss_is_an_error():
    model, (batch, *_) = on_cuda(FAMILIES["vit"])
    with pytest.raises(ValueError, match="yields no loss for pixel_values: add labels"):
        hp.GraphedStep(model, {"pixel_values": batch["pixel_values"]})
