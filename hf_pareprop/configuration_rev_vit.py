"""Configuration of reversible ViT."""

from typing import ClassVar

from transformers import ViTConfig

from .configuration_reversible import ReversibleConfig


class RevViTConfig(ReversibleConfig, ViTConfig):
    """[`ViTConfig`] with the fields of [`ReversibleConfig`]."""

    model_type = "rev_vit"
    stock_model_types: ClassVar[tuple[str, ...]] = ("vit",)
    _auto_class: ClassVar[str | None] = "AutoConfig"
