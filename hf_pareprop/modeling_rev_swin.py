"""Reversible Swin: the modules of the stock model, with their names on the Hub, and layers that are coupled reversibly."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment,return-value,misc"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import (
    Dense,
    DropPath,
    Encoder,
    Layer,
    PatchEmbeddings,
    SelfAttention,
    activation,
    check_channels,
    height_and_width,
    map_of,
    masked,
    resized_positions,
)
from .configuration_rev_swin import RevSwinConfig
from .heads import (
    Backbone,
    ForImageClassification,
    ForMaskedImageModeling,
    StagedImageClassifierOutput,
    StagedMaskedImageModelingOutput,
    StagedModelOutput,
)
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel, requested
from .tape import Grid, Tape
from .windows import image_of, shift_mask, windows_of


class RevSwinPatchEmbeddings(PatchEmbeddings):
    """Pads images to whole patches."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = (-size % patch for size, patch in zip(pixel_values.shape[2:], self.patch_size, strict=True))
        return super().forward(nn.functional.pad(pixel_values, (0, width, 0, height)))


class RevSwinEmbeddings(nn.Module):
    """Patch embeddings, and optionally a mask token and absolute position embeddings."""

    def __init__(self, config: RevSwinConfig, use_mask_token: bool = False):
        super().__init__()
        patch_embeddings = RevSwinPatchEmbeddings(config, config.embed_dim)
        rows, columns = patch_embeddings.grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, rows * columns, config.embed_dim)) if config.use_absolute_embeddings else None
        )
        self.patch_embeddings = patch_embeddings
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        grid: Grid,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        embeddings = self.norm(self.patch_embeddings(pixel_values))
        if bool_masked_pos is not None:
            embeddings = masked(embeddings, bool_masked_pos, self.mask_token)
        if self.position_embeddings is not None:
            embeddings = embeddings + self._positions(grid, interpolate_pos_encoding)
        return self.dropout(embeddings)

    def _positions(self, grid: Grid, interpolate: bool | None) -> Tensor:
        own = self.patch_embeddings.grid
        if grid == own:
            return self.position_embeddings
        if not interpolate:
            raise ValueError(
                f"the images have {grid[0]}x{grid[1]} patches, the model has positions for {own[0]}x{own[1]}: resize the images, "
                "or pass interpolate_pos_encoding=True."
            )
        return resized_positions(self.position_embeddings, own, grid)


class RevSwinSelfAttention(SelfAttention):
    """Self-attention within windows, with a learned bias for every relative position."""

    def __init__(self, config: RevSwinConfig, width: int, heads: int):
        super().__init__(config, width, heads)
        self.window_size = config.window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window_size - 1) ** 2, heads))
        self.relative_position_index = nn.Buffer(self.relative_positions(), persistent=False)

    def relative_positions(self) -> Tensor:
        """For every two patches of a window, their row in the bias table: `(patches, patches)`."""
        side = torch.arange(self.window_size)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        apart = (axis[:, None] - axis[None, :] + self.window_size - 1 for axis in (rows, columns))
        down, across = apart
        return down * (2 * self.window_size - 1) + across

    def forward(self, windows: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """`windows` has the shape `(images * windows, patches, width)`. `mask`, `(windows, patches, patches)`, is added."""
        bias = (
            self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous().unsqueeze(0)
        )
        if mask is not None:
            images = windows.shape[0] // mask.shape[0]
            bias = bias + mask[None, :, None].expand(images, -1, -1, -1, -1).flatten(0, 1)
        return super().forward(windows, bias, **kwargs)


class RevSwinRecordedSelfAttention(RevSwinSelfAttention):
    """The self-attention of a stage's last layer. Its attention maps are recorded as those of the stage."""


class RevSwinAttention(nn.Module):
    def __init__(self, config: RevSwinConfig, width: int, heads: int, recorded: bool):
        super().__init__()
        self.self = (RevSwinRecordedSelfAttention if recorded else RevSwinSelfAttention)(config, width, heads)
        self.output = Dense(width, width, nn.Dropout(config.hidden_dropout_prob))

    def forward(self, windows: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        return self.output(self.self(windows, mask, **kwargs)[0])


class RevSwinLayer(Layer):
    """An attention step and an MLP step. Pre-LN: the residual is the state itself. Every second layer shifts the windows.

    As in the stock model, drop path acts on the attention step alone.
    """

    def __init__(
        self, config: RevSwinConfig, width: int, heads: int, *, shifted: bool, drop_path: float, recorded: bool
    ):
        super().__init__()
        self.window_size, self.shift_size = config.window_size, config.window_size // 2 if shifted else 0
        self.attention = RevSwinAttention(config, width, heads, recorded)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        inner = int(config.mlp_ratio * width)
        self.intermediate = Dense(width, inner, activation(config.hidden_act))
        self.output = Dense(inner, width, nn.Dropout(config.hidden_dropout_prob))
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: Tensor, *, tape: Tape, always_partition: bool = False, **kwargs) -> Tensor:
        """Map a hidden state `(batch, patches, width)` to the next. `tape.grid` has the numbers of rows and columns.

        Args:
            always_partition: whether to shift also a grid that is no larger than a window, and to pad a smaller one.

        Raises:
            ValueError: the grid is smaller than a window.
        """
        dtype, grid, window = tape.dtype, tape.grid, self.window_size
        if min(grid) < window and not always_partition:
            raise ValueError(
                f"a stage has {grid[0]}x{grid[1]} patches, fewer than a window of window_size={window} on a side: give larger "
                "images, or build the model with a smaller window_size or fewer stages."
            )
        shift = self.shift_size if always_partition or min(grid) > window else 0
        padded = tuple(size + -size % window for size in grid)
        mask = shift_mask(padded, window, shift, hidden_states.device, dtype) if shift else None
        attend = self.attention.self.attention_function()

        def attention_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            image = self.layernorm_before(state.to(dtype)).unflatten(1, grid)
            image = nn.functional.pad(image, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
            image = image.roll((-shift, -shift), (1, 2)) if shift else image
            windows = self.attention(windows_of(image, window), mask, attend=attend, **kwargs)
            image = image_of(windows, window, padded)
            image = image.roll((shift, shift), (1, 2)) if shift else image
            return state, self.drop_path(image[:, : grid[0], : grid[1]].flatten(1, 2))

        def mlp_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return state, self.output(self.intermediate(self.layernorm_after(state.to(dtype))))

        return tape.layer(self, (attention_step, mlp_step), hidden_states, (mask,))


class RevSwinPatchMerging(nn.Module):
    """Merges every four patches of a hidden state into one of twice the width. Odd grids are padded."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        image = hidden_states.unflatten(1, grid)
        image = nn.functional.pad(image, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        parts = [image[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1).flatten(1, 2)))


def merged(grid: Grid) -> Grid:
    """The grid after patch merging."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class RevSwinStage(nn.Module):
    def __init__(self, config: RevSwinConfig, stage: int):
        super().__init__()
        before, total = sum(config.depths[:stage]), sum(config.depths)
        width, depth = config.embed_dim * 2**stage, config.depths[stage]
        self.blocks = nn.ModuleList(
            RevSwinLayer(
                config,
                width,
                config.num_heads[stage],
                shifted=i % 2 == 1,
                drop_path=config.drop_path_rate * (before + i) / max(total - 1, 1),
                recorded=i == depth - 1,
            )
            for i in range(depth)
        )
        self.downsample = RevSwinPatchMerging(width) if stage < len(config.depths) - 1 else None


class RevSwinEncoder(Encoder):
    def __init__(self, config: RevSwinConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(RevSwinStage(config, stage) for stage in range(len(config.depths)))

    def stages(self) -> list[nn.ModuleList]:
        return [stage.blocks for stage in self.layers]

    def forward(
        self,
        embeddings: Tensor,
        grid: Grid,
        maps: list[Tensor] | None,
        *,
        tape: Tape,
        output_hidden_states_before_downsampling: bool = False,
        **kwargs,
    ) -> Tensor:
        """As in :class:`~blocks.Encoder`. Patches are merged between stages, and hidden states are recorded for each stage.

        Args:
            maps: a list to fill with the embeddings and the hidden state of every stage, as `(batch, width, rows, columns)`.
            output_hidden_states_before_downsampling: whether those are the states before patches are merged.
        """
        tape.grid = grid
        output, hidden_states = embeddings, tape.start(embeddings)
        found = [] if maps is None else [map_of(embeddings, grid)]  # only if asked for: maps stay in memory
        for stage in self.layers:
            for layer in stage.blocks:
                hidden_states = layer(hidden_states, tape=tape, **kwargs)
            before, output = output, tape.finish(hidden_states)
            if maps is not None:
                found.append(map_of(output, tape.grid))
            if stage.downsample is not None:
                output = hidden_states = tape.stage(stage.downsample(output, tape.grid))
                tape.grid = merged(tape.grid)
                if maps is not None and not output_hidden_states_before_downsampling:
                    found[-1] = map_of(output, tape.grid)
            self.hidden_state(before, output)
        if maps is not None:
            maps[:] = (found_map.contiguous() for found_map in found)
        return output


class RevSwinPreTrainedModel(ReversiblePreTrainedModel):
    config: RevSwinConfig
    config_class = RevSwinConfig
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_map = {
        "AutoConfig": "configuration_rev_swin.RevSwinConfig",
        "AutoModel": "modeling_rev_swin.RevSwinModel",
        "AutoModelForImageClassification": "modeling_rev_swin.RevSwinForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_rev_swin.RevSwinForMaskedImageModeling",
        "AutoBackbone": "modeling_rev_swin.RevSwinBackbone",
    }
    late_parameter = "self.relative_position_bias_table"
    _supports_flash_attn = False  # flash and flex attention do not support the learned bias of positions
    _supports_flex_attn = False
    _no_split_modules = ["RevSwinEmbeddings", "RevSwinLayer"]
    _keys_to_ignore_on_load_unexpected = [r"relative_position_index"]
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": RevSwinRecordedSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RevSwinEmbeddings):
            for parameter in (module.mask_token, module.position_embeddings):
                if parameter is not None:
                    init.zeros_(parameter)
        elif isinstance(module, RevSwinSelfAttention):
            init.zeros_(module.relative_position_bias_table)
            init.copy_(module.relative_position_index, module.relative_positions())


class RevSwinModel(RevSwinPreTrainedModel):
    """[`SwinModel`] with reversible layers."""

    def __init__(self, config: RevSwinConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = RevSwinEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = RevSwinEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
        self.post_init()

    def grid_of(self, size: tuple[int, int]) -> Grid:
        """The grid of patches of images of `size` pixels."""
        rows, columns = (
            -(-pixels // patch) for pixels, patch in zip(size, height_and_width(self.config.patch_size), strict=True)
        )
        return rows, columns

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> StagedModelOutput:
        """Map images `(batch, channels, height, width)` of any size to states `(batch, patches of the last stage, width)`.

        Raises:
            ValueError: no images are given, they have another number of channels than the model was built for, or a stage has
                fewer patches than a window.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        check_channels(pixel_values, self.config.num_channels)
        grid = self.grid_of(pixel_values.shape[2:])
        embeddings = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            grid,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        maps: list[Tensor] | None = [] if requested("output_hidden_states", self.config, kwargs) else None
        encoded = self._encoded(embeddings, grid, maps, **{**kwargs, "return_dict": True})
        sequence_output = self.layernorm(encoded.last_hidden_state)
        return StagedModelOutput(
            last_hidden_state=sequence_output,
            pooler_output=None if self.pooler is None else self.pooler(sequence_output.transpose(1, 2)).flatten(1),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            reshaped_hidden_states=None if maps is None else tuple(maps),
        )

    @capture_outputs(tie_last_hidden_states=False)
    def _encoded(self, *inputs, **kwargs) -> BaseModelOutput:
        """What the encoder returns, and the outputs that are recorded within it."""
        return BaseModelOutput(last_hidden_state=self.encode(*inputs, **kwargs))


class RevSwinForImageClassification(ForImageClassification, RevSwinPreTrainedModel):
    """[`SwinForImageClassification`] with reversible layers."""

    base_class = RevSwinModel
    base_options = {}
    output_class = StagedImageClassifierOutput

    def logits(self, outputs: StagedModelOutput) -> Tensor:
        return self.classifier(outputs.pooler_output)


class RevSwinForMaskedImageModeling(ForMaskedImageModeling, RevSwinPreTrainedModel):
    """[`SwinForMaskedImageModeling`] (SimMIM) with reversible layers."""

    base_class = RevSwinModel
    output_class = StagedMaskedImageModelingOutput

    def feature_map(self, outputs: StagedModelOutput, size: tuple[int, int]) -> Tensor:
        grid = self.swin.grid_of(size)
        for _ in self.config.depths[1:]:
            grid = merged(grid)
        return map_of(outputs.last_hidden_state, grid)


class RevSwinBackbone(Backbone, RevSwinPreTrainedModel):
    """[`SwinBackbone`] with reversible layers. As there, windows are shifted even if a stage is no larger than a window."""

    base_class = RevSwinModel
    base_arguments = {"always_partition": True, "output_hidden_states_before_downsampling": True}
    _keys_to_ignore_on_load_missing = [r"swin\.layernorm\."]
