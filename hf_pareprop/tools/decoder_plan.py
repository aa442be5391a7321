"""The tables and texts of `hf-pareprop bench --plan`, and the decoders that it knows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..configuration_reversible import ReversibleConfig
from .configuration import config_of
from .decoders import CHUNK, Needs, Training, needs, reversible_class, ways
from .records import GB
from .source import CheckpointError, open_source

TOKENS = 2**11, 2**13, 2**15, 2**17

Shape = tuple[str, dict[str, Any]]
"""The class of a configuration and its fields."""


def shape(config_class: str, layers: int, **fields: Any) -> Shape:
    """The shape of a decoder with ``layers`` layers."""
    return config_class, {**ReversibleConfig.depth_fields(layers), **fields}


_llama = partial(
    shape,
    "LlamaConfig",
    vocab_size=128256,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)

PUBLISHED = {
    "meta-llama/Llama-3.2-1B": _llama(
        16, hidden_size=2048, intermediate_size=8192, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.1-8B": _llama(
        32, hidden_size=4096, intermediate_size=14336, head_dim=128, tie_word_embeddings=False
    ),
    "Qwen/Qwen3-4B": shape(
        "Qwen3Config",
        36,
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
}
"""The shapes of published decoders, by their id on the Hub. They need no download."""


def configuration(name: str) -> PreTrainedConfig:
    """The stock configuration of a decoder.

    Args:
        name: one of `PUBLISHED`, or a directory or Hub id of a checkpoint. Only its config.json is read.

    Raises:
        CheckpointError: there is no configuration, or it is not that of a decoder that can be planned.
    """
    if name in PUBLISHED:
        cls, fields = PUBLISHED[name]
        found: PreTrainedConfig = getattr(transformers, cls)(**fields)
        return found
    source = open_source(name, weights=False)
    reversible = reversible_class(source.model_type)
    config: PreTrainedConfig = config_of(source, reversible.stock_class.config_class, reversible.config_class)
    if getattr(config, "sliding_window", None):
        raise CheckpointError(
            f"{name} has a sliding window of {config.sliding_window} tokens. The memory of its mask grows with the square of the "
            "tokens, which --plan does not compute. Leave out --plan to measure the model."
        )
    return config


def needs_by_way(config: PreTrainedConfig, beta: float | None, training: Training) -> dict[str, Needs]:
    """What every way to train takes, by the name of the way.

    Args:
        config: the stock configuration of the decoder.
        beta: the coupling of reversible models, shown beside 1; by default 1/128 for layers and 1/32 for sub-blocks.
        training: what is trained, and in which precision.
    """
    return {way.name: needs(config, way, training) for way in ways(beta)}


def table(found: Mapping[str, Needs], tokens: Sequence[int], cap: int | None) -> list[list[str]]:
    """Rows of cells: first the names of the columns, then a row for every way.

    Args:
        found: the needs of every way, from :func:`needs_by_way`.
        tokens: the lengths of the one text in a step.
        cap: the bytes for which the longest text is computed.
    """
    return [_head(tokens, cap), *(_row(name, own, tokens, cap) for name, own in found.items())]


def explained(found: Mapping[str, Needs], tokens: Sequence[int]) -> str:
    """A sentence about the bytes that are the same in all ways."""
    own = next(iter(found.values()))
    logits = ", ".join(f"{own.at_loss.at(n) / GB:.1f} GB at {_thousands(n)}" for n in tokens)
    return (
        f"In every way: weights {own.weights / GB:.2f} GB, gradients {own.gradients / GB:.2f} GB, AdamW {own.optimizer / GB:.2f} GB. "
        f"Logits and loss of all tokens at once take {logits}; of {CHUNK} tokens at a time {own.at_loss.at(CHUNK) / GB:.1f} GB."
    )


def _head(tokens: Sequence[int], cap: int | None) -> list[str]:
    longest = [] if cap is None else [f"longest in {cap / GB:g} GB", "with all logits"]
    return ["", "bits stored", "bytes at work", *(f"GB at {_thousands(n)}" for n in tokens), *longest]


def _row(name: str, own: Needs, tokens: Sequence[int], cap: int | None) -> list[str]:
    peaks = [f"{own.peak(n, chunked=True) / GB:.1f}" for n in tokens]
    longest = [] if cap is None else [_thousands(own.longest(cap, chunked)) for chunked in (True, False)]
    return [name, f"{own.bits:.0f}", f"{own.working_bytes:.0f}", *peaks, *longest]


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
