"""The reversible families: ONE row each, from which everything that enumerates families takes them.

`hf_pareprop` takes its public names and what it registers from here; conversion, the command line, benchmarks and tests
take what they need. A new family is a configuration file, a modeling file, and a row.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isqrt
from typing import Any, NamedTuple

from ..configuration_reversible import ReversibleConfig
from ..modeling_rev_mvit import RevMViTPreTrainedModel
from ..modeling_rev_roberta import RevRobertaPreTrainedModel
from ..modeling_rev_swin import RevSwinPreTrainedModel
from ..modeling_rev_vit import RevViTPreTrainedModel
from ..modeling_reversible import ReversiblePreTrainedModel
from .architectures import Architecture, Renames
from .timm_checkpoint import TIMM

Fields = dict[str, Any]
"""Fields of a configuration."""


class Shape(NamedTuple):
    """How large a model is, whatever its family calls it.

    Attributes:
        width: of the hidden states; of the first stage, where there are several.
        heads: of attention; of the first stage, where there are several.
        depths: how many layers each stage has.
        mlp_ratio: how many times wider the middle of an MLP is.
    """

    width: int
    heads: int
    depths: tuple[int, ...]
    mlp_ratio: float = 4


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: for people.
        base: the family's `...PreTrainedModel`. Its `auto_map` names the configuration and all models.
        architectures: the stock models that become models of this family; the first is the family's own.
        classifier_head: what the name of the class ends with that benchmarks and tests train, with one label per input.
        shape_fields: from a shape to fields of the configuration.
        dropout_fields: from a rate to fields of the configuration.
        length_fields: from a number of tokens or patches to fields of a configuration whose inputs have so many.
        sizes: the published models, by name.
        size_fields: what their configurations have beside their shapes.
        small: the shape of the small random models that tests train. Their depths vary.
        small_fields: what their configurations have beside it.

    Example:
        >>> FAMILIES["vit"].config(FAMILIES["vit"].sizes["vit-b"], beta=0.5)
    """

    name: str
    base: type[ReversiblePreTrainedModel]
    architectures: tuple[Architecture, ...]
    classifier_head: str
    shape_fields: Callable[[Shape], Fields]
    dropout_fields: Callable[[float], Fields]
    length_fields: Callable[[int], Fields]
    sizes: Mapping[str, Shape]
    small: Shape
    size_fields: Fields = field(default_factory=dict)
    small_fields: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        # So that a row does not repeat the family's classes for each of its architectures.
        bound = tuple(replace(architecture, heads=self.heads) for architecture in self.architectures)
        object.__setattr__(self, "architectures", bound)

    @property
    def config_class(self) -> type[ReversibleConfig]:
        found: Any = self.base.config_class
        return found

    @cached_property
    def auto_classes(self) -> dict[str, type[ReversiblePreTrainedModel]]:
        """From the name of each Auto class of models to the family's model."""
        module = sys.modules[self.base.__module__]
        names = {auto: path.rpartition(".")[2] for auto, path in self.base.auto_map.items() if auto != "AutoConfig"}
        return {auto: getattr(module, name) for auto, name in names.items()}

    @cached_property
    def heads(self) -> dict[str, type[ReversiblePreTrainedModel]]:
        """From what a class name ends with (`Model`, `ForMaskedLM`, …) to the class."""
        prefix = self.base.__name__.removesuffix("PreTrainedModel")
        return {cls.__name__.removeprefix(prefix): cls for cls in self.auto_classes.values()}

    @property
    def classifier(self) -> type[ReversiblePreTrainedModel]:
        """The class that benchmarks and tests train."""
        return self.heads[self.classifier_head]

    @property
    def public_classes(self) -> tuple[type, ...]:
        return (self.config_class, *self.heads.values())

    @property
    def takes_images(self) -> bool:
        return self.base.main_input_name == "pixel_values"

    @cached_property
    def staged(self) -> bool:
        """Whether a model has several stages as a rule."""
        return len(self.config_class().stage_depths) > 1

    def depths(self, layers: int) -> tuple[int, ...]:
        """How a small model divides its layers into stages: in two, a third of them in the first, if they are enough."""
        return (layers // 3, layers - layers // 3) if self.staged and layers >= 3 else (layers,)

    def small_config_fields(
        self, depth: int, dropout: float = 0.0, wider: int = 1, mlp_ratio: float | None = None
    ) -> Fields:
        """The fields of a small configuration of this family or of its stock twin.

        Args:
            depth: layers of all stages.
            wider: a factor.
            mlp_ratio: instead of the row's.
        """
        shape = self.small._replace(
            width=wider * self.small.width,
            depths=self.depths(depth),
            mlp_ratio=self.small.mlp_ratio if mlp_ratio is None else mlp_ratio,
        )
        return {**self.small_fields, **self.shape_fields(shape), **self.dropout_fields(dropout)}

    def config(self, shape: Shape, **fields: Any) -> ReversibleConfig:
        """The configuration of a published size, or of another one of the same kind.

        Raises:
            ValueError: a field is out of range.
        """
        return self.config_class(**{**self.size_fields, **self.shape_fields(shape), **fields})


def _equal_layers(shape: Shape) -> Fields:
    """Of families whose layers are all alike."""
    return {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.mlp_ratio * shape.width),
        **ReversibleConfig.depth_fields(sum(shape.depths)),
    }


def _two_dropouts(rate: float) -> Fields:
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def _tokens(length: int) -> Fields:
    # Positions count from padding_idx + 1 = 2. Few words, because the gradient of a large embedding would hide what
    # the layers take.
    return {"vocab_size": 1000, "max_position_embeddings": length + 2}


def _patches(length: int, patch: int = 16) -> Fields:
    return {"image_size": patch * isqrt(length), "patch_size": patch}


def _swin_shape(shape: Shape) -> Fields:
    return {
        "embed_dim": shape.width,
        "num_heads": [shape.heads << stage for stage in range(len(shape.depths))],
        "depths": list(shape.depths),
        "mlp_ratio": shape.mlp_ratio,
    }


def _swin_dropouts(rate: float) -> Fields:
    return {**_two_dropouts(rate), "drop_path_rate": 2 * rate}


def _swin_patches(length: int) -> Fields:
    # Windows that a second stage can hold, too.
    return {**_patches(length, patch=4), "window_size": max(1, min(7, isqrt(length) // 2))}


def _mvit_shape(shape: Shape) -> Fields:
    return {
        "embed_dim": shape.width,
        "num_heads": shape.heads,
        "depths": list(shape.depths),
        "mlp_ratio": shape.mlp_ratio,
    }


# Stock models, in memory, have other names than their checkpoints, whose names the reversible model keeps.
_SWIN_IN_MEMORY: Renames = (
    (r"attention\.q_proj\.", "attention.self.query."),
    (r"attention\.k_proj\.", "attention.self.key."),
    (r"attention\.v_proj\.", "attention.self.value."),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

_IN_MEMORY: Renames = (
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

_BERT = Architecture(
    "bert",
    "Bert",
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
)

_DEIT = Architecture(
    "deit",
    "DeiT",
    renames=(*_IN_MEMORY, (r"^deit\.", "vit.")),
    fields={"distillation_token": True},
)

ROWS = (
    Family(
        name="vit",
        base=RevViTPreTrainedModel,
        architectures=(Architecture("vit", "ViT", renames=_IN_MEMORY), _DEIT),
        classifier_head="ForImageClassification",
        shape_fields=_equal_layers,
        dropout_fields=_two_dropouts,
        length_fields=_patches,
        sizes={
            "vit-s": Shape(384, 6, (12,)),
            "vit-b": Shape(768, 12, (12,)),
            "vit-l": Shape(1024, 16, (24,)),
        },
        small=Shape(32, 4, (3,), mlp_ratio=2),
        small_fields={"image_size": 12, "patch_size": 4, "encoder_stride": 4, "num_labels": 3},
    ),
    Family(
        name="roberta",
        base=RevRobertaPreTrainedModel,
        architectures=(
            Architecture("roberta", "Roberta"),
            Architecture("xlm-roberta", "XLMRoberta"),
            Architecture("camembert", "Camembert"),
            _BERT,
        ),
        classifier_head="ForSequenceClassification",
        shape_fields=_equal_layers,
        dropout_fields=_two_dropouts,
        length_fields=_tokens,
        sizes={"roberta-base": Shape(768, 12, (12,)), "roberta-large": Shape(1024, 16, (24,))},
        size_fields={"max_position_embeddings": 514, "type_vocab_size": 1},
        small=Shape(32, 4, (3,), mlp_ratio=2),
        small_fields={"vocab_size": 61, "max_position_embeddings": 24, "type_vocab_size": 2, "num_labels": 3},
    ),
    Family(
        name="swin",
        base=RevSwinPreTrainedModel,
        architectures=(Architecture("swin", "Swin", renames=_SWIN_IN_MEMORY),),
        classifier_head="ForImageClassification",
        shape_fields=_swin_shape,
        dropout_fields=_swin_dropouts,
        length_fields=_swin_patches,
        sizes={
            "swin-t": Shape(96, 3, (2, 2, 6, 2)),
            "swin-s": Shape(96, 3, (2, 2, 18, 2)),
            "swin-b": Shape(128, 4, (2, 2, 18, 2)),
        },
        small=Shape(16, 2, (1, 2), mlp_ratio=2),
        small_fields={"image_size": 24, "patch_size": 2, "window_size": 3, "encoder_stride": 4, "num_labels": 3},
    ),
    Family(
        name="mvit",
        base=RevMViTPreTrainedModel,
        architectures=(
            Architecture(
                "mvit",
                None,
                library=TIMM,
                renames=((r"^timm_model\.(head\.)", r"\1"), (r"^timm_model\.", "mvit.")),
                head_renames={"Model": ((r"^timm_model\.", ""),)},
            ),
        ),
        classifier_head="ForImageClassification",
        shape_fields=_mvit_shape,
        dropout_fields=lambda rate: {"drop_path_rate": 2 * rate},
        length_fields=lambda length: {"image_size": 4 * isqrt(length)},
        sizes={
            "mvit-t": Shape(96, 1, (1, 2, 5, 2)),
            "mvit-s": Shape(96, 1, (1, 2, 11, 2)),
            "mvit-b": Shape(96, 1, (2, 3, 16, 3)),
        },
        small=Shape(16, 1, (1, 2), mlp_ratio=2),
        small_fields={"image_size": 32, "num_labels": 3},
    ),
)

FAMILIES = {family.name: family for family in ROWS}

MODEL_CLASSES = {cls.__name__: cls for family in ROWS for cls in family.heads.values()}
"""By their names."""

ARCHITECTURES = {a.model_type: a for family in ROWS for a in family.architectures}
"""By the model type of the stock checkpoints."""

STOCK_CLASSES: dict[str, tuple[Architecture, str]] = {
    architecture.prefix + head: (architecture, head)
    for architecture in ARCHITECTURES.values()
    if architecture.prefix is not None
    for head in architecture.heads
}
"""From the name of a stock class to its architecture and head."""

WRAPPERS: dict[str, tuple[Architecture, str]] = {
    architecture.library.wrapper + head: (architecture, head)
    for architecture in ARCHITECTURES.values()
    if architecture.library is not None
    for head in architecture.heads
}
"""From the name of a class in which transformers wraps stock models of another library to their architecture and head."""


def architecture_of(class_name: str) -> tuple[Architecture, str]:
    """The architecture and head of a stock class, or of one that wraps stock models of another library.

    Raises:
        ValueError: it has no reversible twin.
    """
    known = STOCK_CLASSES | WRAPPERS
    if class_name not in known:
        raise ValueError(
            f"{class_name or 'this checkpoint'} has no reversible twin: these have: {', '.join(STOCK_CLASSES)}."
        )
    return known[class_name]


def library_class(config: Mapping[str, Any]) -> type[ReversiblePreTrainedModel] | None:
    """The reversible class that loads a checkpoint of another library than transformers straight in.

    Args:
        config: the contents of its `config.json`.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.library and (head := architecture.library.head_of(config)):
            return architecture.heads[head]
    return None
