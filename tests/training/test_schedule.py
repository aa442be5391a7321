"""Changing beta while training: exact at every stage, resumable, and a stock model at the end."""

import pytest
import torch
from families import FAMILIES, assert_same, step
from peft import LoraConfig, get_peft_model
from test_trainer import train
from transformers import TrainerCallback

import hf_pareprop as hp


class Seen(TrainerCallback):
    """Records the beta of every step."""

    def __init__(self):
        self.betas = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.betas.append(next(m for m in model.modules() if hasattr(m, "set_beta")).config.beta)


def build(family, beta=0.5, seed=0):
    return family.build(2, 0.1, beta=beta, seed=seed)


def test_anneals_to_the_stock_model(family, tmp_path):
    """Twelve steps; the exported model computes what the trained one does, bit for bit."""
    model, seen, batch = build(family), Seen(), family.batch()
    train(family, tmp_path, model=model, callbacks=[hp.BetaSchedule.anneal(0.4), seen])
    assert seen.betas == [0.5] * 5 + [0.25] * 2 + [0.125] + [1 / 16] * 2 + [1 / 32] + [0]
    assert model.config.beta == 0
    if family.has_stock:
        stock = hp.to_stock(model).eval()
        assert torch.equal(stock(**batch).logits, model.eval()(**batch).logits)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.beta == 0


@pytest.mark.slow
def test_every_stage_is_exact(family, tmp_path):
    """Losses and weights are those of the reference, which stores activations."""
    runs = [
        train(family, tmp_path, engine, model=build(family, [0.5, 1.0]), callbacks=[hp.BetaSchedule.anneal(0.2)])
        for engine in ("autograd", "pareprop")
    ]
    assert runs[0][0] == runs[1][0]
    assert_same(*(run[1] for run in runs))


@pytest.mark.slow
def test_resuming_in_the_middle_of_a_stage(family, tmp_path):
    whole = train(family, tmp_path / "whole", model=build(family), callbacks=[hp.BetaSchedule.anneal(0.4)])
    train(family, tmp_path / "parts", model=build(family), callbacks=[hp.BetaSchedule.anneal(0.4)], stop=7)
    seen = Seen()
    rest = train(
        family,
        tmp_path / "parts",
        model=build(family, seed=9),
        callbacks=[hp.BetaSchedule.anneal(0.4), seen],
        resume=str(tmp_path / "parts" / "checkpoint-7"),
    )
    assert seen.betas[0] == 0.125
    assert_same(whole[1], rest[1])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_annealing_ends_at_the_stock_model_in_few_steps(steps, tmp_path):
    family, seen = FAMILIES["vit"], Seen()
    model = build(family)
    train(family, tmp_path, model=model, callbacks=[hp.BetaSchedule.anneal(), seen], max_steps=steps)
    assert len(seen.betas) == steps and seen.betas[-1] == 0 and model.config.beta == 0
    assert seen.betas == sorted(seen.betas, reverse=True)


def test_resuming_a_schedule_that_grows(tmp_path):
    """It resumes from the model in the checkpoint, whose betas are limited by the stage in which it was saved."""
    family, caps = FAMILIES["vit"], {0: 1 / 8, 0.25: 0.25, 0.5: 1.0}
    whole = train(family, tmp_path / "whole", model=build(family, [0.5, 1.0]), callbacks=[hp.BetaSchedule(caps)])
    train(family, tmp_path / "parts", model=build(family, [0.5, 1.0]), callbacks=[hp.BetaSchedule(caps)], stop=2)
    checkpoint, seen = str(tmp_path / "parts" / "checkpoint-2"), Seen()
    model = family.model.from_pretrained(checkpoint).train()
    assert model.config.beta == 1 / 8
    rest = train(family, tmp_path / "parts", model=model, callbacks=[hp.BetaSchedule(caps), seen], resume=checkpoint)
    assert seen.betas == [1 / 8] + [1 / 4] * 3 + [[0.5, 1.0]] * 6
    assert_same(whole[1], rest[1])


def test_growing_and_conventional_layers(tmp_path):
    family, seen = FAMILIES["vit"], Seen()
    schedule = hp.BetaSchedule({0.5: 1.0, 0: 0.125, 0.25: 0.25})
    train(family, tmp_path, model=build(family, [0.0, 0.5]), callbacks=[schedule, seen])
    assert seen.betas == [[0, 0.125]] * 3 + [[0, 0.25]] * 3 + [[0, 0.5]] * 6


def test_an_adapter_around_the_model(tmp_path):
    family = FAMILIES["roberta"]
    model = get_peft_model(build(family), LoraConfig(target_modules=["query", "value"]))
    train(family, tmp_path, model=model, callbacks=[hp.BetaSchedule.anneal(0.5)])
    assert model.get_base_model().config.beta == 0


def test_set_beta(family):
    """The gradients are those of a model that was built with this beta."""
    batch, model = family.batch(), family.build(3, beta=1.0)
    model.set_beta([0.5, 0, 0.25])
    assert model.config.beta == [0.5, 0, 0.25]
    assert_same(step(model, batch)[1], step(family.build(3, beta=[0.5, 0, 0.25]), batch)[1])
    with pytest.raises(ValueError, match="beta has 2 entries"):
        model.set_beta([0.5, 0.5])
    assert model.config.beta == [0.5, 0, 0.25]


def test_what_is_refused(tmp_path):
    family = FAMILIES["roberta"]
    with pytest.raises(ValueError, match="1.5 is not a fraction of the training"):
        hp.BetaSchedule({1.5: 0.5})
    with pytest.raises(ValueError, match="beta=0.3 is not"):
        hp.BetaSchedule({0.5: 0.3})
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        arguments = dict(
            load_best_model_at_end=True, eval_strategy="no", save_strategy="best", metric_for_best_model="x"
        )
        train(family, tmp_path, model=build(family), callbacks=[hp.BetaSchedule.anneal()], **arguments)
    with pytest.raises(ValueError, match="is not a reversible model"):
        train(family, tmp_path, model=family.build_stock(), callbacks=[hp.BetaSchedule.anneal()])
