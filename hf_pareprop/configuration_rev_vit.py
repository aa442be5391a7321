"""Configuration of reversible ViT."""

from typing import ClassVar

from transformers import ViTConfig

from .configuration_reversible import ReversibleConfig


class RevViTConfig(ReversibleConfig, ViTConfig):
    """[`ViTConfig`] with the fields of [`ReversibleConfig`].

    Args:
        distillation_token (`bool`, defaults to `False`):
            Whether a second token follows the CLS token, as in DeiT. No head reads it.

    Example:
        >>> model = RevViTForImageClassification(RevViTConfig(num_hidden_layers=24, num_labels=10))
    """

    model_type = "rev_vit"
    stock_model_types: ClassVar[tuple[str, ...]] = ("vit",)
    converted_model_types: ClassVar[tuple[str, ...]] = ("deit",)

    distillation_token: bool = False
