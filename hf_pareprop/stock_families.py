"""Families of reversible models that run the layers of stock models. Each has one row, from which its classes are made.

A class is made when it is asked for: `stock_families.RevLlamaForCausalLM`. So transformers need not have all of the stock
models.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from .stock_layers import attention_sub_block, make_family, mlp_sub_block


class StockFamily(NamedTuple):
    """The row of a family.

    Attributes:
        prefix: the beginning of the names of the stock classes.
        layer: the name of the stock layer class.
        heads: maps Auto classes to the ends of the names of the stock models; the first is the base model's.
        sub_blocks: the steps with `steps="sublayer"`; empty if only whole layers can be coupled.
    """

    prefix: str
    layer: str
    heads: dict[str, str]
    sub_blocks: tuple[Callable[..., tuple[Tensor, Tensor]], ...] = ()


_DECODER = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}
_LLAMA = (attention_sub_block, mlp_sub_block)

FAMILIES = {
    "llama": StockFamily("Llama", "LlamaDecoderLayer", _DECODER, _LLAMA),
    "mistral": StockFamily("Mistral", "MistralDecoderLayer", _DECODER, _LLAMA),
    "qwen2": StockFamily("Qwen2", "Qwen2DecoderLayer", _DECODER, _LLAMA),
    "qwen3": StockFamily("Qwen3", "Qwen3DecoderLayer", _DECODER, _LLAMA),
    "gemma3_text": StockFamily(
        "Gemma3",
        "Gemma3DecoderLayer",
        {
            "AutoModel": "TextModel",
            "AutoModelForCausalLM": "ForCausalLM",
            "AutoModelForSequenceClassification": "TextForSequenceClassification",
        },
    ),
    "gpt2": StockFamily("GPT2", "GPT2Block", {**_DECODER, "AutoModelForCausalLM": "LMHeadModel"}),
    "modernbert": StockFamily(
        "ModernBert",
        "ModernBertEncoderLayer",
        {
            "AutoModel": "Model",
            "AutoModelForMaskedLM": "ForMaskedLM",
            "AutoModelForSequenceClassification": "ForSequenceClassification",
            "AutoModelForTokenClassification": "ForTokenClassification",
            "AutoModelForQuestionAnswering": "ForQuestionAnswering",
            "AutoModelForMultipleChoice": "ForMultipleChoice",
        },
    ),
    "dinov2": StockFamily(
        "Dinov2", "Dinov2Layer", {"AutoModel": "Model", "AutoModelForImageClassification": "ForImageClassification"}
    ),
}
"""The rows, by the model type of the stock checkpoints."""


@cache
def classes_of(model_type: str) -> dict[str, type]:
    """The classes of a family by their names.

    Raises:
        ImportError: this version of transformers does not have the stock models.
    """
    family = FAMILIES[model_type]
    package = model_type.removesuffix("_text")
    stock = import_module(f"transformers.models.{package}.modeling_{package}")
    base, *heads = (getattr(stock, family.prefix + head) for head in family.heads.values())
    names = {auto: f"Rev{family.prefix}{head}" for auto, head in family.heads.items()}
    here = __name__.rpartition(".")[2]
    auto_map = {auto: f"{here}.{name}" for auto, name in names.items()}
    return make_family(
        base,
        heads,
        [getattr(stock, family.layer)],
        module=__name__,
        auto_map={"AutoConfig": f"{here}.Rev{base.config_class.__name__}", **auto_map},
        sub_blocks=family.sub_blocks,
    )


def available(model_type: str) -> bool:
    """Whether this version of transformers has the stock models of a family."""
    try:
        return bool(classes_of(model_type))
    except (ImportError, AttributeError):
        return False


def __getattr__(name: str) -> Any:
    """
    Raises:
        AttributeError: no family has a class of that name.
    """
    for model_type, family in FAMILIES.items():
        if name.startswith(f"Rev{family.prefix}") and name in (found := classes_of(model_type)):
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
