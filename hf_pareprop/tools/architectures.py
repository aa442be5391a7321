"""How stock models of one model type map to a reversible family: class names, parameter names, configuration fields."""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel

Renames = tuple[tuple[str, str], ...]

COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "bert")
"""Model types whose positions count from `pad_token_id + 1`: in the stock model already, or in the converted model only."""


def counts_from_padding(config: PreTrainedConfig) -> bool:
    """Whether a model, stock or reversible, counts positions from `pad_token_id + 1`."""
    return str(config.model_type).removeprefix("rev_") in COUNT_FROM_PADDING


@dataclass(frozen=True)
class Library:
    """Another library than transformers that has the stock models.

    Attributes:
        name: the name to show to users.
        models: the name of those of its models that belong to the family, to show to users.
        head_of: a function from the contents of a `config.json` to the family's head that reads the checkpoint; `None` if
            the checkpoint is not of this library and family.
        model_name: the library's name for the stock twin of a reversible model; raises ValueError if there is no twin.
        save: writes a reversible model into a folder as a checkpoint of the library. The third argument is the path of the
            `preprocessor_config.json` of an image processor, which need not exist.
        wrapper: the beginning of the names of the classes in which transformers wraps the library's models.
        wrapper_config: the configuration of such a wrapper for the twin of a reversible model; raises ValueError if there is
            no twin.
    """

    name: str
    models: str
    head_of: Callable[[Mapping[str, Any]], str | None]
    model_name: Callable[[Any], str]
    save: Callable[[Any, Path, Path], None]
    wrapper: str
    wrapper_config: Callable[[Any], PreTrainedConfig]


@dataclass(frozen=True)
class Architecture:
    """How stock models of one model type map to a reversible family.

    Attributes:
        model_type: the model type of the stock checkpoints. For a family's first architecture it is the family's own model
            type without ``rev_``.
        prefix: the beginning of the stock class names; ``None`` if transformers has no such classes.
        library: the library that has the stock models, if transformers has none.
        renames: patterns and replacements, applied in order, from stock parameter names to reversible ones. Names that the
            reversible model already has are not changed.
        head_renames: the same for single heads, applied before ``renames``.
        fields: configuration fields that the reversible model needs in addition to the stock ones.
        positions_start_at_zero: whether the first token has position 0, as in BERT. RoBERTa counts from
            ``pad_token_id + 1``, so its position table begins with that many more rows.
        heads: maps the end of a stock class name to the reversible class. The family fills it in.

    Example:
        >>> Architecture("bert", "Bert", renames=((r"^bert\\.", "roberta."),), positions_start_at_zero=True)
    """

    model_type: str
    prefix: str | None
    library: Library | None = None
    renames: Renames = ()
    head_renames: dict[str, Renames] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    positions_start_at_zero: bool = False
    heads: Mapping[str, type[ReversiblePreTrainedModel]] = field(default_factory=dict)

    @property
    def has_stock_classes(self) -> bool:
        """Whether transformers has the stock models."""
        return self.prefix is not None

    def head_of(self, cls: type[PreTrainedModel]) -> str:
        """The end of the name of the stock twin of a reversible class.

        Args:
            cls: a class of the family, one derived from it, or one loaded as remote code.

        Raises:
            ValueError: the class is not of the family.
        """
        names = {base.__name__ for base in cls.__mro__}
        for head, twin in self.heads.items():
            if twin.__name__ in names:
                return head
        raise ValueError(f"{cls.__name__} has no stock twin among the classes of {self.model_type!r}.")

    def stock_class(self, cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The stock twin of a reversible class.

        Raises:
            ValueError: there is none.
        """
        head = self.head_of(cls)
        if self.prefix is None:
            raise ValueError(
                f"{cls.__name__} has no stock twin: transformers has no models of type {self.model_type!r}."
            )
        return getattr(transformers, self.prefix + head)

    def reversible_name(self, name: str, head: str, known: Container[str]) -> str:
        """The reversible model's name for the stock parameter ``name``. ``known`` are the names of its parameters."""
        if name in known:
            return name
        for pattern, replacement in (*self.head_renames.get(head, ()), *self.renames):
            name = re.sub(pattern, replacement, name)
        return name

    def reserved_rows(self, config: PreTrainedConfig) -> int:
        """The number of rows that the reversible position table has before the first token's, and the stock one has not."""
        if not self.positions_start_at_zero:
            return 0
        padding = config.pad_token_id
        if padding is None:
            raise ValueError("pad_token_id is None: positions are counted from it, so set it in the configuration.")
        return padding + 1

    def to_reversible_tensor(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        if rows := self.reserved_rows(config) if name.endswith("position_embeddings.weight") else 0:
            return torch.cat([tensor.new_zeros(rows, tensor.shape[1]), tensor])
        return tensor.clone()

    def to_stock_tensor(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        rows = self.reserved_rows(config) if name.endswith("position_embeddings.weight") else 0
        return tensor[rows:].clone()
