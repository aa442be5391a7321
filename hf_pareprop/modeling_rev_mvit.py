"""Reversible MViTv2: the modules of timm's model with its names. Blocks that keep the shape are coupled reversibly."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment,return-value,misc"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import Encoder, Layer, TimmDropPath, check_channels
from .configuration_rev_mvit import PATCH, BlockShape, RevMViTConfig
from .heads import ForImageClassification
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel
from .pooling import distances, pooled
from .tape import Grid, Tape


class RevMViTPatchEmbeddings(nn.Module):
    """Maps images `(batch, channels, height, width)` to embeddings `(batch, patches, width)` of overlapping patches."""

    def __init__(self, config: RevMViTConfig):
        super().__init__()
        self.image_size = config.image_size
        self.proj = nn.Conv2d(config.num_channels, config.stage_widths[0], kernel_size=7, stride=PATCH, padding=3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        check_channels(pixel_values, self.proj.in_channels)
        rows, columns = pixel_values.shape[-2:]
        if (rows, columns) != (self.image_size, self.image_size):
            # With other sizes the tables of relative positions would be read at wrong rows.
            raise ValueError(
                f"the images are {rows}x{columns}, the model was built for {self.image_size}x{self.image_size}, and its "
                "relative positions are of that size: resize the images."
            )
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class RevMViTAttention(nn.Module):
    """Pooling attention with decomposed relative positions and residual pooling (MViTv2, section 4.1)."""

    def __init__(self, config: RevMViTConfig, shape: BlockShape):
        super().__init__()
        self.heads, self.width, self.prefix_length = shape.heads, shape.width, int(config.use_cls_token)
        size = shape.width // shape.heads
        self.scaling = size**-0.5
        rows = 2 * max(shape.side // shape.stride, shape.side // shape.kv_stride) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, size))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, size))
        self.qkv = nn.Linear(shape.width_in, 3 * shape.width, bias=config.qkv_bias)
        self.proj = nn.Linear(shape.width, shape.width)
        for name, stride in (("q", shape.stride), ("k", shape.kv_stride), ("v", shape.kv_stride)):
            pool = nn.Conv2d(size, size, kernel_size=3, stride=stride, padding=1, groups=size, bias=False)
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", nn.LayerNorm(size, eps=config.layer_norm_eps))

    def forward(self, hidden_states: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the output `(batch, pooled patches, width)` and the attention weights `(batch, heads, queries, keys)`."""
        batch, length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(dim=0)
        query, query_grid = pooled(query, self.prefix_length, grid, self.pool_q)
        key, key_grid = pooled(key, self.prefix_length, grid, self.pool_k)
        value, _ = pooled(value, self.prefix_length, grid, self.pool_v)
        query, key, value = self.norm_q(query), self.norm_k(key), self.norm_v(value)
        scores = (query * self.scaling) @ key.transpose(-2, -1)
        weights = self._with_positions(scores, query, query_grid, key_grid).softmax(dim=-1)
        context = weights @ value + query
        return self.proj(context.transpose(1, 2).reshape(batch, -1, self.width)), weights

    def _with_positions(self, scores: Tensor, query: Tensor, query_grid: Grid, key_grid: Grid) -> Tensor:
        """Add to the scores the products of queries with the embeddings of their distances to keys."""
        start = self.prefix_length
        patches = query[:, :, start:].reshape(*query.shape[:2], *query_grid, query.shape[-1])
        embeddings = (
            table[distances(queries, keys, query.device)]
            for table, queries, keys in zip((self.rel_pos_h, self.rel_pos_w), query_grid, key_grid, strict=True)
        )
        by_row, by_column = map(torch.einsum, ("byhwc,hkc->byhwk", "byhwc,wkc->byhwk"), (patches, patches), embeddings)
        among = scores[:, :, start:, start:]
        placed = among.view(*among.shape[:2], *query_grid, *key_grid) + by_row.unsqueeze(-1) + by_column.unsqueeze(-2)
        placed = placed.view(among.shape).to(scores.dtype)
        if not start:
            return placed
        placed = torch.cat((scores[:, :, start:, :start], placed), dim=3)
        return torch.cat((scores[:, :, :start], placed), dim=2)


class RevMViTLayer(Layer):
    """An attention step and an MLP step. Pre-LN: the residual is the state itself, pooled or projected in a transition."""

    def __init__(self, config: RevMViTConfig, shape: BlockShape, drop_path_rate: float):
        super().__init__()
        self.changes_shape, self.stride = shape.is_transition, shape.stride
        self.prefix_length, self.drop_path = int(config.use_cls_token), TimmDropPath(drop_path_rate)
        self.shortcut_pool = partial(nn.functional.max_pool2d, kernel_size=3, stride=shape.stride, padding=1)
        widening = nn.Linear(shape.width_in, shape.width_out) if shape.width_in != shape.width_out else None
        self.norm1 = nn.LayerNorm(shape.width_in, eps=config.layer_norm_eps)
        self.shortcut_proj_attn = widening if config.expand_attn else None
        self.attn = RevMViTAttention(config, shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=config.layer_norm_eps)
        self.shortcut_proj_mlp = None if config.expand_attn else widening
        inner = int(shape.width * config.mlp_ratio)
        layers = {"fc1": nn.Linear(shape.width, inner), "act": nn.GELU(), "fc2": nn.Linear(inner, shape.width_out)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden_states: Tensor, *, tape: Tape, **kwargs) -> Tensor:
        """Map a hidden state `(batch, patches, width)` to the next. `tape` carries the state before it."""
        grid, dtype = tape.grid, tape.dtype

        def attention_step(state: Tensor) -> tuple[Tensor, Tensor]:
            normed = self.norm1(state.to(dtype))
            residual = state if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
            if self.stride > 1:
                residual, _ = pooled(residual, self.prefix_length, grid, self.shortcut_pool)
            return residual, self.drop_path(self.attn(normed, grid)[0])

        def mlp_step(state: Tensor) -> tuple[Tensor, Tensor]:
            # A transition may change the dtype as well: with an fp32 CLS token, stage 1 is fp32 even in autocast.
            normed = self.norm2(state if self.changes_shape else state.to(dtype))
            residual = state if self.shortcut_proj_mlp is None else self.shortcut_proj_mlp(normed)
            return residual, self.drop_path(self.mlp(normed))

        hidden_states = tape.layer(self, (attention_step, mlp_step), hidden_states)
        tape.grid = (grid[0] // self.stride, grid[1] // self.stride)
        return hidden_states


class RevMViTEncoder(Encoder):
    """Runs the stages, which are modules with the names 0, 1, 2, …"""

    def __init__(self, config: RevMViTConfig):
        super().__init__(config)
        rates = iter(config.drop_path_rates())
        for i, shapes in enumerate(config.block_shapes()):
            blocks = nn.ModuleList(RevMViTLayer(config, shape, next(rates)) for shape in shapes)
            self.add_module(str(i), nn.ModuleDict({"blocks": blocks}))

    def stages(self) -> list[nn.ModuleList]:
        return [stage["blocks"] for stage in self.children() if isinstance(stage, nn.ModuleDict)]

    def forward(self, embeddings: Tensor, *, tape: Tape, **kwargs: Any) -> Tensor:
        side = self.config.image_size // PATCH
        tape.grid = (side, side)
        return super().forward(embeddings, tape=tape, **kwargs)


class RevMViTPreTrainedModel(ReversiblePreTrainedModel):
    config: RevMViTConfig
    config_class = RevMViTConfig
    base_model_prefix = "mvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_map = {
        "AutoConfig": "configuration_rev_mvit.RevMViTConfig",
        "AutoModel": "modeling_rev_mvit.RevMViTModel",
        "AutoModelForImageClassification": "modeling_rev_mvit.RevMViTForImageClassification",
    }
    _no_split_modules = ["RevMViTLayer"]
    _input_embed_layer = "patch_embed"
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": RevMViTAttention}
    _supports_sdpa = False  # relative positions are added to the scores
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):  # PyTorch's own initialization, as in timm
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("rel_pos_h", "rel_pos_w", "cls_token"):
                init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, key_mapping=None, **kwargs):
        """As in transformers. Checkpoints of timm load as well, and those of `TimmWrapperModel` and its heads."""
        mapping = {r"^timm_model\.": "", **(key_mapping or {})}
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, key_mapping=mapping, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers. Parameters get the names of this model, even if its checkpoint had other names."""
        super().save_pretrained(save_directory, is_main_process, **{"save_original_format": False, **kwargs})


class RevMViTModel(RevMViTPreTrainedModel):
    """MViTv2 (Li et al. 2021, arXiv 2112.01526) with reversible layers, as Rev-MViT in Zhu & Mangalam 2023.

    Blocks that pool or widen the hidden state are conventional at any beta.

    Example:
        >>> model = RevMViTModel.from_pretrained("timm/mvitv2_tiny.fb_in1k", beta=1 / 32)
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\.fc\."]

    def __init__(self, config: RevMViTConfig):
        super().__init__(config)
        width = config.stage_widths[0]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        self.patch_embed = RevMViTPatchEmbeddings(config)
        self.stages = RevMViTEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @property
    def encoder(self) -> RevMViTEncoder:
        return self.stages

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        """Map images `(batch, channels, size, size)` to states `(batch, patches, width)` of the last grid.

        If there is a CLS token, its state comes first and is the `pooler_output`, `(batch, width)`. Otherwise the mean of all
        states is.

        Raises:
            ValueError: no images are given, or they have another size or number of channels than the model was built for.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        embeddings = self.patch_embed(pixel_values)
        if self.cls_token is not None:
            embeddings = torch.cat((self.cls_token.expand(embeddings.shape[0], -1, -1), embeddings), dim=1)
        sequence_output = self.norm(self.encode(embeddings, **kwargs))
        pooled_output = sequence_output.mean(1) if self.cls_token is None else sequence_output[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)


class RevMViTForImageClassification(ForImageClassification, RevMViTPreTrainedModel):
    """MViTv2 with reversible layers and timm's classifier.

    Example:
        >>> model = RevMViTForImageClassification(RevMViTConfig(architecture="mvitv2_small", num_labels=10))
    """

    base_class = RevMViTModel
    base_options = {}

    def make_head(self, config: RevMViTConfig) -> None:
        self.num_labels = config.num_labels
        classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(config.hidden_dropout_prob), fc=classifier))

    def logits(self, outputs: Any) -> Tensor:
        return self.head(outputs.pooler_output)
