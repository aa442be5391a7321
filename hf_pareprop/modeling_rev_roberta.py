"""Reversible RoBERTa: the modules and parameter names of the stock model, with layers that are coupled reversibly."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import (
    Dense,
    Encoder,
    Layer,
    Pooler,
    SelfAttention,
    activation,
    apply_norm,
    attention_mask_for,
    refuse_decoder_inputs,
)
from .configuration_rev_roberta import RevRobertaConfig
from .heads import (
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
    LanguageModelHead,
)
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel
from .tape import Tape


class RevRobertaEmbeddings(nn.Module):
    """Word, position and token-type embeddings; positions count from `padding_idx + 1` and skip padding."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = self._positions(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros(inputs_embeds.shape[:-1], dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def _positions(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is None:
            batch, length = inputs_embeds.shape[:2]
            first = self.padding_idx + 1
            positions = torch.arange(first, first + length, device=inputs_embeds.device).expand(batch, length)
        else:
            tokens = input_ids.ne(self.padding_idx).int()
            positions = (torch.cumsum(tokens, dim=1).type_as(tokens) * tokens).long() + self.padding_idx
            length = input_ids.shape[1]
        limit = self.position_embeddings.num_embeddings - self.padding_idx - 1
        # Padding takes no position, so a longer sequence may still fit. Only then the value is read from the device.
        if length > limit and int(positions.max()) >= self.position_embeddings.num_embeddings:
            raise ValueError(
                f"a sequence has more than {limit} tokens (the inputs are {length} long) but the model has "
                f"{self.position_embeddings.num_embeddings} position embeddings, {self.padding_idx + 1} of them reserved: "
                "truncate the inputs."
            )
        return positions


class RevRobertaSelfAttention(SelfAttention):
    softmax_in_fp32 = False


class RevRobertaOutput(Dense):
    """The projection and the dropout that end a sub-block. This layer or the next one applies the LayerNorm."""

    def __init__(self, config: RevRobertaConfig, in_features: int):
        super().__init__(in_features, config.hidden_size, nn.Dropout(config.hidden_dropout_prob))
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class RevRobertaAttention(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.self = RevRobertaSelfAttention(config, config.hidden_size, config.num_attention_heads)
        self.output = RevRobertaOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        return self.output(self.self(hidden_states, attention_mask, **kwargs)[0])


class RevRobertaLayer(Layer):
    """An attention step and an MLP step. Post-LN: the next step applies the LayerNorm that ends a step.

    So a layer returns the hidden state before its last LayerNorm, and the next layer applies that norm. The norm's parameters
    are passed on as tensors, because under FSDP2 a layer's own parameters are gone once the layer has run. With
    `steps="layer"` a layer applies all of its norms, and returns the hidden state of the stock layer.
    """

    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = RevRobertaAttention(config)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, activation(config.hidden_act))
        self.output = RevRobertaOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tape: Tape, **kwargs) -> Tensor:
        """Map a hidden state `(batch, length, width)` to the next. `tape` carries the state before it."""
        dtype, (norm_before, norm_parameters) = tape.dtype, tape.norm
        attend = self.attention.self.attention_function()

        def attention_step(state: Tensor, mask: Tensor | None, *norm: Tensor) -> tuple[Tensor, Tensor]:
            hidden_states = apply_norm(norm_before, norm, state.to(dtype))
            return hidden_states, self.attention(hidden_states, mask, attend=attend, **kwargs)

        def mlp_step(state: Tensor, mask: Tensor | None, *norm: Tensor) -> tuple[Tensor, Tensor]:
            hidden_states = self.attention.output.LayerNorm(state.to(dtype))
            return hidden_states, self.feed_forward(hidden_states)

        inputs = attention_mask, *norm_parameters
        return tape.layer(self, (attention_step, mlp_step), hidden_states, inputs, self.output.LayerNorm)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        if self.chunk_size == 0:
            return self.output(self.intermediate(hidden_states))
        chunks = hidden_states.split(self.chunk_size, dim=1)
        return torch.cat([self.output(self.intermediate(chunk)) for chunk in chunks], dim=1)


class RevRobertaEncoder(Encoder):
    def finish(self, hidden_states: Tensor, tape: Tape) -> Tensor:
        return apply_norm(*tape.norm, tape.finish(hidden_states))


class RevRobertaPreTrainedModel(ReversiblePreTrainedModel):
    config: RevRobertaConfig
    config_class = RevRobertaConfig
    base_model_prefix = "roberta"
    auto_map = {
        "AutoConfig": "configuration_rev_roberta.RevRobertaConfig",
        "AutoModel": "modeling_rev_roberta.RevRobertaModel",
        "AutoModelForMaskedLM": "modeling_rev_roberta.RevRobertaForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_rev_roberta.RevRobertaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_rev_roberta.RevRobertaForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_rev_roberta.RevRobertaForQuestionAnswering",
        "AutoModelForMultipleChoice": "modeling_rev_roberta.RevRobertaForMultipleChoice",
    }
    _no_split_modules = ["RevRobertaEmbeddings", "RevRobertaLayer"]
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": RevRobertaSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LanguageModelHead):
            init.zeros_(module.bias)


class RevRobertaModel(RevRobertaPreTrainedModel):
    """[`RobertaModel`] with reversible layers."""

    def __init__(self, config: RevRobertaConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = RevRobertaEmbeddings(config)
        self.encoder = RevRobertaEncoder(config, RevRobertaLayer)
        self.pooler = Pooler(config.hidden_size, config.hidden_size, "tanh") if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Map ids `(batch, length)` to states `(batch, length, width)`. The arguments are those of [`RobertaModel`].

        An encoder has no cache. `use_cache` is in the signature because every RoBERTa configuration sets it.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, a sequence has more tokens than the
                model has positions, or an input is given that only decoders use.
        """
        refuse_decoder_inputs(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeddings = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        attention_mask = attention_mask_for(self.config, embeddings, attention_mask)
        sequence_output = self.encode(embeddings, attention_mask, position_ids=position_ids, **kwargs)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output, pooler_output=pooled_output
        )


class RevRobertaForMaskedLM(ForMaskedLM, RevRobertaPreTrainedModel):
    """[`RobertaForMaskedLM`] with reversible layers."""

    base_class = RevRobertaModel
    _tied_weights_keys = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


class RevRobertaForSequenceClassification(ForSequenceClassification, RevRobertaPreTrainedModel):
    """[`RobertaForSequenceClassification`] with reversible layers."""

    base_class = RevRobertaModel


class RevRobertaForTokenClassification(ForTokenClassification, RevRobertaPreTrainedModel):
    """[`RobertaForTokenClassification`] with reversible layers."""

    base_class = RevRobertaModel


class RevRobertaForQuestionAnswering(ForQuestionAnswering, RevRobertaPreTrainedModel):
    """[`RobertaForQuestionAnswering`] with reversible layers."""

    base_class = RevRobertaModel


class RevRobertaForMultipleChoice(ForMultipleChoice, RevRobertaPreTrainedModel):
    """[`RobertaForMultipleChoice`] with reversible layers."""

    base_class = RevRobertaModel
