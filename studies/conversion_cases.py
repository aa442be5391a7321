"""The single measurements of the conversion study: convert a checkpoint, compare it with the original, fine-tune it.

Each measurement runs in a process of its own, on one thread, in bf16 autocast; see ``conversion.py``.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import assets
import fetch
import torch
import transformers
from adapt import adapt
from datasets import DatasetDict
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_pareprop as hp
from hf_pareprop.plan import DEFAULT_GRID_BITS
from hf_pareprop.tools.fidelity import fidelity as measured
from hf_pareprop.tools.memory import peak_bytes

from .conversion_variants import couple_layers


@dataclass(frozen=True)
class Budget:
    """The settings of a fine-tuning, which are the same for the stock model and the reversible ones."""

    steps: int
    batch_size: int
    learning_rate: float
    max_length: int = 0


BUDGETS = {
    "rotten-tomatoes": Budget(120, 32, 3e-4, 48),
    "reuters-r8": Budget(80, 32, 3e-4, 48),
    "20-newsgroups": Budget(90, 32, 3e-4, 48),
    "fashion-mnist": Budget(150, 64, 3e-4),
    "fashion-mnist, Swin": Budget(150, 64, 3e-4),
}
PRETRAINING = Budget(938, 64, 1e-3)
"""The number of training steps of the stock ViT on Fashion-MNIST: one epoch."""

IMAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fashion-mnist": (
        "fashion-vit",
        "ViT",
        dict(patch_size=4, hidden_size=96, num_hidden_layers=8, num_attention_heads=4, intermediate_size=384),
    ),
    "fashion-mnist, Swin": (
        "fashion-swin",
        "Swin",
        dict(patch_size=2, embed_dim=48, depths=[2, 4], num_heads=[3, 6], window_size=7),
    ),
}
"""For every task with images: the name of the checkpoint, the family of its stock model, and its size."""

QUARTERS = 4
CURVE_ROWS = 400


def finetune(job: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune with the budget of the task, and test.

    Args:
        job: ``task``, ``seed`` and ``beta``, which is ``None`` for the stock model; ``steps`` instead of those of the budget.
            With a beta also ``schedule``, pairs of a fraction of the training and the cap from there on; ``granularity``; and
            ``adapted``, the number of steps of self-distillation.

    Returns:
        ``accuracy``; ``accuracy_as_stock``, the accuracy of :func:`to_stock` of the result; and ``curve``, the accuracy after
        each quarter of the training on the first 400 rows of the test split.
    """
    task, budget = job["task"], BUDGETS[job["task"]]
    budget = replace(budget, steps=job.get("steps", budget.steps))
    data, collator = data_of(task)
    set_seed(job["seed"])
    model = model_of(job, len({int(label) for label in data["train"]["label"]}))
    curve = Curve(budget.steps, data["test"].select(range(CURVE_ROWS)))
    schedule = [hp.BetaSchedule(dict(job["schedule"]))] if job.get("schedule") else []
    trainer = trainer_of(model, data, collator, budget, job["seed"], [*schedule, curve])
    curve.trainer = trainer
    trainer.train()
    result = {"accuracy": accuracy(trainer, data["test"]), "curve": curve.points, "accuracy_as_stock": None}
    if job["beta"] is not None and job.get("granularity") != "layer":
        trainer.model = trainer.model_wrapped = hp.to_stock(model)
        result["accuracy_as_stock"] = accuracy(trainer, data["test"])
    return result


def model_of(job: Mapping[str, Any], num_labels: int) -> nn.Module:
    images = job["task"] in IMAGE_MODELS
    checkpoint = image_model(job["task"]) if images else assets.english_encoder()
    if job.get("adapted"):
        checkpoint = adapted_encoder(job["beta"], job["adapted"])
    kind = IMAGE_MODELS[job["task"]][1] + "ForImageClassification" if images else "RobertaForSequenceClassification"
    if job["beta"] is None:
        return getattr(transformers, kind).from_pretrained(checkpoint, num_labels=num_labels)
    model = getattr(hp, f"Rev{kind}").from_pretrained(
        checkpoint, num_labels=num_labels, beta=job["beta"], backward_engine="autograd"
    )
    if job.get("granularity") == "layer":
        couple_layers(model)
    return model


@cache
def data_of(task: str) -> tuple[DatasetDict, Any]:
    """The splits, prepared for the model, and their collator. The test split is shuffled, and cut to 1,500 rows at most."""
    if task in IMAGE_MODELS:
        data = assets.fashion_mnist()
        data["test"] = data["test"].shuffle(seed=0).select(range(4000))
        return data.with_format("torch"), None
    readers = {
        "rotten-tomatoes": assets.rotten_tomatoes,
        "reuters-r8": assets.reuters_r8,
        "20-newsgroups": assets.newsgroups,
    }
    data = readers[task]()
    data["test"] = data["test"].shuffle(seed=0).select(range(min(1500, len(data["test"]))))
    tokenizer = AutoTokenizer.from_pretrained(assets.english_encoder())
    length = BUDGETS[task].max_length
    data = data.map(
        lambda rows: tokenizer([text[: 12 * length] for text in rows["text"]], truncation=True, max_length=length),
        batched=True,
        remove_columns="text",
    )
    return data, DataCollatorWithPadding(tokenizer)


def trainer_of(model, data, collator, budget: Budget, seed: int, callbacks=()) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=budget.learning_rate,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length" if collator else "random",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data["train"],
        data_collator=collator,
        callbacks=list(callbacks),
    )


def accuracy(trainer: Trainer, rows) -> float:
    found = trainer.predict(rows)
    return float((found.predictions.argmax(-1) == found.label_ids).mean())


class Curve(TrainerCallback):
    """Records the accuracy after each quarter of the training."""

    def __init__(self, steps: int, rows):
        self.at = {round(steps * i / QUARTERS) for i in range(1, QUARTERS + 1)}
        self.rows = rows
        self.points: list[float] = []
        self.trainer: Trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.at:
            self.points.append(accuracy(self.trainer, self.rows))
            self.trainer.model.train()


def image_model(task: str) -> Path:
    """A stock model of the task's family, trained on the 60,000 images of Fashion-MNIST for one epoch."""
    name, family, size = IMAGE_MODELS[task]

    def make(folder: Path) -> None:
        config = getattr(transformers, f"{family}Config")(image_size=28, num_channels=1, num_labels=10, **size)
        set_seed(0)
        model = getattr(transformers, f"{family}ForImageClassification")(config)
        data, collator = data_of(task)
        trainer_of(model, data, collator, PRETRAINING, 0).train()
        model.save_pretrained(folder)

    return fetch.cached(name, make)


def adapted_encoder(beta: float, steps: int) -> Path:
    """The converted English encoder, distilled from its original on the training texts of all three tasks."""

    def make(folder: Path) -> None:
        readers = (assets.rotten_tomatoes, assets.reuters_r8, assets.newsgroups)
        texts = [text[:400] for read in readers for text in read()["train"]["text"]]
        tokenizer = AutoTokenizer.from_pretrained(assets.english_encoder())
        stock = transformers.RobertaModel.from_pretrained(assets.english_encoder())
        model = hp.to_reversible(stock, beta=beta, backward_engine="autograd")
        adapt(model, stock, tokenizer, texts, steps=steps, max_length=64)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return fetch.cached(f"english-encoder-adapted-{beta}-{steps}", make)


# --- before any training


def fidelity(job: Mapping[str, Any]) -> dict[str, Any]:
    """How close a converted model is to the original before training.

    Args:
        job: ``model``, which is english-encoder, antibody-roberta or fashion-vit; ``beta``; ``granularity``; and ``grid_bits``
            of the encoder.

    Returns:
        ``cosine``, the cosine between last hidden states and those of the original, averaged over tokens; ``score``, the
        masked accuracy of the antibody model or the test accuracy of the ViT; ``stock_score``, that of the original;
        ``peak_mb`` and ``stock_peak_mb``, the memory of a training step of the encoder on 32 texts of 64 tokens, with the
        engine ``reprop``.
    """
    name, beta = job["model"], job["beta"]
    result: dict[str, Any] = {"score": None, "stock_score": None, "peak_mb": None, "stock_peak_mb": None}
    if name == "english-encoder":
        checkpoint = adapted_encoder(beta, job["adapted"]) if job.get("adapted") else assets.english_encoder()
        stock = transformers.RobertaModel.from_pretrained(assets.english_encoder(), add_pooling_layer=False)
        model = hp.RevRobertaModel.from_pretrained(
            checkpoint, beta=beta, grid_bits=job.get("grid_bits", DEFAULT_GRID_BITS), add_pooling_layer=False
        )
        tokenizer = AutoTokenizer.from_pretrained(assets.english_encoder())
        texts = assets.rotten_tomatoes()["train"]["text"][:200]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    elif name == "antibody-roberta":
        path = assets.antibody_roberta()
        stock, model = (
            transformers.RobertaForMaskedLM.from_pretrained(path),
            hp.RevRobertaForMaskedLM.from_pretrained(path, beta=beta),
        )
        chain = torch.tensor([assets.ANTIBODY_TOKENS[letter] for letter in assets.HEAVY_CHAIN])
        rows = torch.arange(len(chain))
        tokens = torch.cat([torch.tensor([0]), chain, torch.tensor([2])]).repeat(len(chain), 1)
        tokens[rows, rows + 1] = assets.ANTIBODY_TOKENS["<mask>"]
        batch = {"input_ids": tokens}

        def score(m) -> float:
            return (m(**batch).logits[rows, rows + 1].argmax(-1) == chain).float().mean().item()
    else:
        data, _ = data_of("fashion-mnist")
        path = image_model("fashion-mnist")
        stock, model = (
            transformers.ViTForImageClassification.from_pretrained(path),
            hp.RevViTForImageClassification.from_pretrained(path, beta=beta),
        )
        images = data["test"][:2000]
        batch = {"pixel_values": images["pixel_values"]}

        def score(m) -> float:
            return (m(**batch).logits.argmax(-1) == images["label"]).float().mean().item()

    stock.eval(), model.eval()
    if job.get("granularity") == "layer":
        couple_layers(model)
    result["cosine"] = measured(stock, model, [batch]).cosine
    if name != "english-encoder":
        with torch.no_grad():
            result |= {"score": score(model), "stock_score": score(stock)}
    if name == "english-encoder" and not {"granularity", "adapted"} & job.keys():
        model.set_backward_engine("reprop")
        result |= {"peak_mb": step_peak(model), "stock_peak_mb": step_peak(stock)}
    return result


def step_peak(model) -> float:
    ids = torch.randint(1000, 20000, (32, 64), generator=torch.Generator().manual_seed(0))
    model.train().get_input_embeddings().requires_grad_(False)  # or their gradient hides the activations

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)[0].float().square().mean().backward()

    step()  # allocates the gradients
    return peak_bytes(step, model.device) / 2**20
