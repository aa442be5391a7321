"""The models that the throughput benchmark trains: published sizes, and encoders of twice the published depth."""

from functools import partial
from typing import Any

from hf_pareprop.tools.contenders import STOCK, Subject
from hf_pareprop.tools.decoder_plan import PUBLISHED, shape
from hf_pareprop.tools.families import FAMILIES, STOCK_LAYERS
from hf_pareprop.tools.inputs import random_batch, with_targets

DEEP = "-deep"
"""The end of the name of a size with twice the published number of layers."""

DECODERS = {
    "smollm2-135m": shape(
        "LlamaConfig",
        30,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-1b": PUBLISHED["meta-llama/Llama-3.2-1B"],
}


def _encoder(family: Any, size: Any, depth: int | None) -> Subject:
    fields = {} if depth is None else family.config_class.depth_fields(depth, len(size.depths))
    return Subject(family.classifier, family.config(size, **fields))


def _decoder(fields: dict[str, Any], depth: int | None) -> Subject:
    cls: Any = STOCK_LAYERS["llama"].heads["ForCausalLM"]
    given = {} if depth is None else cls.config_class.depth_fields(depth)
    return Subject(cls, cls.config_class(**{**fields, **given}))


SIZES = {
    name: partial(_encoder, family, size._replace(depths=tuple(times * depth for depth in size.depths)))
    for family in FAMILIES.values()
    for base, size in family.sizes.items()
    for name, times in ((base, 1), (base + DEEP, 2))
} | {name: partial(_decoder, fields) for name, (_, fields) in DECODERS.items()}


def sample(size: str, length: int) -> dict[str, Any]:
    """One random input with a label for the model ``size``. A text has ``length`` tokens."""
    model = subject(size, depth=1).build(STOCK)
    return with_targets(random_batch(model, batch_size=1, length=length), model)


def subject(size: str, depth: int | None = None) -> Subject:
    """The model ``size``. If ``depth`` is given, its deepest stage has that many layers."""
    return SIZES[size](depth)
