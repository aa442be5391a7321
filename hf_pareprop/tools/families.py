"""The reversible families, one row each. All code that lists families reads these rows.

`hf_pareprop` reads here which names are public and what to register. Conversion, the command line, benchmarks and tests read
the rest. A new family is a configuration file, a modeling file, and a row.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from .. import stock_families
from ..configuration_reversible import ReversibleConfig
from ..modeling_rev_mvit import RevMViTPreTrainedModel
from ..modeling_rev_roberta import RevRobertaPreTrainedModel
from ..modeling_rev_swin import RevSwinPreTrainedModel
from ..modeling_rev_vit import RevViTPreTrainedModel
from ..modeling_reversible import ReversiblePreTrainedModel
from ..stock_families import available, classes_of
from .architectures import Architecture, Renames
from .timm_checkpoint import TIMM

Fields = dict[str, Any]
"""Fields of a configuration."""


class Shape(NamedTuple):
    """The size of a model, independent of how its family names the fields.

    Attributes:
        width: width of the hidden states; in a model with several stages, that of the first stage.
        heads: number of attention heads; in a model with several stages, that of the first stage.
        depths: the number of layers of each stage.
        mlp_ratio: the inner width of an MLP divided by the width of its input.
    """

    width: int
    heads: int
    depths: tuple[int, ...]
    mlp_ratio: float = 4


@dataclass(frozen=True)
class Family:
    """The row of a family.

    Attributes:
        name: the name to show to users.
        base: the family's `...PreTrainedModel`. Its `auto_map` names the configuration and all models.
        architectures: the stock models that become models of this family; the first is the family's own.
        classifier_head: the end of the name of the class that benchmarks and tests train, with one label per input.
        shape_fields: a function from a shape to fields of the configuration.
        dropout_fields: a function from a dropout rate to fields of the configuration.
        sizes: the shapes of the published models, by name.
        size_fields: the other fields of their configurations.
        small: the shape of the small random models that tests train. Their depths vary.
        small_fields: the other fields of their configurations.

    Example:
        >>> FAMILIES["vit"].config(FAMILIES["vit"].sizes["vit-b"], beta=0.5)
    """

    name: str
    base: type[ReversiblePreTrainedModel]
    architectures: tuple[Architecture, ...]
    classifier_head: str
    shape_fields: Callable[[Shape], Fields]
    dropout_fields: Callable[[float], Fields]
    sizes: Mapping[str, Shape]
    small: Shape
    size_fields: Fields = field(default_factory=dict)
    small_fields: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Filled in here, so that a row does not repeat the family's classes for each of its architectures.
        bound = tuple(replace(architecture, heads=self.heads) for architecture in self.architectures)
        object.__setattr__(self, "architectures", bound)

    @property
    def config_class(self) -> type[ReversibleConfig]:
        found: Any = self.base.config_class
        return found

    @cached_property
    def auto_classes(self) -> dict[str, type[ReversiblePreTrainedModel]]:
        """Maps the name of each Auto class of models to the family's model."""
        module = sys.modules[self.base.__module__]
        names = {auto: path.rpartition(".")[2] for auto, path in self.base.auto_map.items() if auto != "AutoConfig"}
        return {auto: getattr(module, name) for auto, name in names.items()}

    @cached_property
    def heads(self) -> dict[str, type[ReversiblePreTrainedModel]]:
        """Maps the end of a class name (`Model`, `ForMaskedLM`, …) to the class."""
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
        """Whether models of this family usually have several stages."""
        return len(self.config_class().stage_depths) > 1

    def depths(self, layers: int) -> tuple[int, ...]:
        """The stages of a small model: two, with a third of the layers in the first, if there are enough layers."""
        return (layers // 3, layers - layers // 3) if self.staged and layers >= 3 else (layers,)

    def small_config_fields(
        self, depth: int, dropout: float = 0.0, wider: int = 1, mlp_ratio: float | None = None
    ) -> Fields:
        """The fields of a small configuration of this family or of its stock twin.

        Args:
            depth: the number of layers in all stages together.
            dropout: the dropout rate.
            wider: a factor for the width.
            mlp_ratio: used instead of that of the row.
        """
        shape = self.small._replace(
            width=wider * self.small.width,
            depths=self.depths(depth),
            mlp_ratio=self.small.mlp_ratio if mlp_ratio is None else mlp_ratio,
        )
        return {**self.small_fields, **self.shape_fields(shape), **self.dropout_fields(dropout)}

    def config(self, shape: Shape, **fields: Any) -> ReversibleConfig:
        """The configuration for a shape, with the other fields of the published sizes.

        Raises:
            ValueError: a field is out of range.
        """
        return self.config_class(**{**self.size_fields, **self.shape_fields(shape), **fields})


def _equal_layers(shape: Shape) -> Fields:
    """The shape fields of families whose layers are all alike."""
    return {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.mlp_ratio * shape.width),
        **ReversibleConfig.depth_fields(sum(shape.depths)),
    }


def _two_dropouts(rate: float) -> Fields:
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def _mvit_shape(shape: Shape) -> Fields:
    fields = {"embed_dim": shape.width, "num_heads": shape.heads, "depths": list(shape.depths)}
    return {**fields, "mlp_ratio": shape.mlp_ratio}


def _swin_shape(shape: Shape) -> Fields:
    return {**_mvit_shape(shape), "num_heads": [shape.heads << stage for stage in range(len(shape.depths))]}


def _swin_dropouts(rate: float) -> Fields:
    return {**_two_dropouts(rate), "drop_path_rate": 2 * rate}


def _in_memory(attention: str) -> Renames:
    """Renames from the parameter names of stock models in memory to those of checkpoints, which the reversible model has."""
    products = (
        (rf"attention\.{name[0]}_proj\.", f"attention.{attention}.{name}.") for name in ("query", "key", "value")
    )
    return (
        *products,
        (r"attention\.o_proj\.", "attention.output.dense."),
        (r"mlp\.fc1\.", "intermediate.dense."),
        (r"mlp\.fc2\.", "output.dense."),
    )


_SWIN_IN_MEMORY: Renames = (*_in_memory("self"), (r"attention\.relative_position_bias\.", "attention.self."))
_VIT_IN_MEMORY: Renames = ((r"\blayers\.(\d+)\.", r"encoder.layer.\1."), *_in_memory("attention"))

_BERT = Architecture(
    "bert",
    "Bert",
    renames=((r"^bert\.", "roberta."),),
    head_renames={
        "ForMaskedLM": (
            (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
            (r"^cls\.predictions\.(transform\.)?", "lm_head."),
        ),
        # BERT's classifier reads the pooler. RoBERTa's classifier has the same layer inside.
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
    renames=(*_VIT_IN_MEMORY, (r"^deit\.", "vit.")),
    fields={"distillation_token": True},
)

ROWS = (
    Family(
        name="vit",
        base=RevViTPreTrainedModel,
        architectures=(Architecture("vit", "ViT", renames=_VIT_IN_MEMORY), _DEIT),
        classifier_head="ForImageClassification",
        shape_fields=_equal_layers,
        dropout_fields=_two_dropouts,
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
        sizes={
            "swin-t": Shape(96, 3, (2, 2, 6, 2)),
            "swin-s": Shape(96, 3, (2, 2, 18, 2)),
            "swin-b": Shape(128, 4, (2, 2, 18, 2)),
            "swin-l": Shape(192, 6, (2, 2, 18, 2)),
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
"""The families, by their names."""

STOCK_LAYERS = {
    model_type: Architecture(
        model_type,
        family.prefix,
        heads={head: classes_of(model_type)[f"Rev{family.prefix}{head}"] for head in family.heads.values()},
    )
    for model_type, family in stock_families.FAMILIES.items()
    if available(model_type)
}
"""The families in :mod:`stock_families`, which run the layers of stock models, by the model type of the stock models."""

ARCHITECTURES = {a.model_type: a for family in ROWS for a in family.architectures}
"""The architectures of the families, by the model type of the stock checkpoints."""

MODEL_CLASSES = {
    cls.__name__: cls for a in (*ARCHITECTURES.values(), *STOCK_LAYERS.values()) for cls in a.heads.values()
}
"""All reversible classes, by their names."""


def _by_class(
    architectures: Iterable[Architecture], prefix: Callable[[Architecture], str | None]
) -> dict[str, tuple[Architecture, str]]:
    """Maps class names to architectures and heads. ``prefix`` gives the beginning of an architecture's class names."""
    return {f"{begin}{head}": (a, head) for a in architectures if (begin := prefix(a)) for head in a.heads}


STOCK_CLASSES = _by_class(ARCHITECTURES.values(), lambda a: a.prefix)
STOCK_LAYER_CLASSES = _by_class(STOCK_LAYERS.values(), lambda a: a.prefix)
"""The stock classes of the families in :mod:`stock_families`, as in `STOCK_CLASSES`."""
WRAPPERS = _by_class(ARCHITECTURES.values(), lambda a: a.library.wrapper if a.library else None)
"""The classes in which transformers wraps models of another library."""

TWINS = STOCK_CLASSES | WRAPPERS | STOCK_LAYER_CLASSES
"""What :func:`architecture_of` knows."""


def architecture_of(class_name: str) -> tuple[Architecture, str]:
    """The architecture and the head of a stock class, or of a class that wraps stock models of another library.

    Raises:
        ValueError: the class has no reversible twin.
    """
    if class_name not in TWINS:
        raise ValueError(
            f"{class_name or 'this checkpoint'} has no reversible twin: the classes that have one are "
            f"{', '.join([*STOCK_CLASSES, *STOCK_LAYER_CLASSES])}. Others can be tried with their own layers: "
            "hf_pareprop.to_reversible(model, steps='layer')."
        )
    return TWINS[class_name]


def library_class(config: Mapping[str, Any]) -> type[ReversiblePreTrainedModel] | None:
    """The reversible class that loads a checkpoint of another library directly, or ``None``.

    Args:
        config: the contents of its `config.json`.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.library and (head := architecture.library.head_of(config)):
            return architecture.heads[head]
    return None
