"""How the stock models of one type map onto a reversible family: class names, parameter names, configuration fields."""

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


@dataclass(frozen=True)
class Library:
    """Another library than transformers that has the stock models.

    Attributes:
        name: for people.
        models: which of its models are stock models of the family, for people.
        head_of: of the contents of a `config.json`, which head of the family reads that checkpoint; `None` if it is not one
            of this library, or of another family.
        model_name: what it calls the twin of a reversible model; raises ValueError if it has none.
        save: writes a checkpoint that it reads, from a reversible model, into a folder; the third argument is the
            `preprocessor_config.json` of an image processor, which may not be there.
        wrapper: what the names of the classes begin with in which transformers wraps its models.
        wrapper_config: the configuration of such a wrapper for the twin of a reversible model; raises ValueError if it has
            none.
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
    """How the stock models of one type map onto a reversible family.

    Attributes:
        model_type: of the stock checkpoints. That of a family's first architecture is the family's own without ``rev_``.
        prefix: what the stock class names begin with; ``None`` where transformers has no such classes.
        library: then, which has the stock models.
        renames: patterns and replacements, in order, from stock parameter names to the reversible ones; names that the
            reversible model knows already stay.
        head_renames: the same for one head, before ``renames``.
        fields: configuration fields that the reversible model needs beside the stock ones.
        positions_start_at_zero: whether position 0 is the first token's, as in BERT; RoBERTa counts from
            ``pad_token_id + 1``, so its table has as many rows more in front.
        heads: from what a stock class name ends with to the reversible class; the family fills it in.

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
        """What the stock twin's name of a reversible class ends with.

        Args:
            cls: of the family, or derived from such a class, or loaded as remote code.

        Raises:
            ValueError: it is not of the family.
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
