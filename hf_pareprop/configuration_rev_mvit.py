"""Configuration of reversible MViTv2, and how it reads that of a timm checkpoint."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from .configuration_reversible import ReversibleConfig

PATCH = 4
"""Stride of the patch embedding, in pixels."""

NAMES = ("depths", "embed_dim", "num_heads", "expand_attn", "use_cls_token")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: dict(zip(NAMES, values, strict=True))
    for name, values in {
        "mvitv2_tiny": ((1, 2, 5, 2), 96, 1, True, False),
        "mvitv2_small": ((1, 2, 11, 2), 96, 1, True, False),
        "mvitv2_base": ((2, 3, 16, 3), 96, 1, True, False),
        "mvitv2_large": ((2, 6, 36, 4), 144, 2, False, False),
        "mvitv2_small_cls": ((1, 2, 11, 2), 96, 1, True, True),
        "mvitv2_base_cls": ((2, 3, 16, 3), 96, 1, True, True),
        "mvitv2_large_cls": ((2, 6, 36, 4), 144, 2, True, True),
        "mvitv2_huge_cls": ((4, 8, 60, 8), 192, 3, True, True),
    }.items()
}
"""Those that timm has, by its names."""

FROM_MODEL_ARGS = {"in_chans": "num_channels", "drop_rate": "hidden_dropout_prob", "drop_path_rate": "drop_path_rate"}
"""Arguments of timm's models, and the fields that they become."""

TIMM_KEYS = {"num_classes", "num_features", "label_names", "label_descriptions", "global_pool", "model_args"}
TIMM_KEYS |= {"pretrained_cfg", "do_pooling"}


class BlockShape(NamedTuple):
    """What a block reads, computes with and returns.

    Attributes:
        width_in: of the hidden state that it reads.
        width: of its attention.
        width_out: of the hidden state that it returns.
        heads: of its attention.
        stride: by which it pools queries and so the hidden state.
        kv_stride: by which it pools keys and values.
        side: rows, and columns, of patches that it reads.
    """

    width_in: int
    width: int
    width_out: int
    heads: int
    stride: int
    kv_stride: int
    side: int

    @property
    def is_transition(self) -> bool:
        return self.stride > 1 or self.width_in != self.width_out


class RevMViTConfig(ReversibleConfig):
    """MViTv2 (Li et al. 2021, arXiv 2112.01526) with the fields of [`ReversibleConfig`].

    Args:
        architecture (`str`, *optional*):
            One of timm's: mvitv2_tiny, _small, _base, _large, _small_cls, _base_cls, _large_cls, _huge_cls. It gives the
            next five fields where they are not given themselves; where they are and differ, it becomes `None`. Without
            one they are those of mvitv2_base.
        depths (`list[int]`): Blocks of every stage.
        embed_dim (`int` or `list[int]`): Width of the first stage, which doubles at every other; or one per stage.
        num_heads (`int` or `list[int]`): Attention heads, in the same way.
        expand_attn (`bool`):
            Whether the attention of a stage's first block widens the hidden state, or the MLP of the last block before it.
        use_cls_token (`bool`): Whether there is a CLS token, which the head reads instead of the mean over patches.
        image_size (`int`, defaults to 224): Of square images; a multiple of `4 * 2**(stages - 1)`.
        num_channels (`int`, defaults to 3): Of the images.
        mlp_ratio (`float`, defaults to 4.0): Width of an MLP over that of its input.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have one.
        drop_path_rate (`float`, defaults to 0.0): Of the last block; it grows linearly from 0 at the first one.
        hidden_dropout_prob (`float`, defaults to 0.0): Before the classifier.
        layer_norm_eps (`float`, defaults to 1e-6): Of every layer norm.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        timm_pretrained_cfg (`dict`, *optional*):
            `pretrained_cfg` of the timm checkpoint that the weights came from: how its images were prepared, its licence.
            Exporting gives it back.

    Raises:
        ValueError: a field is out of range, or fields do not go together.

    Example:
        >>> RevMViTConfig(architecture="mvitv2_small", num_labels=10, drop_path_rate=0.1)
    """

    model_type = "rev_mvit"
    stock_model_types: ClassVar[tuple[str, ...]] = ("timm_wrapper",)
    _auto_class: ClassVar[str | None] = "AutoConfig"

    architecture: str | None = None
    depths: list[int] | tuple[int, ...] | None = None
    embed_dim: int | list[int] | tuple[int, ...] | None = None
    num_heads: int | list[int] | tuple[int, ...] | None = None
    expand_attn: bool | None = None
    use_cls_token: bool | None = None
    image_size: int = 224
    num_channels: int = 3
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    drop_path_rate: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    timm_pretrained_cfg: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture is not None:
            check_architecture(self.architecture)
        for name, value in ARCHITECTURES[self.architecture or "mvitv2_base"].items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if name == "depths" else value)
        self.check_shape()
        if self.architecture != self.timm_name():
            self.architecture = None
        super().__post_init__(**kwargs)

    def check_reversible(self) -> None:
        self.check_shape()
        if self.architecture is not None and self.architecture != self.timm_name():
            raise ValueError(
                f"architecture={self.architecture!r} does not have the other fields, such as depths={self.depths}: set it to "
                "None, or make a new RevMViTConfig of it."
            )
        super().check_reversible()

    def check_shape(self) -> None:
        """
        Raises:
            ValueError: there is no such model.
        """
        stages, depths = len(self.depths or ()), self.depths
        if not stages or min(depths) < 1:
            raise ValueError(f"depths={depths} has to give every stage one block or more, as in [1, 2, 5, 2].")
        for name in ("embed_dim", "num_heads"):
            values = _per_stage(getattr(self, name), stages)
            if len(values) != stages or min(values) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} has to be one positive number, which doubles at every stage, or one for each "
                    f"of the {stages} stages of depths={depths}."
                )
        for width, heads in zip(self.stage_widths, self.stage_heads, strict=True):
            if width % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim} in every stage: a width of {width} "
                    f"cannot be shared by {heads} heads; choose widths that are multiples of the heads."
                )
        unit = PATCH << (stages - 1)
        if not isinstance(self.image_size, int) or self.image_size < 1 or self.image_size % unit:
            raise ValueError(
                f"image_size={self.image_size} has to be one number, a multiple of {unit}: images are square, and with {stages} "
                f"stages their patches of {PATCH} pixels are halved {stages - 1} times."
            )
        for name in ("drop_path_rate", "hidden_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a rate: it has to be at least 0 and below 1.")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} has to be positive; 4 is usual.")

    def timm_name(self) -> str | None:
        """The architecture of timm that has these depths, widths and heads, if there is one."""
        own = (self.stage_depths, self.stage_widths, self.stage_heads, self.expand_attn, self.use_cls_token)
        for name, fields in ARCHITECTURES.items():
            widths, heads = _per_stage(fields["embed_dim"], 4), _per_stage(fields["num_heads"], 4)
            if own == (fields["depths"], widths, heads, fields["expand_attn"], fields["use_cls_token"]):
                return name
        return None

    @property
    def stage_depths(self) -> tuple[int, ...]:
        return tuple(self.depths)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        return _per_stage(self.embed_dim, len(self.depths))

    @property
    def stage_heads(self) -> tuple[int, ...]:
        return _per_stage(self.num_heads, len(self.depths))

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.stage_depths)

    @property
    def hidden_size(self) -> int:
        """The width of the last stage, which the head reads."""
        return self.stage_widths[-1]

    @property
    def transitions(self) -> tuple[int, ...]:
        shapes = [shape for stage in self.block_shapes() for shape in stage]
        return tuple(i for i, shape in enumerate(shapes) if shape.is_transition)

    @classmethod
    def depth_fields(cls, depth: int, stages: int = 1) -> dict[str, Any]:
        return {"depths": [1] * (stages - 1) + [depth], "architecture": None}

    def block_shapes(self) -> list[list[BlockShape]]:
        """Of the blocks of every stage."""
        widths, width = self.stage_widths, self.stage_widths[0]
        side, kv_stride, shapes = self.image_size // PATCH, PATCH, []
        for i, depth in enumerate(self.depths):
            kv_stride = max(kv_stride // 2, 1) if i else kv_stride
            shapes.append([])
            for j in range(depth):
                stride = 2 if i and not j else 1
                if self.expand_attn:
                    wide = after = widths[i]
                else:
                    wide, after = width, widths[min(i + 1, len(widths) - 1)] if j == depth - 1 else width
                shapes[i].append(BlockShape(width, wide, after, self.stage_heads[i], stride, kv_stride, side))
                width, side = after, side // stride
        return shapes

    @classmethod
    def stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return config_dict  # transformers' own class would ask timm for labels

    @classmethod
    def from_stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The dictionary of a timm checkpoint's configuration as one of this family, `beta` defaulting to 1/32.

        Raises:
            ValueError: it is of an architecture that is none of MViTv2, or made with arguments that change what it is.
        """
        architecture, cfg = config_dict.get("architecture"), dict(config_dict.get("pretrained_cfg") or {})
        check_architecture(architecture)
        args, fields = dict(config_dict.get("model_args") or {}), {"timm_pretrained_cfg": cfg or None}
        channels, *size = cfg.get("input_size") or (3, 224, 224)
        size = args.pop("img_size", size)
        labels = config_dict.get("num_classes", args.pop("num_classes", cfg.get("num_classes", 1000)))
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows != columns:
            raise ValueError(
                f"the checkpoint is for images of {rows}x{columns} pixels, a reversible MViT takes square ones."
            )
        fields |= {"image_size": rows, "num_channels": channels}
        fields |= {field: args.pop(name) for name, field in FROM_MODEL_ARGS.items() if name in args}
        pool = "token" if ARCHITECTURES[architecture]["use_cls_token"] else "avg"
        if args.pop("global_pool", None) not in (None, pool) or args:
            raise ValueError(
                f"the checkpoint was made with model_args={config_dict['model_args']}, of which a reversible MViT takes img_size, "
                f"{', '.join(FROM_MODEL_ARGS)} alone, and global_pool={pool!r}."
            )
        names = config_dict.get("label_names")
        if names and len(names) == labels:
            fields["id2label"] = {
                int(i): name for i, name in (names.items() if isinstance(names, dict) else enumerate(names))
            }
        else:
            fields["num_labels"] = labels
        rest = {name: value for name, value in config_dict.items() if name not in TIMM_KEYS}
        return super().from_stock_dict({**rest, **fields, "model_type": cls.stock_model_types[0]})


def check_architecture(name: Any) -> None:
    """
    Raises:
        ValueError: timm has no MViTv2 of that name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name!r} is not an MViTv2 of timm: take one of {', '.join(ARCHITECTURES)}.")


def _per_stage(value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    return tuple(value << i for i in range(stages)) if isinstance(value, int) else tuple(value)
