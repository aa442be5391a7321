"""Configuration of reversible Swin."""

from typing import Any, ClassVar

from transformers import SwinConfig

from .configuration_reversible import ReversibleConfig


class RevSwinConfig(ReversibleConfig, SwinConfig):
    """[`SwinConfig`] with the fields of [`ReversibleConfig`]. A list `beta` counts the layers of all stages.

    Raises:
        ValueError: stages do not have one depth and one number of attention heads each, or a width is not a multiple of its
            heads.

    Example:
        >>> RevSwinConfig(depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], embed_dim=128, beta=1 / 32)
    """

    model_type = "rev_swin"
    stock_model_types: ClassVar[tuple[str, ...]] = ("swin",)

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths={list(self.depths)} has {len(self.depths)} stages and num_heads={list(self.num_heads)} has "
                f"{len(self.num_heads)}: give both one number for each stage."
            )
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={list(self.depths)}: every stage needs one layer or more.")
        if self.window_size < 1:
            raise ValueError(f"window_size={self.window_size}: a window needs one patch or more on a side.")
        super().__post_init__(**kwargs)

    @property
    def stage_depths(self) -> tuple[int, ...]:
        return tuple(self.depths)

    @classmethod
    def depth_fields(cls, depth: int, stages: int = 1) -> dict[str, Any]:
        return {"depths": [1] * (stages - 1) + [depth]}
