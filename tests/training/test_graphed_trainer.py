"""Trainer with steps that are CUDA graphs. On a CPU an emulation stands in for the graph, which repeats what it captured."""

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from families import FAMILIES, linears
from test_trainer import Samples
from torch.nn.utils import prune
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_pareprop as hp
from hf_pareprop.tools import graphed_trainer
from hf_pareprop.tools.contenders import CHECKPOINTING
from hf_pareprop.tools.model_settings import settings_of


class Emulated:
    """Does what a CUDA graph does: repeats captured settings, and writes to the captured gradients, whatever is in ``.grad``."""

    trainer: Trainer

    def __init__(self, work, names, device):
        self._work, self.rehearsals, self.recorded = work, 0, False

    def rehearse(self, batch):
        self.rehearsals += 1
        return self._work(batch)

    def record(self, batch, pool=None):
        self._shapes = {name: tensor.shape for name, tensor in batch.items()}
        parameters = list(self.trainer.model.parameters())
        self._adds = any(p.grad is not None for p in parameters)
        assert self._adds == (pool is not None)
        self._settings = self._all_settings()
        if not self._adds:
            for p in parameters:
                p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
        self._gradients = [p.grad for p in parameters]
        self.pool, self.recorded = object(), True

    def replay(self, batch):
        assert self._shapes == {name: tensor.shape for name, tensor in batch.items()}
        parameters = list(self.trainer.model.parameters())
        now, gradients = self._all_settings(), [p.grad for p in parameters]
        self._set(self._settings)
        for p in parameters:
            p.grad = None
        loss = self._work(batch)
        self._set(now)
        for p, buffer, gradient in zip(parameters, self._gradients, gradients, strict=True):
            if buffer is not None:
                new = torch.zeros_like(p) if p.grad is None else p.grad
                buffer.copy_(buffer + new if self._adds else new)
            p.grad = gradient
        return loss

    def _all_settings(self):
        model = self.trainer.model
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        wanted = [p.requires_grad for p in model.parameters()]
        return model.config.beta, rates, wanted, self.trainer.current_gradient_accumulation_steps

    def _set(self, settings):
        model = self.trainer.model
        beta, rates, wanted, self.trainer.current_gradient_accumulation_steps = settings
        model.set_beta(beta)
        for module, rate in zip((m for m in model.modules() if isinstance(m, torch.nn.Dropout)), rates, strict=True):
            module.p = rate
        for p, requires_grad in zip(model.parameters(), wanted, strict=True):
            p.requires_grad = requires_grad


class Freeze(TrainerCallback):
    """Freezes the classifier after a step, and thaws it later."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.classifier.requires_grad_(not 8 <= state.global_step < 12)


class Drop(TrainerCallback):
    """Changes the dropout rate in the middle."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 8:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.3


CASES = {
    "plain": {},
    "incomplete last batch": dict(size=27),
    "accumulation": dict(gradient_accumulation_steps=2, size=28),
    "accumulation with an incomplete batch": dict(gradient_accumulation_steps=3, size=27),
    "accumulation of means": dict(gradient_accumulation_steps=3, size=32, counts=False),
    "evaluation": dict(eval_strategy="steps", eval_steps=3),
    "clipping": dict(max_grad_norm=0.01),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "bf16": dict(bf16=True),
    "a changing beta": dict(callbacks=lambda: [hp.BetaSchedule.anneal(0.5, [1 / 4, 1 / 8])]),
    "frozen in the middle": dict(callbacks=lambda: [Freeze()]),
    "another dropout rate": dict(callbacks=lambda: [Drop()]),
}


def train(trainer_class, folder, device, size=24, callbacks=list, counts=True, **arguments):
    """The losses, and the trained weights."""
    model = FAMILIES["vit"].build(2, 0.1, beta=0.5)
    given = dict(per_device_train_batch_size=4, num_train_epochs=4, learning_rate=1e-2, logging_steps=1, seed=3)
    given |= dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu")
    args = TrainingArguments(str(folder), **{**given, **arguments})
    data = Samples(FAMILIES["vit"], size)
    trainer = trainer_class(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks())
    trainer.model_accepts_loss_kwargs = counts
    Emulated.trainer = trainer
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def log(caplog, monkeypatch):
    """What the package logs. It logs as a part of transformers, whose logger does not hand records on by itself."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="transformers.hf_pareprop"):
        yield caplog


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(graphed_trainer, "Capture", Emulated)
    monkeypatch.setattr(graphed_trainer, "check_one_device", lambda trainer: None)


def graphs_in(text):
    """The line that tells how many steps were graphs, after the numbers of these and of all steps."""
    (line,) = (line for line in text.splitlines() if "ran as a CUDA graph" in line)
    words = line[: line.index(" training steps")].split()
    return int(words[-3]), int(words[-1]), line


@pytest.mark.parametrize("case", CASES)
def test_graphs_train_as_trainer_does(case, emulated, tmp_path, log):
    expected, weights = train(Trainer, tmp_path, "cpu", **CASES[case])
    losses, found = train(hp.GraphedTrainer, tmp_path, "cpu", **CASES[case])
    assert losses == expected
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name
    graphed, steps, line = graphs_in(log.text)
    assert graphed >= 5 and steps >= 24, line


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_cuda_graphs_train_as_trainer_does(case, tmp_path, log):
    expected, weights = train(Trainer, tmp_path, "cuda", **CASES[case])
    losses, found = train(hp.GraphedTrainer, tmp_path, "cuda", **CASES[case])
    graphed, steps, line = graphs_in(log.text)
    assert graphed >= 5 and steps >= 24, line
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


class Modal(torch.optim.SGD):
    """An optimizer with modes, as those without a schedule of the learning rate. It refuses to step in the wrong one."""

    training = True

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        assert self.training
        return super().step(closure)


class Stream(IterableDataset):
    """Texts in this order. Three batches of two make an update. In every other update the first batch is a shorter one."""

    def __iter__(self):
        for batch in range(45):
            length = 5 if batch % 6 == 0 else 7
            for row in range(2):
                yield {"input_ids": torch.arange(4, 4 + length) + batch % 9 + row, "labels": torch.tensor(batch % 2)}


class Names(Trainer):
    """Its batches also have names, which are not tensors."""

    def get_train_dataloader(self):
        return [{**batch, "names": ["a", "b"]} for batch in super().get_train_dataloader()]

    def compute_loss(self, model, inputs, *args, **kwargs):
        assert inputs.pop("names") == ["a", "b"]
        return super().compute_loss(model, inputs, *args, **kwargs)


class GraphedNames(Names, hp.GraphedTrainer):
    pass


def trained(trainer_class, folder, **given):
    """The weights of a small text model after training, and the trainer."""
    model = FAMILIES["roberta"].build(2, 0.1, beta=0.5)
    arguments = dict(max_steps=15, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-2)
    arguments |= dict(
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **given.pop("arguments", {})
    )
    make_optimizer = given.pop("optimizer", torch.optim.SGD)
    optimizers = make_optimizer(model.parameters(), lr=1e-2), None
    trainer = trainer_class(
        model, TrainingArguments(str(folder), **arguments), train_dataset=Stream(), optimizers=optimizers, **given
    )
    Emulated.trainer = trainer
    trainer.train()
    return [p.detach().clone() for p in model.parameters()], trainer


def test_gradients_that_a_graph_did_not_make_are_added_to_as_usual(emulated, tmp_path, log):
    """A graph adds to its own gradients alone. In some updates the first batch has another shape than the captured one."""
    expected, _ = trained(Trainer, tmp_path)
    found, _ = trained(hp.GraphedTrainer, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    graphed, steps, line = graphs_in(log.text)
    assert 6 <= graphed <= 38 and steps == 45 and "had another shape" in line


def test_modes_of_the_optimizer(emulated, tmp_path):
    """Evaluation leaves it in evaluation mode, and a replay does not run the Python code that ends that."""
    given = dict(optimizer=Modal, arguments=dict(eval_strategy="steps", eval_steps=3, gradient_accumulation_steps=1))
    rows = [{"input_ids": torch.arange(4, 11), "labels": torch.tensor(0)}]
    expected, _ = trained(Trainer, tmp_path, eval_dataset=rows, **copy.deepcopy(given))
    found, _ = trained(hp.GraphedTrainer, tmp_path, eval_dataset=rows, **given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_that_are_not_tensors_are_ordinary_steps(emulated, tmp_path, log):
    expected, _ = trained(Names, tmp_path)
    found, _ = trained(GraphedNames, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "0 of 45 training steps ran" in log.text and "45 had inputs other than tensors" in log.text


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12:
            raise KeyboardInterrupt


def test_training_twice_also_after_an_error(emulated, tmp_path, log):
    """Every training captures its own graphs, and frees them."""
    _, trainer = trained(hp.GraphedTrainer, tmp_path)
    trainer.train()
    fails = Fails()
    trainer.add_callback(fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(fails)
    trainer.train()
    lines = [record.message for record in log.records if "CUDA graph" in record.message]
    assert len(lines) == 4 and len({line for line in lines if " of 45 " in line}) == 1 and " of 36 " in lines[2]


def test_a_trainer_that_is_dropped_is_freed(emulated, tmp_path):
    """With its model and optimizer, at once, as Trainer is."""
    _, trainer = trained(hp.GraphedTrainer, tmp_path)
    Emulated.trainer = None
    kept = weakref.ref(trainer.model)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert kept() is None
    finally:
        gc.enable()


def test_hooks_after_accumulation_are_refused(emulated, tmp_path):
    model = FAMILIES["vit"].build(2)
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = hp.GraphedTrainer(model, args, train_dataset=Samples(FAMILIES["vit"]))
    with pytest.raises(ValueError, match="a parameter has a hook that runs after its gradient was accumulated"):
        trainer.train()


CHANGES = {
    "configuration": lambda model: setattr(model.config, "beta", 0.25),
    "mode": lambda model: model.encoder_layers[0].eval(),
    "dropout rate": lambda model: setattr(linears(model.encoder_layers[0])[0], "p", 0.5),
    "attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),
    "frozen": lambda model: model.classifier.requires_grad_(False),
    "parameter replaced": lambda model: setattr(
        model.classifier, "weight", torch.nn.Parameter(model.classifier.weight.detach().clone())
    ),
    "memory replaced": lambda model: setattr(
        model.classifier.weight, "data", model.classifier.weight.detach().clone()
    ),
    "module replaced": lambda model: setattr(model, "classifier", torch.nn.Linear(1, 1)),
    "pruned": lambda model: prune.l1_unstructured(model.classifier, "weight", 0.5),
    "hook": lambda model: model.classifier.register_forward_hook(lambda *_: None),
    "hook of gradients": lambda model: model.classifier.register_full_backward_hook(lambda *_: None),
    "number in a dictionary": lambda model: model.extra.update(default=3.0),
    "buffer": lambda model: model.register_buffer("centre", torch.ones(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    model = FAMILIES["vit"].build(2)
    model.extra = {"default": 1.0}
    model(**FAMILIES["vit"].batch()).loss.backward()  # the first pass notes the type of problem, for example
    before = settings_of(model)
    model(**FAMILIES["vit"].batch()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert settings_of(model) == before
    CHANGES[change](model)
    assert settings_of(model) != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(gradient_checkpointing=True), "gradient_checkpointing restores random numbers on the host"),
        (dict(torch_empty_cache_steps=2), "torch_empty_cache_steps frees memory"),
        (dict(torch_compile=True), r"model.set_compile_steps\(True\)"),
        (dict(optim="lomo"), "optim='lomo' steps within the backward pass"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(graphed_trainer, "check_one_device", lambda trainer: None)
    model = FAMILIES["vit"].build_stock(2) if "gradient_checkpointing" in arguments else FAMILIES["vit"].build(2)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **arguments)
    with pytest.raises(ValueError, match=f"GraphedTrainer cannot capture this: .*{message}"):
        hp.GraphedTrainer(model, args)


def test_checkpointing_of_the_model_is_refused(monkeypatch, tmp_path):
    """Also if it was not asked for by the arguments."""
    monkeypatch.setattr(graphed_trainer, "check_one_device", lambda trainer: None)
    model = FAMILIES["vit"].build_stock(2)
    CHECKPOINTING.prepare(model)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="gradient_checkpointing restores random numbers"):
        hp.GraphedTrainer(model, args)


def test_half_precision_and_several_devices_are_refused():
    args = SimpleNamespace(fp16=True, gradient_checkpointing=False, torch_compile=False, optim="adamw_torch")
    args.torch_empty_cache_steps = None
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="fp16=True scales gradients on the host: .* on several devices"):
        graphed_trainer.check_repeatable(SimpleNamespace(args=args, model=model))
    processes = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    args = SimpleNamespace(device=torch.device("cuda", 0), n_gpu=2)
    with pytest.raises(ValueError, match="would use 2 GPUs, .* CUDA_VISIBLE_DEVICES=0"):
        graphed_trainer.check_one_device(SimpleNamespace(args=args, accelerator=processes))
    args.n_gpu, processes.num_processes, processes.distributed_type = 1, 2, DistributedType.MULTI_GPU
    with pytest.raises(ValueError, match="training is distributed .*: 2"):
        graphed_trainer.check_one_device(SimpleNamespace(args=args, accelerator=processes))


def test_a_cpu_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(
        ValueError, match=r"training is on cpu, and CUDA graphs need a CUDA device: take transformers.Trainer"
    ):
        hp.GraphedTrainer(FAMILIES["vit"].build(2), args)


def test_texts_of_many_lengths_are_ordinary_steps(emulated, tmp_path, log):
    """They train as with Trainer, and a warning says that no step was a graph."""
    weights = []
    for trainer_class in (Trainer, hp.GraphedTrainer):
        model = FAMILIES["roberta"].build(2, 0.1, beta=0.5)
        args = TrainingArguments(
            str(tmp_path),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=1,
            max_steps=20,
        )
        rows = [{"input_ids": torch.arange(4, 6 + n), "labels": torch.tensor(n % 2)} for n in range(20)]
        Emulated.trainer = trainer_class(model, args, train_dataset=rows)
        Emulated.trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (record,) = (record for record in log.records if "CUDA graph" in record.message)
    assert record.levelname == "WARNING" and record.message == (
        "0 of 20 training steps ran as a CUDA graph. The shapes of batches differed too much: pad to one length."
    )
