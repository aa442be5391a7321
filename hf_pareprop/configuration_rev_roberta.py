"""Configuration of reversible RoBERTa."""

from typing import Any, ClassVar

from transformers import RobertaConfig

from .configuration_reversible import ReversibleConfig


class RevRobertaConfig(ReversibleConfig, RobertaConfig):
    """[`RobertaConfig`] with the fields of [`ReversibleConfig`]. The model is always an encoder.

    Raises:
        ValueError: `is_decoder` or `add_cross_attention` is set.

    Example:
        >>> model = RevRobertaForMaskedLM(RevRobertaConfig(num_hidden_layers=24, beta=0.5))
    """

    model_type = "rev_roberta"
    stock_model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")
    converted_model_types: ClassVar[tuple[str, ...]] = ("bert",)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(f"{name}=True: reversible RoBERTa is an encoder; use the stock model for decoding.")
        kind = getattr(self, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            raise ValueError(f"position_embedding_type={kind!r} is not supported: only 'absolute' is.")
