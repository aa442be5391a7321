"""The stock Trainer, with nothing changed but the model."""

import numpy
import pytest
import torch
from families import FAMILIES
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_pareprop as hp


class Samples(Dataset):
    """Random sentences or images, the same for every run.

    Args:
        label: a function that makes the label of a row from a random number generator.
    """

    def __init__(self, family, size=24, label=None):
        self.rows = []
        for i in range(size):
            row = {k: v[i % 3].clone() for k, v in family.batch().items()}
            noise = torch.Generator().manual_seed(i)
            if "input_ids" in row:
                tokens = row["attention_mask"].bool()
                row["input_ids"][tokens] = torch.randint(4, 61, (int(tokens.sum()),), generator=noise)
            else:
                row["pixel_values"] = torch.randn(row["pixel_values"].shape, generator=noise)
            if label is not None:
                row["labels"] = label(noise)
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stop(TrainerCallback):
    """Stops training in the middle of an epoch after saving, as if the machine were lost."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


DEFAULTS = dict(per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2, logging_steps=1, seed=3)
DEFAULTS |= dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)


def train(
    family, folder, engine="pareprop", model=None, stop=None, resume=None, callbacks=(), label=None, **arguments
):
    """The losses of all steps, and the trained parameters."""
    model = model or family.build(2, 0.1, beta=0.5)
    if hasattr(model, "set_backward_engine"):
        model.set_backward_engine(engine)
    args = TrainingArguments(str(folder), **{**DEFAULTS, **arguments})
    callbacks = [*callbacks, *([Stop(stop)] if stop else [])]
    trainer = Trainer(model, args, train_dataset=Samples(family, label=label), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


SETTINGS = {
    "plain": {},
    "gradient accumulation": dict(gradient_accumulation_steps=3, per_device_train_batch_size=2),
    "clipping": dict(max_grad_norm=0.01),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "bf16": dict(bf16=True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_same_training_as_with_autograd(family, engine, setting, tmp_path):
    expected = train(family, tmp_path, "autograd", **SETTINGS[setting])
    found = train(family, tmp_path, engine, **SETTINGS[setting])
    assert expected[0] == found[0] and len(found[0]) >= 6
    assert all(torch.equal(found[1][n], p) for n, p in expected[1].items())
    assert len(set(found[0].values())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "gradient accumulation", "bf16"])
def test_resuming_in_the_middle_of_an_epoch(family, setting, tmp_path):
    """Losses and weights are exactly those of an uninterrupted run. A checkpoint that lacks weights would change them."""
    arguments = SETTINGS[setting]
    expected = train(family, tmp_path / "whole", **arguments)
    stop = 2 if setting == "gradient accumulation" else 3
    begun = train(family, tmp_path / "parts", stop=stop, **arguments)
    assert max(begun[0]) == stop
    checkpoint = str(tmp_path / "parts" / f"checkpoint-{stop}")
    other = family.build(2, 0.1, beta=0.5, seed=99)
    found = train(family, tmp_path / "parts", resume=checkpoint, model=other, **arguments)
    assert {**begun[0], **found[0]} == expected[0]
    assert all(torch.equal(found[1][n], p) for n, p in expected[1].items())


def test_gradient_accumulation_is_the_large_batch(family, tmp_path):
    """Trainer expects that the loss averages over the accumulated batches."""
    arguments = dict(num_train_epochs=1, learning_rate=1e-3)
    whole, parts = (
        train(family, tmp_path, model=family.build(2, 0.0, beta=0.5), **arguments, **sizes)
        for sizes in (
            dict(per_device_train_batch_size=6),
            dict(per_device_train_batch_size=2, gradient_accumulation_steps=3),
        )
    )
    # Sums of fp32 losses in another order: a few ulp per step, over four steps of training.
    numpy.testing.assert_allclose(list(whole[0].values()), list(parts[0].values()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem, num_labels", [("regression", 1), ("regression", 3), ("multi_label_classification", 3)]
)
def test_gradient_accumulation_of_other_problems(family, problem, num_labels, tmp_path):
    """The stock losses of these problems ignore the number of labels from Trainer, and are three times too large."""

    def label(noise):
        return torch.rand(num_labels, generator=noise) if num_labels > 1 else torch.rand((), generator=noise)

    arguments = dict(num_train_epochs=1, learning_rate=1e-3, label=label)
    whole, parts = (
        train(
            family,
            tmp_path,
            model=family.build(2, 0.0, beta=0.5, problem_type=problem, num_labels=num_labels),
            **arguments,
            **sizes,
        )
        for sizes in (
            dict(per_device_train_batch_size=6),
            dict(per_device_train_batch_size=2, gradient_accumulation_steps=3),
        )
    )
    # Sums of fp32 losses in another order: a few ulp per step, over four steps of training.
    numpy.testing.assert_allclose(list(whole[0].values()), list(parts[0].values()), rtol=1e-4)


def test_gradient_checkpointing_flag(family, tmp_path):
    assert train(family, tmp_path)[0] == train(family, tmp_path, gradient_checkpointing=True)[0]


def test_a_converted_model_at_beta_zero_trains_like_the_stock_model(family, tmp_path):
    stock = family.build_stock(2, 0.1)
    converted = hp.to_reversible(stock, beta=0)
    # Without clipping: the norm over all parameters is summed in their order, which differs between the two.
    expected, found = (train(family, tmp_path, model=model, max_grad_norm=0) for model in (stock, converted))
    assert expected[0] == found[0]
    assert all(torch.equal(p, expected[1][n]) for n, p in hp.to_stock(converted).named_parameters())


def test_evaluation_and_prediction(tmp_path):
    family = FAMILIES["roberta"]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(family.build(2, beta=0.5), args, eval_dataset=Samples(family, 6))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Samples(family, 6)).predictions.shape == (6, 3)
