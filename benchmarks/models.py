"""What is measured: families of models of any size, stock and reversible, and what they are fed."""

import argparse
from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    ViTConfig,
)

from hf_pareprop import RevRobertaConfig, RevViTConfig

STOCK, CHECKPOINTING = "stock", "checkpointing"
ENGINES = ("autograd", "reprop", "pareprop")
METHODS = (STOCK, CHECKPOINTING, *ENGINES)

PATCH = 16
# Small, because the gradient of a large embedding would hide the memory of the layers.
VOCABULARY = 1000

Batch = dict[str, Tensor]


class Family(NamedTuple):
    """What builds the stock and the reversible models of a family, and what they are fed.

    Attributes:
        auto: the Auto class of the head.
        stock: the stock configuration.
        reversible: the reversible configuration.
        fields: from the length in tokens to what this family's configurations need besides the common fields.
        batch: from a batch size and a length to a batch.
    """

    auto: Any
    stock: Callable[..., Any]
    reversible: Callable[..., Any]
    fields: Callable[[int], dict[str, Any]]
    batch: Callable[[int, int], Batch]

    def build(self, args: argparse.Namespace, depth: int, method: str) -> PreTrainedModel:
        """A random model in training mode for ``method`` and its kind, with its gradients allocated."""
        fields = {
            "hidden_size": args.width,
            "num_attention_heads": args.heads,
            "intermediate_size": 4 * args.width,
            "num_hidden_layers": depth,
            "hidden_dropout_prob": args.dropout,
            "attention_probs_dropout_prob": args.dropout,
            **self.fields(args.length),
        }
        config = self.reversible(beta=args.beta, **fields) if method in ENGINES else self.stock(**fields)
        model = self.auto.from_config(config, attn_implementation="sdpa").to(device_of(args)).train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return model

    def make_batch(self, args: argparse.Namespace) -> Batch:
        batch = self.batch(args.batch_size, args.length)
        return {name: tensor.to(device_of(args)) for name, tensor in batch.items()}


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")


def switch(model: PreTrainedModel, method: str) -> None:
    """Have ``model``, stock or reversible, work by ``method``."""
    if method in ENGINES:
        model.set_backward_engine(method)
    elif method == CHECKPOINTING:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def training_step(model: PreTrainedModel, batch: Batch, autocast: str) -> None:
    """Forward and backward; gradients add up in those allocated before."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast == "bf16"):
        loss = model(**batch).loss
    loss.backward()


def text_fields(length: int) -> dict[str, Any]:
    # RoBERTa counts positions from padding_idx + 1 = 2.
    return {"vocab_size": VOCABULARY, "max_position_embeddings": length + 2}


def text_batch(size: int, length: int) -> Batch:
    tokens = torch.randint(4, VOCABULARY, (size, length))
    return {"input_ids": tokens, "labels": torch.zeros(size, dtype=torch.long)}


def image_fields(length: int) -> dict[str, Any]:
    return {"image_size": PATCH * isqrt(length), "patch_size": PATCH}


def image_batch(size: int, length: int) -> Batch:
    side = PATCH * isqrt(length)
    return {"pixel_values": torch.randn(size, 3, side, side), "labels": torch.zeros(size, dtype=torch.long)}


TEXT = AutoModelForSequenceClassification
IMAGE = AutoModelForImageClassification
FAMILIES = {
    "roberta": Family(TEXT, RobertaConfig, RevRobertaConfig, text_fields, text_batch),
    "vit": Family(IMAGE, ViTConfig, RevViTConfig, image_fields, image_batch),
}
