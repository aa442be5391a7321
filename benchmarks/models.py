"""What is measured: families of models of any size, plain and reversible, and what they are fed."""

import argparse

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_pareprop.tools.contenders import CHECKPOINTING as CHECKPOINTED
from hf_pareprop.tools.contenders import STOCK as PLAIN
from hf_pareprop.tools.contenders import Contender, Subject
from hf_pareprop.tools.families import FAMILIES, Shape
from hf_pareprop.tools.inputs import random_batch, with_targets

STOCK, CHECKPOINTING = "stock", "checkpointing"
ENGINES = ("autograd", "reprop", "pareprop")
METHODS = (STOCK, CHECKPOINTING, *ENGINES)

Batch = dict[str, Tensor]


def contender(args: argparse.Namespace, method: str) -> Contender:
    """What trains by ``method``."""
    if method in ENGINES:
        return Contender(method, engine=method, beta=args.beta)
    return CHECKPOINTED if method == CHECKPOINTING else PLAIN


def build(family: str, args: argparse.Namespace, depth: int, method: str) -> PreTrainedModel:
    """A random model in training mode for ``method`` and its kind, with its gradients allocated."""
    row = FAMILIES[family]
    shape = Shape(args.width, args.heads, (depth,))
    config = row.config(shape, **row.dropout_fields(args.dropout), **row.length_fields(args.length))
    model = Subject(row.classifier, config).build(contender(args, method)).to(device_of(args))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def make_batch(args: argparse.Namespace, model: PreTrainedModel) -> Batch:
    return with_targets(random_batch(model, batch_size=args.batch_size, length=args.length), model)


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")


def training_step(model: PreTrainedModel, batch: Batch, autocast: str) -> None:
    """Forward and backward; gradients add up in those allocated before."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast == "bf16"):
        loss = model(**batch).loss
    loss.backward()
