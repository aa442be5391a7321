"""Reversible ViT: the modules of the stock model, with their names on the Hub, and layers that are coupled reversibly."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import (
    Dense,
    Encoder,
    Layer,
    PatchEmbeddings,
    Pooler,
    SelfAttention,
    activation,
    attention_mask_for,
    check_channels,
    masked,
    resized_positions,
)
from .configuration_rev_vit import RevViTConfig
from .heads import ForImageClassification, ForMaskedImageModeling
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel
from .tape import Tape


class RevViTEmbeddings(nn.Module):
    """CLS token, patch and position embeddings, and optionally DeiT's distillation token and a mask token."""

    def __init__(self, config: RevViTConfig, use_mask_token: bool = False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.prefix_length = 2 if config.distillation_token else 1
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.patch_embeddings = PatchEmbeddings(config, config.hidden_size)
        rows, columns = self.patch_embeddings.grid
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, self.prefix_length + rows * columns, config.hidden_size)
        )
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.distillation_token else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        check_channels(pixel_values, self.patch_embeddings.projection.in_channels)
        batch, _, *size = pixel_values.shape
        expected = self.patch_embeddings.image_size
        if not interpolate_pos_encoding and tuple(size) != expected:
            raise ValueError(
                f"the images are {size[0]}x{size[1]}, the model was built for {expected[0]}x{expected[1]}: resize them, "
                "or pass interpolate_pos_encoding=True."
            )
        embeddings = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            embeddings = masked(embeddings, bool_masked_pos, self.mask_token)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        embeddings = torch.cat((*(token.expand(batch, -1, -1) for token in prefix), embeddings), dim=1)
        positions = self._interpolated(size) if interpolate_pos_encoding else self.position_embeddings
        return self.dropout(embeddings + positions)

    def _interpolated(self, size: list[int]) -> Tensor:
        """Position embeddings for images of another size, by bicubic interpolation over the grid of patches."""
        if tuple(size) == self.patch_embeddings.image_size:
            return self.position_embeddings
        grid = [s // p for s, p in zip(size, self.patch_embeddings.patch_size, strict=True)]
        prefix, patches = self.position_embeddings.tensor_split((self.prefix_length,), dim=1)
        return torch.cat((prefix, resized_positions(patches, self.patch_embeddings.grid, grid)), dim=1)


class RevViTAttention(nn.Module):
    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.attention = SelfAttention(config, config.hidden_size, config.num_attention_heads)
        self.output = Dense(config.hidden_size, config.hidden_size, nn.Dropout(config.hidden_dropout_prob))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        return self.output(self.attention(hidden_states, attention_mask, **kwargs)[0])


class RevViTLayer(Layer):
    """An attention step and an MLP step. Pre-LN: the residual is the state itself."""

    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.attention = RevViTAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, activation(config.hidden_act))
        self.output = Dense(config.intermediate_size, config.hidden_size, nn.Dropout(config.hidden_dropout_prob))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tape: Tape, **kwargs) -> Tensor:
        """Map a hidden state `(batch, patches, width)` to the next. `tape` carries the state before it."""
        dtype = tape.dtype
        attend = self.attention.attention.attention_function()

        def attention_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return state, self.attention(self.layernorm_before(state.to(dtype)), mask, attend=attend, **kwargs)

        def mlp_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return state, self.output(self.intermediate(self.layernorm_after(state.to(dtype))))

        return tape.layer(self, (attention_step, mlp_step), hidden_states, (attention_mask,))


class RevViTPreTrainedModel(ReversiblePreTrainedModel):
    config: RevViTConfig
    config_class = RevViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_map = {
        "AutoConfig": "configuration_rev_vit.RevViTConfig",
        "AutoModel": "modeling_rev_vit.RevViTModel",
        "AutoModelForImageClassification": "modeling_rev_vit.RevViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_rev_vit.RevViTForMaskedImageModeling",
    }
    _no_split_modules = ["RevViTEmbeddings", "RevViTLayer"]
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": SelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RevViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
            for token in (module.mask_token, module.distillation_token):
                if token is not None:
                    init.zeros_(token)


class RevViTModel(RevViTPreTrainedModel):
    """[`ViTModel`] with reversible layers."""

    def __init__(self, config: RevViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = RevViTEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = Encoder(config, RevViTLayer)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = (
            Pooler(config.hidden_size, config.pooler_output_size, config.pooler_act) if add_pooling_layer else None
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Map images `(batch, channels, height, width)` to states `(batch, 1 + patches, width)`; 2 with a distillation token.

        Raises:
            ValueError: no images are given, or they have another size or number of channels than the model was built for.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        embeddings = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        attention_mask = attention_mask_for(self.config, embeddings, attention_mask)
        sequence_output = self.layernorm(self.encode(embeddings, attention_mask, **kwargs))
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)


class RevViTForImageClassification(ForImageClassification, RevViTPreTrainedModel):
    """[`ViTForImageClassification`] with reversible layers."""

    base_class = RevViTModel


class RevViTForMaskedImageModeling(ForMaskedImageModeling, RevViTPreTrainedModel):
    """[`ViTForMaskedImageModeling`] (SimMIM) with reversible layers."""

    base_class = RevViTModel
