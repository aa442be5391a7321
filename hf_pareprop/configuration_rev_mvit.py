"""Configuration of reversible MViTv2. It can read the configuration of a timm checkpoint."""

# mypy: disable-error-code="arg-type"
# Fields that an architecture sets are optional arguments, but are always set afterwards.
import struct
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
"""timm's architectures, by their names there."""

KV_STRIDE = 4
"""Stride with which the first stage pools keys and values. Each later stage halves it, down to 1."""

FROM_MODEL_ARGS = {
    "in_chans": "num_channels",
    "num_classes": "num_labels",
    "drop_rate": "hidden_dropout_prob",
    "drop_path_rate": "drop_path_rate",
}
"""Maps arguments of timm's models to fields of this configuration."""

TIMM_KEYS = {"num_classes", "num_features", "label_names", "label_descriptions", "global_pool", "model_args"}
TIMM_KEYS |= {"pretrained_cfg", "do_pooling"}
"""The other fields in timm's configuration files."""


class BlockShape(NamedTuple):
    """The shape of one block.

    Attributes:
        width_in, width, width_out: widths of the hidden state that the block reads, of its attention, and of its output.
        heads: the number of attention heads.
        stride, kv_stride: the strides with which it pools queries and the hidden state, and keys and values.
        side: the number of rows of patches that it reads, which is also the number of columns.
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
            One of timm's: mvitv2_tiny, _small, _base, _large, _small_cls, _base_cls, _large_cls, _huge_cls. It sets those of
            the next five fields that are not given. If one is given and differs, `architecture` becomes `None`. Without an
            architecture the defaults are those of mvitv2_base.
        depths (`list[int]`): The number of blocks of every stage.
        embed_dim (`int` or `list[int]`): Width of the first stage, which each later one doubles; or one width per stage.
        num_heads (`int` or `list[int]`): Attention heads of the first stage, which each later one doubles; or one per stage.
        expand_attn (`bool`):
            Which block widens the hidden state between stages: with `True` the attention of a stage's first block, with
            `False` the MLP of the last block before it.
        use_cls_token (`bool`): Whether there is a CLS token. The head then reads it instead of the mean over patches.
        image_size (`int`, defaults to 224): Side of the square images in pixels, a multiple of `4 * 2**(stages - 1)`.
        num_channels (`int`, defaults to 3): The number of channels of the images.
        mlp_ratio (`float`, defaults to 4.0): Width of an MLP divided by the width of its input.
        qkv_bias (`bool`, defaults to `True`): Whether the projections to queries, keys and values have a bias.
        drop_path_rate (`float`, defaults to 0.0): Drop rate of the last block. It grows linearly from 0 at the first block.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout rate before the classifier.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer norm.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        timm_pretrained_cfg (`dict`, *optional*):
            `pretrained_cfg` of the timm checkpoint that the weights came from. It says how images were prepared, and the
            licence. Exporting writes it again.

    Raises:
        ValueError: a field is out of range, or fields do not go together.

    Example:
        >>> RevMViTConfig(architecture="mvitv2_small", num_labels=10, drop_path_rate=0.1)
    """

    model_type = "rev_mvit"
    stock_model_types: ClassVar[tuple[str, ...]] = ("timm_wrapper",)

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
        self._check_shape()
        if self.architecture != self.timm_name():
            self.architecture = None
        super().__post_init__(**kwargs)

    def check_reversible(self) -> None:
        self._check_shape()
        if self.architecture not in (None, self.timm_name()):
            raise ValueError(
                f"architecture={self.architecture!r} does not go with other fields, such as depths={self.depths}, which were set "
                "before or after it: set it to None."
            )
        super().check_reversible()

    def _check_shape(self) -> None:
        stages, depths, size = len(self.depths), self.depths, self.image_size
        if not stages or min(depths) < 1:
            raise ValueError(f"depths={depths} has to give every stage one block or more, as [1, 2, 5, 2] does.")
        for name, values in (("embed_dim", self.stage_widths), ("num_heads", self.stage_heads)):
            if len(values) != stages or min(values) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} has to be one positive number, which each later stage doubles, or one for each "
                    f"of the {stages} stages of depths={depths}."
                )
        for width, heads in zip(self.stage_widths, self.stage_heads, strict=True):
            if width % heads:
                raise ValueError(
                    f"embed_dim={self.embed_dim} and num_heads={self.num_heads} give a stage a width of {width} and {heads} heads: "
                    "the width has to be a multiple of the heads."
                )
        unit = PATCH << (stages - 1)
        if not isinstance(size, int) or size < 1 or size % unit:
            raise ValueError(
                f"image_size={size} has to be one number, a multiple of {unit} such as {7 * unit}: images are square, and {stages} "
                f"stages halve their grid of patches of {PATCH} pixels {stages - 1} times."
            )
        for name in ("drop_path_rate", "hidden_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 0 and below 1.")
        if int(min(self.stage_widths) * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves MLPs no width: 4 is usual.")

    def timm_name(self) -> str | None:
        """The name of timm's architecture with these depths, widths and heads, if there is one."""
        own = (self.stage_depths, self.stage_widths, self.stage_heads, self.expand_attn, self.use_cls_token)
        for name, (depths, width, heads, *flags) in ((name, f.values()) for name, f in ARCHITECTURES.items()):
            if own == (depths, _per_stage(width, 4), _per_stage(heads, 4), *flags):
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
        """The number of blocks in all stages together."""
        return sum(self.depths)

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
        """The shapes of the blocks, stage by stage."""
        widths, found = self.stage_widths, list[list[BlockShape]]()
        width, side = widths[0], self.image_size // PATCH
        for i, (depth, heads) in enumerate(zip(self.depths, self.stage_heads, strict=True)):
            wide = widths[i] if self.expand_attn else widths[min(i + 1, len(widths) - 1)]
            found.append([])
            for j in range(depth):
                out = wide if self.expand_attn or j == depth - 1 else width
                attention, stride = out if self.expand_attn else width, 1 if j or not i else 2
                found[i].append(BlockShape(width, attention, out, heads, stride, max(KV_STRIDE >> i, 1), side))
                width, side = out, side // stride
        return found

    def drop_path_rates(self) -> list[float]:
        """The drop rates of the blocks: from 0 to `drop_path_rate`, rounded to fp32 as `torch.linspace` does in timm.

        They are computed without tensors, because a model may be made on the meta device, where tensors have no values.
        """
        last, end = max(1, self.num_hidden_layers - 1), _single(self.drop_path_rate)
        step = _single(end / last)
        middle = self.num_hidden_layers // 2
        return [
            _single(step * i if i < middle or not i else end - step * (last - i))
            for i in range(self.num_hidden_layers)
        ]

    @classmethod
    def stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return config_dict  # transformers' own configuration class would need timm, for the names of labels

    @classmethod
    def from_stock_dict(cls, config_dict: dict[str, Any], steps: str | None = None) -> dict[str, Any]:
        """Turn the dictionary of a timm checkpoint's configuration into one of this family, at the default `beta` for `steps`.

        Raises:
            ValueError: its architecture is not an MViTv2, or was changed by arguments that this family does not have; or
                `steps` is out of range.
        """
        architecture, cfg = str(config_dict.get("architecture")), config_dict.get("pretrained_cfg") or {}
        check_architecture(architecture)
        pool = "token" if ARCHITECTURES[architecture]["use_cls_token"] else "avg"
        given = {"global_pool": pool, **(config_dict.get("model_args") or {})}
        channels, *size = cfg.get("input_size") or (3, 224, 224)
        size = given.pop("img_size", size)
        rows, columns = (size, size) if isinstance(size, int) else size
        if given.pop("global_pool") != pool or rows != columns or not given.keys() <= FROM_MODEL_ARGS.keys():
            raise ValueError(
                f"the checkpoint is of an {architecture} for {rows}x{columns} pixels, made with {config_dict.get('model_args')}: a "
                f"reversible one takes square images, global_pool={pool!r}, and else {', '.join(FROM_MODEL_ARGS)} alone."
            )
        fields = {"num_labels": cfg.get("num_classes", 1000), "num_channels": channels, "image_size": rows}
        fields |= {FROM_MODEL_ARGS[name]: value for name, value in given.items()}
        fields["num_labels"] = config_dict.get("num_classes", fields["num_labels"])
        names = config_dict.get("label_names") or ()
        if len(names) == fields["num_labels"] > 0:
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            fields["id2label"] = {int(i): name for i, name in pairs}
            fields["label2id"] = {name: i for i, name in fields["id2label"].items()}
        rest = {name: value for name, value in config_dict.items() if name not in TIMM_KEYS}
        return super().from_stock_dict(
            {**rest, **fields, "timm_pretrained_cfg": cfg or None, "model_type": cls.stock_model_types[0]}, steps
        )


def check_architecture(name: Any) -> None:
    """
    Raises:
        ValueError: timm has no MViTv2 of that name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name!r} is not an MViTv2 of timm: take one of {', '.join(ARCHITECTURES)}.")


def _single(value: float) -> float:
    """`value` rounded to fp32."""
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


def _per_stage(value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    return tuple(value << i for i in range(stages)) if isinstance(value, int) else tuple(value)
