"""The models that the throughput benchmark trains: the published sizes of each family, and each twice as deep."""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig, RobertaConfig, ViTConfig

from hf_pareprop.tools.contenders import STOCK, Subject
from hf_pareprop.tools.inputs import random_batch, with_targets


class Shape(NamedTuple):
    width: int
    heads: int
    depth: int


class Family(NamedTuple):
    """
    Attributes:
        head: the stock class.
        fields: of the configuration, besides those that a :class:`Shape` gives.
    """

    head: str
    config: type[PreTrainedConfig]
    fields: dict[str, Any]
    shapes: dict[str, Shape]


SMALL, BASE, LARGE = Shape(384, 6, 12), Shape(768, 12, 12), Shape(1024, 16, 24)

FAMILIES = (
    Family("ViTForImageClassification", ViTConfig, {}, {"vit-s": SMALL, "vit-b": BASE, "vit-l": LARGE}),
    Family(
        "RobertaForSequenceClassification",
        RobertaConfig,
        {"max_position_embeddings": 514, "type_vocab_size": 1},
        {"roberta-base": BASE, "roberta-large": LARGE},
    ),
)

DEEP = "-deep"
"""What the name of a size ends with that has twice its layers."""

SIZES = {
    name: (family, shape)
    for family in FAMILIES
    for base, plain in family.shapes.items()
    for name, shape in ((base, plain), (base + DEEP, plain._replace(depth=2 * plain.depth)))
}


def sample(size: str, length: int) -> dict[str, Any]:
    """One random input of the model called ``size``, with a label; a text has ``length`` tokens."""
    model = subject(size, depth=1).build(STOCK)
    return with_targets(random_batch(model, batch_size=1, length=length), model)


def subject(size: str, depth: int | None = None) -> Subject:
    """The model called ``size``; with ``depth`` layers instead of its own, if given."""
    family, shape = SIZES[size]
    config = family.config(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        num_hidden_layers=depth or shape.depth,
        **family.fields,
    )
    return Subject.of(family.head, config)
