"""Layers that keep their graphs: the same gradients, fewer rebuilds, and as many as a budget allows."""

import copy
import pickle

import pytest
import torch
import transformers
from families import FAMILIES, assert_same, cast, step
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments

import hf_pareprop as hp
from hf_pareprop import memory_probe, retention
from hf_pareprop.layer_call import LayerCall
from hf_pareprop.memory_probe import coming, counting_saved
from hf_pareprop.retention import Retention, RetentionPlan, Sizes, share_out
from hf_pareprop.saved_linear import SavedLinears
from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.contenders import Subject, reversible_contenders

DEPTH = 4
CPU = torch.device("cpu")


@pytest.fixture
def rebuilt(monkeypatch):
    """The layers rebuilt since this list was last cleared, by what their records say."""
    found = []
    original = LayerCall.rebuild

    def noting(self, index, *args):
        found.append((self.module.layer_idx, index))
        return original(self, index, *args)

    monkeypatch.setattr(LayerCall, "rebuild", noting)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("beta", [1.0, 0.5, [0.5, 0, 1.0, 0.25], [0.5, 0.5, 0.25, 0]])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9])
def test_gradients_are_the_same(name, precision, dropout, beta, layers, rebuilt):
    family = FAMILIES[name]
    model = family.build(DEPTH, dropout, beta=beta)
    batch, autocast = family.batch(), precision == "autocast"
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    loss, grads, rng = step(model, batch, "autograd", autocast=autocast)
    model.set_retention(layers)
    for engine in ("reprop", "pareprop"):
        rebuilt.clear()
        again = step(model, batch, engine, autocast=autocast)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])
        betas = beta if isinstance(beta, list) else [beta] * DEPTH
        expected = [(i, s) for i in range(DEPTH) for s in (0, 1) if betas[i] and i < DEPTH - layers]
        assert sorted(rebuilt) == expected


def test_with_anchors_and_the_overlap(family, lane):
    model = family.build(6, 0.1, beta=0.5, anchor_every=2)
    reference = step(model, family.batch(), "autograd")
    for layers in range(7):
        model.set_retention(layers)
        assert_same(reference[1], step(model, family.batch(), "pareprop")[1])


def test_frozen_layers_and_two_forwards_before_a_backward(family):
    model = family.build(DEPTH, 0.1, beta=0.5)
    for layer in model.base_model.encoder.layer[:2]:
        layer.requires_grad_(False)
    found = []
    for layers in (0, 3):
        model.set_retention(layers)
        model.zero_grad()
        torch.manual_seed(5)
        losses = [model(**family.batch()).loss for _ in range(2)]
        (losses[1] + 2 * losses[0]).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


def kept_bytes(model, batch):
    """What a forward pass saves beside parameters."""
    with counting_saved(tuple(model.parameters())) as found:
        loss = model(**batch).loss
    del loss
    return sum(found.values())


def graph_size(model):
    """Bytes that a layer keeps, measured in the one forward pass so far."""
    ((graph, _),) = model.base_model.retention._sizes.values()
    return graph


def test_a_layer_is_measured_as_what_it_keeps(family):
    """What one more kept layer adds to all that is saved, and not to what the hooks of others see."""
    model, batch = family.build(DEPTH, 0.1, beta=0.5), resized(family.batch(), 24)
    model.set_retention(memory_budget=10**12)
    model(**batch)
    size = graph_size(model)
    model.set_retention(1)
    one = kept_bytes(model, batch)
    model.set_retention(3)
    assert kept_bytes(model, batch) - one == pytest.approx(2 * size, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_prediction_of_memory_is_within_ten_per_cent(family_name, bf16):
    """Of the planner, against the accounting of a whole step, where activations matter."""
    family = FAMILIES[family_name]
    wide = {"hidden_size": 96, "intermediate_size": 384}
    subject = Subject.of(family.stock_model.__name__, family.stock_config(**family.config_fields(8, 0.1) | wide))
    batch = resized(family.batch(), 64)
    (way,) = reversible_contenders([0.5], ("reprop",))
    model = subject.build(way)
    model.set_retention(memory_budget=10**12)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(**batch)
    size = graph_size(model)

    def graphs(layers):
        return predict(subject, way.retaining(layers), batch, CPU, bf16).graphs

    assert graphs(8) - graphs(5) == pytest.approx(3 * size, rel=0.1)


def layers_kept(model, batch, rebuilt):
    rebuilt.clear()
    model(**batch).loss.backward()
    return model.config.num_hidden_layers - len({layer for layer, _ in rebuilt})


@pytest.fixture
def no_products(monkeypatch):
    """Graphs alone are kept, as in a model that has no products."""
    monkeypatch.setattr(SavedLinears, "results", [])


def test_bytes(family, rebuilt, no_products):
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    assert [layers_kept(model, batch, rebuilt) for _ in range(2)] == [1, DEPTH]
    size = graph_size(model)
    for budget, expected in ((0, 0), (size - 1, 0), (size, 1), (3 * size + 1, 3)):
        model.set_retention(memory_budget=budget)
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
        (40, (0, 4)),  # all products, then graphs in their place
        (129, (0, 4)),
        (130, (1, 3)),
        (399, (3, 1)),
        (400, (4, 0)),
        (10**9, (4, 0)),
    ],
)
def test_sharing_out(allowance, kept):
    assert share_out(allowance, Sizes(graph=100, products=10), 4) == kept
    assert RetentionPlan(*kept).bytes(Sizes(100, 10)) <= max(0, allowance)


@pytest.mark.parametrize("allowance, kept", [(-1, 0), (0, 0), (99, 0), (100, 1), (399, 3), (400, 4), (500, 4)])
def test_sharing_out_without_products(allowance, kept):
    assert share_out(allowance, Sizes(graph=100), 4) == (kept, 0)


def test_products_are_measured_and_kept_by_a_budget(family, monkeypatch):
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    model(**batch)
    ((graph, products),) = model.base_model.retention._sizes.values()
    tokens = 3 * (11 if "input_ids" in batch else 10)
    assert products == tokens * 32 * 4 < graph / 8
    planned, original = [], Retention.plan

    def noting(self, *args):
        planned.append(original(self, *args))
        return planned[-1]

    monkeypatch.setattr(Retention, "plan", noting)
    reference = step(model, batch, "autograd")
    model.set_retention(memory_budget=2 * graph + 2 * products)
    for _ in range(2):
        assert_same(reference[1], step(model, batch, "pareprop")[1])
    assert planned[1:] == [(1, 0), (2, 2)]


def test_other_shapes(family, rebuilt, no_products):
    """By what a layer kept per element at first, then as measured; small batches keep more layers."""
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    model(**resized(batch, 8))
    size = graph_size(model)
    model.set_retention(memory_budget=2 * size)
    model(**resized(batch, 8))
    kept = {n: layers_kept(model, resized(batch, n), rebuilt) for n in (8, 4, 16, 32)}
    assert kept == {8: 2, 4: 4, 16: 1, 32: 0}
    assert len(model.base_model.retention._sizes) == 3  # nothing kept, nothing measured


def test_free_memory(family, rebuilt, monkeypatch, no_products):
    """Looked at in the third step; what the first two had at their peak besides is scaled up for larger batches."""
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    model(**resized(batch, 8))
    size = graph_size(model)
    monkeypatch.setattr(retention, "free_memory", lambda device: (4 * size, 3 * size))
    model.set_retention(memory_budget=0.5)
    assert [layers_kept(model, resized(batch, 8), rebuilt) for _ in range(3)] == [1, 1, 3]
    assert layers_kept(model, resized(batch, 9), rebuilt) == 2
    assert layers_kept(model, resized(batch, 16), rebuilt) == 0
    model.set_retention(memory_budget="auto")
    monkeypatch.setattr(retention, "free_memory", lambda device: (int(3.9 / retention.SHARE["cpu"] * size), 0))
    assert [layers_kept(model, resized(batch, 8), rebuilt) for _ in range(3)] == [1, 1, 4]


def test_what_is_allocated_later_counts(family, rebuilt, monkeypatch, no_products):
    """With gradient accumulation the optimizer's state comes after the third forward pass."""
    model, batch = family.build(DEPTH, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    model(**batch)
    size = graph_size(model)
    used = [5 * size]
    monkeypatch.setattr(retention, "free_memory", lambda device: (3 * size, 0))
    monkeypatch.setattr(retention, "in_use", lambda device: used[0])
    model.set_retention(memory_budget=1.0)
    assert [layers_kept(model, batch, rebuilt) for _ in range(3)] == [1, 1, 4]
    for now, expected in ((7, 2), (9, 0), (4, 4)):
        used[0] = now * size
        assert layers_kept(model, batch, rebuilt) == expected


def test_out_of_memory_is_survived(family, rebuilt, monkeypatch, no_products):
    """In the forward pass of the third layer, once: half as many layers keep their graphs from then on."""
    model, batch = family.build(DEPTH, 0.1, beta=0.5), family.batch()
    model.set_retention(memory_budget=10**12)
    layers_kept(model, batch, rebuilt)
    original, failures = LayerCall.run, []

    def fails_once(self, previous, current, undoable=False):
        if self.module.layer_idx == 2 and not undoable and not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, previous, current, undoable)

    monkeypatch.setattr(LayerCall, "run", fails_once)
    assert [layers_kept(model, batch, rebuilt) for _ in range(2)] == [2, 2]
    assert failures


def test_out_of_memory_with_nothing_kept_is_an_error(family, monkeypatch):
    model = family.build(DEPTH, beta=0.5)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LayerCall, "run", fails)
    for memory_budget in (None, 0, "auto"):
        model.set_retention(memory_budget=memory_budget)
        with pytest.raises(torch.OutOfMemoryError):
            model(**family.batch())


def test_nothing_is_kept_without_gradients(family):
    model = family.build(DEPTH, beta=0.5)
    model.set_retention(memory_budget="auto")
    with torch.no_grad():
        for _ in range(4):
            model(**family.batch())
    assert model.base_model.retention._steps == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(retained_layers=-1), "retained_layers=-1 is not a number of layers"),
        (dict(retained_layers=True), "retained_layers=True"),
        (dict(memory_budget="lots"), "memory_budget='lots' is not None, 'auto'"),
        (dict(memory_budget=1.5), "memory_budget=1.5"),
        (dict(memory_budget=-1), "memory_budget=-1"),
        (dict(memory_budget=True), "memory_budget=True"),
        (dict(retained_layers=1, memory_budget="auto"), "exclude each other"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        hp.RevViTConfig(**fields)


def test_free_memory_of_this_machine():
    free, transient = memory_probe.free_memory(CPU)
    assert 2**20 < free < 2**50 and transient == 0
    with pytest.raises(ValueError, match="give memory_budget as a number of bytes"):
        memory_probe.free_memory(torch.device("mps"))


def test_it_travels_with_the_configuration_and_not_into_the_stock_one(tmp_path):
    family = FAMILIES["vit"]
    family.build(2, memory_budget=0.25).save_pretrained(tmp_path)
    again = family.model.from_pretrained(tmp_path)
    assert again.config.memory_budget == 0.25
    assert not hasattr(hp.to_stock(again).config, "memory_budget")
    assert family.model.from_pretrained(tmp_path, memory_budget=None, retained_layers=1).config.retained_layers == 1


def test_callback(tmp_path, rebuilt):
    """Trainer's side of it: nothing in the model's code or checkpoint."""
    family = FAMILIES["vit"]
    model, batch = family.build(DEPTH, 0.1, beta=0.5), family.batch()
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)] * 4
    args = TrainingArguments(tmp_path, max_steps=4, per_device_train_batch_size=3, use_cpu=True, report_to="none")
    callback = hp.MemoryBudget(10**12)
    from transformers import Trainer

    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert len(rebuilt) == 2 * (DEPTH - 1)  # in the first step alone
    assert model.config.memory_budget is None and model.base_model.retention is None


def planned_bytes(model, batch):
    """What each of two forward and backward passes plans to keep; the first one measures."""
    found = []
    for _ in range(2):
        loss = model(**batch).loss
        found.append(model.base_model.retention._planned)
        loss.backward()
    return found


def gradient_bytes(model):
    return sum(p.nbytes for p in model.base_model.encoder.layer.parameters() if p.requires_grad)


def test_gradients_that_are_there_already_leave_nothing(family):
    """Of the second step on in gradient accumulation: what is kept would come on top of the peak."""
    model, batch = family.build(DEPTH, memory_budget="gradients"), family.batch()
    model(**batch).loss.backward()
    assert planned_bytes(model, batch) == [0, 0]
    model.zero_grad()
    assert planned_bytes(model, batch)[0] > 0


def test_no_more_is_kept_than_gradients_take(family):
    model = family.build(DEPTH, memory_budget="gradients")
    planned = []
    for size in (1, 10, 100, 1000):
        for _ in range(2):
            model(**resized(family.batch(), size))
        planned.append(model.base_model.retention._planned)
    assert planned[0] == DEPTH * model.base_model.retention._sizes[min(model.base_model.retention._sizes)].graph
    assert 0 < planned[1] <= gradient_bytes(model) and planned[-1] == 0


def test_frozen_parameters_and_freed_gradients_do_not_count(family):
    model = family.build(DEPTH, memory_budget="gradients")
    layers = model.base_model.encoder.layer
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    for parameter in layers[1].parameters():  # as in optimizers that take the step within the backward pass
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    whole = sum(p.nbytes for p in layers.parameters())
    assert sum(map(coming, layers.parameters())) == whole // 2


def test_forward_passes_share_what_gradients_take(family):
    """Forward passes before one backward pass keep no more than one may; those that ended or were dropped do not count."""
    model, batch = family.build(DEPTH, memory_budget="gradients"), resized(family.batch(), 1)
    model(**batch)
    retention = model.base_model.retention
    planned = []

    def loss():
        found = model(**batch).loss
        planned.append(retention._planned)
        return found

    losses = [loss() for _ in range(12)]
    assert planned[0] == DEPTH * graph_size(model) and planned[-1] == 0
    assert sum(planned) <= gradient_bytes(model)
    assert sum(retention._waiting.values()) == sum(planned)
    sum(losses).backward()
    assert not retention._waiting
    model.zero_grad()
    dropped = loss()
    assert planned[-1] == planned[0] and len(retention._waiting) == 1
    del dropped
    assert not retention._waiting


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_the_peak_does_not_move(family_name, engine, bf16, beta):
    """By the accounting, over sizes of batch at which all layers, some, and hardly any keep something."""
    family = FAMILIES[family_name]
    wide = {"hidden_size": 96, "intermediate_size": 384}
    subject = Subject.of(family.stock_model.__name__, family.stock_config(**family.config_fields(8, 0.1) | wide))
    (way,) = reversible_contenders([beta], (engine,))
    kept = []
    for size in (2, 16, 64):
        batch = resized(family.batch(), size)
        none, free = (predict(subject, contender, batch, CPU, bf16) for contender in (way, way.within_gradients()))
        assert free.total <= 1.01 * none.total
        model = subject.build(way.within_gradients())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(**batch)
        kept.append(model.base_model.retention._planned)
    assert kept[0] > 0


@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_does_not_move_where_the_head_makes_it(size, bf16):
    """With a large vocabulary it lies in the logits, while all that was kept is in memory."""
    fields = FAMILIES["roberta"].config_fields(8, 0.1) | {"hidden_size": 96, "intermediate_size": 384}
    subject = Subject.of("RobertaForMaskedLM", transformers.RobertaConfig(**fields | {"vocab_size": 5000}))
    batch = resized(FAMILIES["roberta"].batch(), size)
    batch["labels"] = batch["input_ids"]
    (way,) = reversible_contenders([0.5], ("reprop",))
    none, free = (predict(subject, contender, batch, CPU, bf16) for contender in (way, way.within_gradients()))
    assert free.total <= 1.01 * none.total


def test_copies_measure_for_themselves(family):
    """A copy of a model, or one that was pickled, keeps the budget and counts its own parameters."""
    model = family.build(DEPTH, memory_budget="gradients")
    loss = model(**family.batch()).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        retention = twin.base_model.retention
        assert not retention._sizes and not retention._waiting
        assert next(iter(retention._parameters())) is next(twin.base_model.encoder.layer.parameters())
        assert_same(step(model, family.batch(), "autograd")[1], step(twin, family.batch(), "pareprop")[1])
    del loss


@pytest.mark.cuda
@pytest.mark.parametrize("family_name", FAMILIES)
def test_auto_on_cuda(family_name, rebuilt):
    """Everything is kept where there is plenty of room, and less under a cap; the gradients stay the same."""
    family, device = FAMILIES[family_name], torch.device("cuda", 0)
    model = family.build(DEPTH, 0.1, beta=0.5).to(device)
    batch = {name: tensor.to(device) for name, tensor in family.batch().items()}
    reference = step(model, batch, "pareprop")
    model.set_retention(memory_budget="auto")
    assert [layers_kept(model, batch, rebuilt) for _ in range(3)] == [1, 1, DEPTH]
    assert_same(reference[1], step(model, batch, "pareprop")[1])


def test_the_hooks_of_others_are_left_alone(family):
    """Measuring works inside a user's own hooks, such as offloading."""
    model = family.build(2, beta=0.5)
    model.set_retention(memory_budget=10**12)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        first = step(model, family.batch(), "pareprop")
    assert_same(first[1], step(model, family.batch(), "pareprop")[1])
