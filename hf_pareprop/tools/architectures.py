"""Which stock models become reversible ones, and what their parameters and configuration fields are called there."""

import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_rev_roberta import (
    RevRobertaForMaskedLM,
    RevRobertaForMultipleChoice,
    RevRobertaForQuestionAnswering,
    RevRobertaForSequenceClassification,
    RevRobertaForTokenClassification,
    RevRobertaModel,
)
from ..modeling_rev_swin import (
    RevSwinBackbone,
    RevSwinForImageClassification,
    RevSwinForMaskedImageModeling,
    RevSwinModel,
)
from ..modeling_rev_vit import RevViTForImageClassification, RevViTForMaskedImageModeling, RevViTModel
from ..modeling_reversible import ReversiblePreTrainedModel

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """How the stock models of one type map onto a reversible family.

    Attributes:
        model_type: of the stock checkpoints.
        prefix: what the stock class names begin with.
        heads: from what a stock class name ends with to the reversible class.
        renames: patterns and replacements, in order, from stock parameter names to the reversible ones; names that the
            reversible model knows already stay.
        head_renames: the same for one head, before ``renames``.
        fields: configuration fields that the reversible model needs beside the stock ones.
        positions_start_at_zero: whether position 0 is the first token's, as in BERT; RoBERTa counts from
            ``pad_token_id + 1``, so its table has as many rows more in front.
    """

    model_type: str
    prefix: str
    heads: dict[str, type[ReversiblePreTrainedModel]]
    renames: Renames = ()
    head_renames: dict[str, Renames] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    positions_start_at_zero: bool = False

    def stock_class(self, cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The stock twin of a reversible class or of one derived from it, also of one loaded as remote code.

        Raises:
            ValueError: there is none.
        """
        names = {base.__name__ for base in cls.__mro__}
        for head, twin in self.heads.items():
            if twin.__name__ in names:
                return getattr(transformers, self.prefix + head)
        raise ValueError(f"{cls.__name__} has no stock twin among the classes of {self.model_type!r}.")

    def reversible_name(self, name: str, head: str, known: Container[str]) -> str:
        """What the reversible model calls the stock parameter ``name``; ``known`` are its parameters."""
        if name in known:
            return name
        for pattern, replacement in (*self.head_renames.get(head, ()), *self.renames):
            name = re.sub(pattern, replacement, name)
        return name

    def reserved_rows(self, config: PreTrainedConfig) -> int:
        """Rows of the position table before the first token's, in the reversible model but not in the stock one."""
        if not self.positions_start_at_zero:
            return 0
        padding = config.pad_token_id
        if padding is None:
            raise ValueError(
                "pad_token_id is None: positions are counted from it, so the configuration has to name one."
            )
        return padding + 1

    def to_reversible_tensor(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        if rows := self.reserved_rows(config) if name.endswith("position_embeddings.weight") else 0:
            return torch.cat([tensor.new_zeros(rows, tensor.shape[1]), tensor])
        return tensor.clone()

    def to_stock_tensor(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        rows = self.reserved_rows(config) if name.endswith("position_embeddings.weight") else 0
        return tensor[rows:].clone()


_TEXT = {
    "Model": RevRobertaModel,
    "ForMaskedLM": RevRobertaForMaskedLM,
    "ForSequenceClassification": RevRobertaForSequenceClassification,
    "ForTokenClassification": RevRobertaForTokenClassification,
    "ForQuestionAnswering": RevRobertaForQuestionAnswering,
    "ForMultipleChoice": RevRobertaForMultipleChoice,
}
_IMAGES = {
    "Model": RevViTModel,
    "ForImageClassification": RevViTForImageClassification,
    "ForMaskedImageModeling": RevViTForMaskedImageModeling,
}

# Stock ViT and DeiT, in memory, have other names than their checkpoints, whose names the reversible model keeps.
_IN_MEMORY: Renames = (
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

_SWIN = {
    "Model": RevSwinModel,
    "ForImageClassification": RevSwinForImageClassification,
    "ForMaskedImageModeling": RevSwinForMaskedImageModeling,
    "Backbone": RevSwinBackbone,
}
_SWIN_IN_MEMORY: Renames = (
    (r"attention\.q_proj\.", "attention.self.query."),
    (r"attention\.k_proj\.", "attention.self.key."),
    (r"attention\.v_proj\.", "attention.self.value."),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("roberta", "Roberta", _TEXT),
        Architecture("xlm-roberta", "XLMRoberta", _TEXT),
        Architecture("camembert", "Camembert", _TEXT),
        Architecture(
            "bert",
            "Bert",
            _TEXT,
            renames=((r"^bert\.", "roberta."),),
            head_renames={
                "ForMaskedLM": (
                    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
                    (r"^cls\.predictions\.(transform\.)?", "lm_head."),
                ),
                # BERT's classifier reads the pooler, RoBERTa's has that layer within.
                "ForSequenceClassification": (
                    (r"^classifier\.", "classifier.out_proj."),
                    (r"^bert\.pooler\.", "classifier."),
                ),
            },
            positions_start_at_zero=True,
        ),
        Architecture("swin", "Swin", _SWIN, renames=_SWIN_IN_MEMORY),
        Architecture("vit", "ViT", _IMAGES, renames=_IN_MEMORY),
        Architecture(
            "deit",
            "DeiT",
            _IMAGES,
            renames=(*_IN_MEMORY, (r"^deit\.", "vit.")),
            fields={"distillation_token": True},
        ),
    )
}
"""By the model type of the stock checkpoints."""

STOCK_CLASSES: dict[str, tuple[Architecture, str]] = {
    architecture.prefix + head: (architecture, head)
    for architecture in ARCHITECTURES.values()
    for head in architecture.heads
}
"""From the name of a stock class to its architecture and head."""


def architecture_of(class_name: str) -> tuple[Architecture, str]:
    """The architecture and head of a stock class.

    Raises:
        ValueError: it has no reversible twin.
    """
    if class_name not in STOCK_CLASSES:
        raise ValueError(
            f"{class_name or 'this checkpoint'} has no reversible twin: these have: {', '.join(STOCK_CLASSES)}."
        )
    return STOCK_CLASSES[class_name]
