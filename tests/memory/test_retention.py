"""Layers that keep their graphs: the same gradients, fewer rebuilds, and as many as a budget allows."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, assert_same, cast, rebuilt_steps, step
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments

import hf_pareprop as hp
from hf_pareprop import memory_probe, retention
from hf_pareprop.memory_probe import SavedBytes, coming
from hf_pareprop.retention import UNKNOWN, Retention, RetentionPlan, Sizes, share_out
from hf_pareprop.tools import callbacks
from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.contenders import Subject, reversible_contenders

DEPTH = 4
CPU = torch.device("cpu")
PLENTY = "1TB"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 256, [0.5, 0, 1.0, 0.25], [0.5, 0.5, 0.25, 0]])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9])
def test_gradients_are_the_same(name, precision, dropout, beta, layers, rebuilt):
    family = FAMILIES[name]
    model = family.build(DEPTH, dropout, beta=beta)
    batch, autocast = family.batch(), precision == "autocast"
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=autocast)
    model.set_memory_budget(f"{layers} layers")
    for engine in ("reprop", "pareprop"):
        rebuilt.clear()
        again = step(model, batch, engine, autocast=autocast)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])
        assert sorted(rebuilt) == rebuilt_steps(model, range(DEPTH - layers))


def test_with_the_overlap(family, lane):
    model = family.build(6, 0.1, beta=0.5)
    reference = step(model, family.batch(), "autograd")
    for layers in range(7):
        model.set_memory_budget(f"{layers} layers")
        assert_same(reference[1], step(model, family.batch(), "pareprop")[1])


def test_frozen_layers_and_two_forwards_before_a_backward(family):
    model = family.build(DEPTH, 0.1, beta=0.5)
    for layer in model.encoder_layers[:2]:
        layer.requires_grad_(False)
    found = []
    for budget in (None, "3 layers"):
        model.set_memory_budget(budget)
        model.zero_grad()
        torch.manual_seed(5)
        losses = [model(**family.batch()).loss for _ in range(2)]
        (losses[1] + 2 * losses[0]).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


class Noting(Retention):
    """Remembers the plans that it made."""

    def __init__(self, *args):
        super().__init__(*args)
        self.planned = []

    def plan(self, embeddings, plans):
        self.planned.append(super().plan(embeddings, plans))
        return self.planned[-1]


def noting(model, budget):
    """Give ``model`` a budget. Returns an object that remembers the plans."""
    base = model.base_model
    base.retention = Noting(budget, base.layer_parameters, base.logits_per_state)
    return base.retention


def amount(size):
    """A budget of a number of bytes, written so that none is lost to rounding."""
    return f"{size / 1024}KB"


def of_many_parameters(family):
    """Skip families whose small models have fewer parameters than activations: their gradients leave room for nothing."""
    if family.row.staged:
        pytest.skip("its small models have more activations than parameters")


def without_narrowing(family, dropout=0.0):
    """A model whose layers have no results of linear layers to keep, so that graphs alone are kept."""
    return family.build(DEPTH, dropout, beta=0.5, mlp_ratio=1, one_stage=True)


def kept_bytes(model, batch):
    """What a forward pass saves beside parameters."""
    found = SavedBytes(model.parameters())
    with found.counting():
        loss = model(**batch).loss
    del loss
    return found.total


def size_of_a_layer(model):
    """What a layer of the last stage keeps, for the only shape that was measured. All layers of that stage are reversible."""
    (sizes,) = model.base_model.retention.measured.values()
    return sizes[max(sizes)[0], False]


def test_a_layer_is_measured_as_what_it_keeps(family):
    """The measured size is what one more kept layer adds to all that is saved. Other hooks do not see the measurement."""
    model, batch = family.build(DEPTH, 0.1, beta=0.5, one_stage=True), resized(family.batch(), 24)
    model.set_memory_budget(PLENTY)
    model(**batch)
    size = size_of_a_layer(model).graph
    model.set_memory_budget("1 layer")
    one = kept_bytes(model, batch)
    model.set_memory_budget("3 layers")
    assert kept_bytes(model, batch) - one == pytest.approx(2 * size, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_prediction_of_memory_is_within_ten_per_cent(family_name, bf16):
    """The plan is compared with the accounting of a whole step, at sizes where activations matter."""
    family = FAMILIES[family_name]
    if family.row.staged:
        pytest.skip("the peak lies in the first stage, whatever the last layers keep")
    subject = family.subject(8, 0.1, wider=3, mlp_ratio=4)
    batch = family.large_batch()
    (way,) = reversible_contenders([0.5], ("reprop",))
    model = subject.build(way)
    model.set_memory_budget(PLENTY)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(**batch)
    size = size_of_a_layer(model).graph

    def graphs(layers):
        return predict(subject, way.retaining(layers), batch, CPU, bf16).graphs

    assert graphs(5) - graphs(2) == pytest.approx(3 * size, rel=0.1)  # all in the last stage


def layers_kept(model, batch, rebuilt):
    rebuilt.clear()
    model(**batch).loss.backward()
    return sum(model.config.stage_depths) - len({layer for layer, _ in rebuilt})


def test_bytes(family, rebuilt):
    model, batch = without_narrowing(family), family.batch()
    model.set_memory_budget(PLENTY)
    assert [layers_kept(model, batch, rebuilt) for _ in range(2)] == [0, DEPTH]
    size = size_of_a_layer(model).graph
    for budget, expected in ((0, 0), (size - 1, 0), (size, 1), (3 * size + 1, 3)):
        model.set_memory_budget(amount(budget))
        layers_kept(model, batch, rebuilt)
        assert layers_kept(model, batch, rebuilt) == expected


@pytest.mark.parametrize(
    "allowance, kept",
    [
        (-1, (0, 0)),
        (0, (0, 0)),
        (9, (0, 0)),
        (10, (0, 1)),
        (39, (0, 3)),
        (40, (0, 4)),  # all results of linear layers, then graphs in their place
        (129, (0, 4)),
        (130, (1, 3)),
        (399, (3, 1)),
        (400, (4, 0)),
        (10**9, (4, 0)),
    ],
)
def test_sharing_out(allowance, kept):
    """The plan stays within the allowance, and says how many bytes it takes."""
    plan = share_out(allowance, [Sizes(graph=100, linears=10)] * 4)
    assert (plan.graphs, plan.linears) == kept
    assert plan.bytes == 100 * kept[0] + 10 * kept[1] <= max(0, allowance)


@pytest.mark.parametrize("allowance, kept", [(-1, 0), (0, 0), (99, 0), (100, 1), (399, 3), (400, 4), (500, 4)])
def test_sharing_out_without_narrowing_layers(allowance, kept):
    assert share_out(allowance, [Sizes(graph=100)] * 4) == RetentionPlan(kept, 0, 100 * kept)


def test_sharing_out_layers_that_keep_different_amounts():
    """Stages may differ. A layer that was not measured, and all layers below it, keep nothing."""
    layers = [Sizes(graph=400, linears=40), Sizes(graph=100, linears=10), Sizes(graph=50, linears=5)]
    assert share_out(54, layers)[:2] == (0, 2)
    assert share_out(55, layers)[:2] == (0, 3)
    assert share_out(100, layers) == RetentionPlan(1, 2, 50 + 10 + 40)
    assert share_out(549, layers) == RetentionPlan(2, 1, 50 + 100 + 40)
    assert share_out(550, layers) == RetentionPlan(3, 0, 550)
    assert share_out(10**9, [UNKNOWN, *layers[1:]]) == RetentionPlan(0, 2, 15)


def test_results_of_linear_layers_are_measured_and_kept_by_a_budget(family):
    model, batch = family.build(DEPTH, beta=0.5, one_stage=True), family.batch()
    model.set_memory_budget(PLENTY)
    model(**batch)
    graph, linears, _ = size_of_a_layer(model)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert linears == states[-2].nbytes < graph / 8
    reference = step(model, batch, "autograd")
    planned = noting(model, amount(2 * graph + 2 * linears)).planned
    for _ in range(2):
        assert_same(reference[1], step(model, batch, "pareprop")[1])
    assert [(plan.graphs, plan.linears) for plan in planned] == [(0, 0), (2, 2)]
    assert planned[1].bytes == 2 * graph + 2 * linears


def test_other_shapes(family, rebuilt):
    """At first by what a layer kept per element of another shape, then as measured. Small batches keep more layers."""
    if family.row.staged:
        pytest.skip("relative positions take memory that does not grow with the batch")
    model, batch = without_narrowing(family), family.batch()
    model.set_memory_budget(PLENTY)
    model(**resized(batch, 8))
    size = size_of_a_layer(model).graph
    model.set_memory_budget(amount(2 * size))
    model(**resized(batch, 8))
    kept = {n: layers_kept(model, resized(batch, n), rebuilt) for n in (8, 4, 16, 32)}
    assert kept == {8: 2, 4: 4, 16: 1, 32: 0}
    shapes = [shape[0] for shape, _, _ in model.base_model.retention.measured]
    assert shapes == [8, 4, 16, 32]


def test_free_memory(family, rebuilt, monkeypatch):
    """It is read in the third step. What the first two steps needed at their peak is scaled up for larger batches."""
    model, batch = without_narrowing(family), family.batch()
    model.set_memory_budget(PLENTY)
    model(**resized(batch, 8))
    size = size_of_a_layer(model).graph
    monkeypatch.setattr(retention, "free_memory", lambda device: (4 * size, 3 * size))
    model.set_memory_budget("50%")
    assert [layers_kept(model, resized(batch, 8), rebuilt) for _ in range(3)] == [0, 0, 2]
    assert layers_kept(model, resized(batch, 9), rebuilt) == 1
    assert layers_kept(model, resized(batch, 16), rebuilt) == 0
    model.set_memory_budget("auto")
    monkeypatch.setattr(retention, "free_memory", lambda device: (int(4.9 / retention.SHARE["cpu"] * size), 0))
    assert [layers_kept(model, resized(batch, 8), rebuilt) for _ in range(3)] == [0, 0, 4]


def test_what_is_allocated_later_counts(family, rebuilt, monkeypatch):
    """With gradient accumulation the optimizer's state comes after the third forward pass."""
    model, batch = without_narrowing(family), family.batch()
    model.set_memory_budget(PLENTY)
    model(**batch)
    size = size_of_a_layer(model).graph
    used = [5 * size]
    monkeypatch.setattr(retention, "free_memory", lambda device: (4 * size, 0))
    monkeypatch.setattr(retention, "in_use", lambda device: used[0])
    model.set_memory_budget("100%")
    assert [layers_kept(model, batch, rebuilt) for _ in range(3)] == [0, 0, 4]
    for now, expected in ((7, 2), (9, 0), (4, 4)):
        used[0] = now * size
        assert layers_kept(model, batch, rebuilt) == expected


def out_of_memory(module, args):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_is_survived(family, rebuilt):
    """Memory runs out once, in the third layer's forward pass. After that, half as many layers keep their graphs."""
    model, batch = without_narrowing(family, 0.1), family.batch()
    model.set_memory_budget(PLENTY)
    layers_kept(model, batch, rebuilt)

    def once(module, args):
        handle.remove()
        out_of_memory(module, args)

    handle = model.encoder_layers[2].register_forward_pre_hook(once)
    torch.manual_seed(3)
    assert [layers_kept(model, batch, rebuilt) for _ in range(2)] == [2, 2]


def test_out_of_memory_with_nothing_kept_is_an_error(family):
    model = family.build(DEPTH, beta=0.5)
    model.encoder_layers[2].register_forward_pre_hook(out_of_memory)
    for budget in (None, "0KB", "auto", "2 layers"):
        model.set_memory_budget(budget)
        with pytest.raises(torch.OutOfMemoryError):
            model(**family.batch())


def test_nothing_is_kept_without_gradients(family):
    """A step without gradients does not count as one of the steps before free memory is read either."""
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    planned = noting(model, "auto").planned
    with torch.no_grad():
        for _ in range(4):
            model(**batch)
    assert planned == [RetentionPlan()] * 4
    for _ in range(3):
        model(**batch).loss.backward()
    assert [plan.graphs for plan in planned[4:]] == [0, 0, DEPTH]


def test_free_memory_of_this_machine():
    free, transient = memory_probe.free_memory(CPU)
    assert 2**20 < free < 2**50 and transient == 0
    with pytest.raises(ValueError, match="how much memory of mps is free is not known"):
        memory_probe.free_memory(torch.device("mps"))


def test_it_travels_with_the_configuration_and_not_into_the_stock_one(tmp_path):
    family = FAMILIES["vit"]
    family.build(2, memory_budget="25%").save_pretrained(tmp_path)
    again = family.model.from_pretrained(tmp_path)
    assert again.config.memory_budget == "25%"
    again.set_memory_budget("auto")
    assert again.config.memory_budget == "auto"
    assert not hasattr(hp.to_stock(again).config, "memory_budget")
    assert family.model.from_pretrained(tmp_path, memory_budget="1 layer").config.memory_budget == "1 layer"


def test_callback(tmp_path, rebuilt):
    """The callback of Trainer changes nothing in the model's code or checkpoint."""
    family = FAMILIES["vit"]
    model, batch = family.build(DEPTH, 0.1, beta=0.5), family.batch()
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)] * 4
    args = TrainingArguments(tmp_path, max_steps=4, per_device_train_batch_size=3, use_cpu=True, report_to="none")
    Trainer(model, args, train_dataset=rows, callbacks=[hp.MemoryBudget(PLENTY)]).train()
    assert len(rebuilt) == 2 * DEPTH  # in the first step alone
    assert model.config.memory_budget is None and model.base_model.retention is None


@pytest.mark.parametrize(
    "budget, kept, predicts",
    [(PLENTY, "4 of 4 layers", True), ("gradients", " of 4 layers", True), ("3 layers", "3 of 4 layers", False)],
)
def test_callback_tells(budget, kept, predicts, tmp_path, monkeypatch):
    """It tells what is kept, the peak, and what plain training would need: as soon as that is known, and at the end."""
    family, said = FAMILIES["vit"], []
    monkeypatch.setattr(callbacks.logger, "info", said.append)
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)] * 4
    args = TrainingArguments(tmp_path, max_steps=4, per_device_train_batch_size=3, use_cpu=True, report_to="none")
    Trainer(model, args, train_dataset=rows, callbacks=[hp.MemoryBudget(budget)]).train()
    told = [line for line in said if line.startswith("memory: ")]
    assert len(told) == 2 and all(
        f"{kept} keep their graphs" in line and "the peak so far is " in line for line in told
    )
    assert all(("plain training would need about " in line) == predicts for line in told)


def gradient_bytes(model):
    return sum(p.nbytes for p in model.base_model.layer_parameters() if p.requires_grad)


def test_gradients_that_are_there_already_leave_nothing(family):
    """From the second batch of accumulated gradients on, what is kept would raise the peak."""
    of_many_parameters(family)
    model, batch = family.build(DEPTH), resized(family.batch(), 1)
    planned = noting(model, "gradients").planned
    for _ in range(2):
        model(**batch).loss.backward()
    model.zero_grad()
    model(**batch)
    assert [plan.graphs for plan in planned] == [0, 0, DEPTH]
    assert planned[1].bytes == 0 < planned[2].bytes


def test_no_more_is_kept_than_gradients_take(family):
    of_many_parameters(family)
    model = family.build(DEPTH)
    kept, found = noting(model, "gradients"), []
    for size in (1, 10, 100, 1000):
        for _ in range(2):
            model(**resized(family.batch(), size))
        found.append(kept.planned[-1].bytes)
    assert found[0] == DEPTH * next(iter(kept.measured.values()))[0, False].graph
    assert 0 < found[1] <= gradient_bytes(model) and found[-1] == 0


def test_frozen_parameters_and_freed_gradients_do_not_count(family):
    model = family.build(DEPTH)
    layers = model.encoder_layers
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    for parameter in layers[1].parameters():  # as in optimizers that take the step within the backward pass
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    parameters = model.base_model.layer_parameters()
    assert sum(map(coming, parameters)) == sum(p.nbytes for p in parameters if p.requires_grad) - sum(
        p.nbytes for p in layers[1].parameters()
    )


def test_forward_passes_share_what_gradients_take(family):
    """Forward passes before one backward pass keep no more than one may; those that ended or were dropped do not count."""
    of_many_parameters(family)
    model, batch = family.build(DEPTH), resized(family.batch(), 1)
    kept = noting(model, "gradients")
    model(**batch)
    size = size_of_a_layer(model).graph
    kept.planned.clear()

    def loss():
        return model(**batch).loss

    losses = [loss() for _ in range(12)]
    planned = [plan.bytes for plan in kept.planned]
    assert planned[0] == DEPTH * size and planned[-1] == 0
    assert sum(planned) <= gradient_bytes(model)
    sum(losses).backward()
    model.zero_grad()
    for _ in range(3):  # each one dropped before the next
        loss()
        assert kept.planned[-1].bytes == planned[0]
    another = loss()
    assert kept.planned[-1].bytes == planned[0]
    losses = [loss() for _ in range(11)]
    assert [plan.bytes for plan in kept.planned[-12:]] == planned
    del another, losses
    loss()
    assert kept.planned[-1].bytes == planned[0]


@pytest.mark.slow
@pytest.mark.parametrize("bf16, beta", [pytest.param(False, 1.0, marks=pytest.mark.every_case), (True, 1 / 32)])
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_the_peak_does_not_move(family_name, engine, bf16, beta):
    """According to the accounting, for batch sizes at which all layers, some, and hardly any keep something."""
    family = FAMILIES[family_name]
    if family.row.staged and engine == "pareprop":
        pytest.skip("one engine of a family with stages, as it takes a quarter of a minute")
    subject = family.subject(8, 0.1, wider=3, mlp_ratio=4)
    (way,) = reversible_contenders([beta], (engine,))
    kept = []
    for size in (1, 4) if family.row.staged else (2, 16, 64):
        batch = resized(family.batch(), size)
        none, free = (predict(subject, contender, batch, CPU, bf16) for contender in (way, way.within_gradients()))
        assert free.total <= 1.01 * none.total
        model = subject.build(way)
        planned = noting(model, "gradients").planned
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(**batch)
        kept.append(planned[-1].bytes)
    assert kept[0] > 0 or family.row.staged


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_does_not_move_where_the_head_makes_it(size, bf16):
    """With a large vocabulary the peak is at the logits, while everything that was kept is in memory."""
    family = FAMILIES["roberta"]
    fields = family.config_fields(8, 0.1, wider=3, mlp_ratio=4)
    subject = Subject(hp.RevRobertaForMaskedLM, family.config(**fields | {"vocab_size": 5000}))
    batch = resized(family.batch(), size)
    batch["labels"] = batch["input_ids"]
    (way,) = reversible_contenders([0.5], ("reprop",))
    none, free = (predict(subject, contender, batch, CPU, bf16) for contender in (way, way.within_gradients()))
    assert free.total <= 1.01 * none.total


def test_copies_measure_for_themselves(family, rebuilt):
    """A copy of a model, or one that was pickled, keeps the budget and counts its own parameters."""
    of_many_parameters(family)
    model, batch = family.build(DEPTH, memory_budget="gradients"), resized(family.batch(), 1)
    model(**batch).loss.backward()
    assert len(model.base_model.retention.measured) == 1
    loss = model(**batch).loss  # a graph that no copy has
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model.set_backward_engine("reprop")
        twin = copied(model)
        assert twin.base_model.retention is not model.base_model.retention
        assert not twin.base_model.retention.measured
        twin.zero_grad()
        # The first pass measures, the second one finds gradients of its own.
        assert [layers_kept(twin, batch, rebuilt) for _ in range(2)] == [0, 0]
        twin.zero_grad()
        assert layers_kept(twin, batch, rebuilt) == DEPTH
        assert_same(step(model, batch, "autograd")[1], step(twin, batch, "pareprop")[1])
    del loss


@pytest.mark.cuda
@pytest.mark.parametrize("family_name", FAMILIES)
def test_auto_on_cuda(family_name, rebuilt):
    """Everything is kept if there is enough memory, and less under a cap. The gradients stay the same."""
    family, device = FAMILIES[family_name], torch.device("cuda", 0)
    model = family.build(DEPTH, 0.1, beta=0.5).to(device)
    batch = {name: tensor.to(device) for name, tensor in family.batch().items()}
    reference = step(model, batch, "pareprop")
    model.set_memory_budget("auto")
    assert [layers_kept(model, batch, rebuilt) for _ in range(3)] == [0, 0, DEPTH]
    assert_same(reference[1], step(model, batch, "pareprop")[1])


def test_the_hooks_of_others_are_left_alone(family):
    """Measuring works inside a user's own hooks, such as offloading."""
    model = family.build(2, beta=0.5)
    model.set_memory_budget(PLENTY)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        first = step(model, family.batch(), "pareprop")
    assert_same(first[1], step(model, family.batch(), "pareprop")[1])
