"""Reversible ViT: the modules of the stock model under their Hub names, its layers coupled reversibly."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rev_vit import RevViTConfig
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel, requested
from .tape import Tape


def height_and_width(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


class RevViTPatchEmbeddings(nn.Module):
    """Images `(batch, channels, height, width)` to patch embeddings `(batch, patches, hidden)`."""

    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.image_size = height_and_width(config.image_size)
        self.patch_size = height_and_width(config.patch_size)
        self.grid = tuple(i // p for i, p in zip(self.image_size, self.patch_size, strict=True))
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        channels = pixel_values.shape[1]
        if channels != self.projection.in_channels:
            raise ValueError(
                f"the images have {channels} channels, the model was built for {self.projection.in_channels}."
            )
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class RevViTEmbeddings(nn.Module):
    """CLS token, patch and position embeddings, and optionally DeiT's distillation token and a mask token."""

    def __init__(self, config: RevViTConfig, use_mask_token: bool = False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.distillation_token else None
        )
        self.prefix_length = 2 if config.distillation_token else 1
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.patch_embeddings = RevViTPatchEmbeddings(config)
        rows, columns = self.patch_embeddings.grid
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, self.prefix_length + rows * columns, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        batch, _, *size = pixel_values.shape
        expected = self.patch_embeddings.image_size
        if not interpolate_pos_encoding and tuple(size) != expected:
            raise ValueError(
                f"the images are {size[0]}x{size[1]}, the model was built for {expected[0]}x{expected[1]}: resize them, "
                "or pass interpolate_pos_encoding=True."
            )
        embeddings = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with a mask token: RevViTForMaskedImageModeling.")
            mask_tokens = self.mask_token.expand(batch, embeddings.shape[1], -1)
            mask = bool_masked_pos.unsqueeze(-1).type_as(mask_tokens)
            embeddings = embeddings * (1.0 - mask) + mask_tokens * mask
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
        patches = patches.reshape(1, *self.patch_embeddings.grid, -1).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((prefix, patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RevViTSelfAttention(nn.Module):
    """Multi-head self-attention through the attention interface of transformers."""

    def __init__(self, config: RevViTConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}."
            )
        self.config = config
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.dropout_prob = config.attention_probs_dropout_prob
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def attention_function(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """That of the configuration now; a layer hands it to its steps, so that a rebuild uses that of the forward pass."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, attend: Callable[..., Any], **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        output, weights = attend(
            self,
            self.query(hidden_states).view(heads).transpose(1, 2),
            self.key(hidden_states).view(heads).transpose(1, 2),
            self.value(hidden_states).view(heads).transpose(1, 2),
            attention_mask,
            dropout=self.dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class RevViTDense(nn.Module):
    """A linear layer and what follows it, under the name that checkpoints give it."""

    def __init__(self, in_features: int, out_features: int, then: nn.Module):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.then = then

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.then(self.dense(hidden_states))


class RevViTAttention(nn.Module):
    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.attention = RevViTSelfAttention(config)
        self.output = RevViTDense(config.hidden_size, config.hidden_size, nn.Dropout(config.hidden_dropout_prob))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        return self.output(self.attention(hidden_states, attention_mask, **kwargs)[0])


class RevViTLayer(nn.Module):
    """An attention step and an MLP step. Pre-LN: the residual is the state itself."""

    gradient_checkpointing = False
    """Set by transformers; a conventional layer honours it, a reversible one stores no activations in the first place."""

    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.attention = RevViTAttention(config)
        self.intermediate = RevViTDense(config.hidden_size, config.intermediate_size, activation(config.hidden_act))
        self.output = RevViTDense(config.intermediate_size, config.hidden_size, nn.Dropout(config.hidden_dropout_prob))
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tape: Tape, **kwargs) -> Tensor:
        """From one hidden state to the next, `(batch, patches, width)`; `tape` carries what travels beside it."""
        dtype = tape.dtype
        attend = self.attention.attention.attention_function()

        def attention_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return state, self.attention(self.layernorm_before(state.to(dtype)), mask, attend=attend, **kwargs)

        def mlp_step(state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return state, self.output(self.intermediate(self.layernorm_after(state.to(dtype))))

        return tape.layer(self, (attention_step, mlp_step), hidden_states, (attention_mask,))


def activation(name_or_module) -> nn.Module:
    return ACT2FN[name_or_module] if isinstance(name_or_module, str) else name_or_module


class RevViTEncoder(nn.Module):
    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(RevViTLayer(config) for _ in range(config.num_hidden_layers))
        self.hidden_state = HiddenState()

    def forward(self, embeddings: Tensor, attention_mask: Tensor | None, tape: Tape, **kwargs) -> Tensor:
        reads_each_layer = requested("output_hidden_states", self.config, kwargs)
        output, hidden_states = embeddings, tape.start(embeddings)
        for i, layer in enumerate(self.layer):
            hidden_states = layer(hidden_states, attention_mask, tape=tape, **kwargs)
            if reads_each_layer or i == len(self.layer) - 1:
                before, output = output, tape.finish(hidden_states)
                self.hidden_state(before, output)
        return output


class RevViTPooler(nn.Module):
    def __init__(self, config: RevViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = activation(config.pooler_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


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
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": RevViTSelfAttention}

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
        self.encoder = RevViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = RevViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

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
        """`(batch, channels, height, width)` images in, `(batch, 1 + patches, width)` states out, or 2 with a distillation token.

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
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask
        )
        sequence_output = self.layernorm(self.encode(embeddings, attention_mask, **kwargs))
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)


class RevViTForMaskedImageModeling(RevViTPreTrainedModel):
    """[`ViTForMaskedImageModeling`] (SimMIM) with reversible layers."""

    # The loss is a mean over masked pixels, which num_items_in_batch does not count: Trainer has to average.
    accepts_loss_kwargs = False

    def __init__(self, config: RevViTConfig):
        super().__init__(config)
        self.vit = RevViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """`bool_masked_pos` of shape `(batch, patches)` says which patches to mask and reconstruct.

        Raises:
            ValueError: `bool_masked_pos` is given and `patch_size` differs from `encoder_stride`.
        """
        config = self.config
        if bool_masked_pos is not None and config.patch_size != config.encoder_stride:
            raise ValueError(
                f"patch_size={config.patch_size} differs from encoder_stride={config.encoder_stride}: they have to be equal "
                "for bool_masked_pos, so that reconstructed and given images have the same size."
            )
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        patches = outputs.last_hidden_state[:, self.vit.embeddings.prefix_length :].transpose(1, 2)
        side = [s // p for s, p in zip(pixel_values.shape[2:], height_and_width(config.patch_size), strict=True)]
        reconstruction = self.decoder(patches.unflatten(2, side))
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, *side)
            mask = mask.repeat_interleave(config.patch_size, 1).repeat_interleave(config.patch_size, 2).unsqueeze(1)
            error = nn.functional.l1_loss(pixel_values, reconstruction, reduction="none")
            loss = (error * mask).sum() / (mask.sum() + 1e-5) / config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RevViTForImageClassification(RevViTPreTrainedModel):
    """[`ViTForImageClassification`] with reversible layers."""

    def __init__(self, config: RevViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = RevViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """`labels` of shape `(batch,)`."""
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
