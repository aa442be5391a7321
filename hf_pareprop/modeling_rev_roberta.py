"""Reversible RoBERTa: the modules and parameter names of the stock model, its layers coupled reversibly."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rev_roberta import RevRobertaConfig
from .layer_call import named_parameters_of
from .modeling_reversible import HiddenState, ReversiblePreTrainedModel, requested
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
        # Padding takes no position, so a longer sequence may still fit; only then is the device asked.
        if length > limit and int(positions.max()) >= self.position_embeddings.num_embeddings:
            raise ValueError(
                f"a sequence has more than {limit} tokens (the inputs are {length} long) but the model has "
                f"{self.position_embeddings.num_embeddings} position embeddings, {self.padding_idx + 1} of them reserved: "
                "truncate the inputs."
            )
        return positions


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RevRobertaSelfAttention(nn.Module):
    """Multi-head self-attention through the attention interface of transformers."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}."
            )
        self.config = config
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

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
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class RevRobertaOutput(nn.Module):
    """Projection and dropout that end a sub-block. Its LayerNorm is applied by whoever reads the next state."""

    def __init__(self, config: RevRobertaConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class RevRobertaAttention(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.self = RevRobertaSelfAttention(config)
        self.output = RevRobertaOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        return self.output(self.self(hidden_states, attention_mask, **kwargs)[0])


class RevRobertaIntermediate(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = (
            ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class RevRobertaLayer(nn.Module):
    """An attention step and an MLP step. Post-LN: the LayerNorm that ends a step is applied by the step that reads it.

    So a layer returns the hidden state before its last LayerNorm, which the next layer applies. The norm's parameters travel
    there as tensors, because under FSDP2 a layer's own parameters are gone once the layer has run.
    """

    gradient_checkpointing = False
    """Set by transformers; a conventional layer honours it, a reversible one stores no activations in the first place."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = RevRobertaAttention(config)
        self.intermediate = RevRobertaIntermediate(config)
        self.output = RevRobertaOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tape: Tape, **kwargs) -> Tensor:
        """From one hidden state to the next, `(batch, length, width)`; `tape` carries what travels beside it."""
        norm_module, norm = tape.norm
        dtype = tape.dtype
        attend = self.attention.self.attention_function()

        def attention_step(state: Tensor, mask: Tensor | None, *norm: Tensor) -> tuple[Tensor, Tensor]:
            hidden_states = apply_norm(norm_module, norm, state.to(dtype))
            return hidden_states, self.attention(hidden_states, mask, attend=attend, **kwargs)

        def mlp_step(state: Tensor, mask: Tensor | None, *norm: Tensor) -> tuple[Tensor, Tensor]:
            hidden_states = self.attention.output.LayerNorm(state.to(dtype))
            return hidden_states, self.feed_forward(hidden_states)

        hidden_states = tape.layer(self, (attention_step, mlp_step), hidden_states, (attention_mask, *norm))
        own = self.output.LayerNorm
        tape.norm = own, tuple(p.clone() for p in named_parameters_of(own).values())
        return hidden_states

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        if self.chunk_size == 0:
            return self.output(self.intermediate(hidden_states))
        chunks = hidden_states.split(self.chunk_size, dim=1)
        return torch.cat([self.output(self.intermediate(chunk)) for chunk in chunks], dim=1)


def apply_norm(module: nn.Module | None, parameters: Sequence[Tensor], state: Tensor) -> Tensor:
    """`module`, with `parameters` for its own, applied to `state`; before the first layer there is none."""
    if module is None:
        return state
    if torch.jit.is_tracing():  # which functional_call refuses
        return module(state)
    names = named_parameters_of(module)
    if len(names) != len(parameters):
        raise RuntimeError(
            f"the LayerNorm that ends a RoBERTa layer had {len(parameters)} parameters in its layer and has {len(names)} in the "
            "next one, which applies it: FSDP1 and ZeRO-3 take parameters away where a layer ends. Use FSDP2 or ZeRO-2."
        )
    return functional_call(module, dict(zip(names, parameters, strict=True)), (state,))


class RevRobertaEncoder(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(RevRobertaLayer(config) for _ in range(config.num_hidden_layers))
        self.hidden_state = HiddenState()

    def forward(self, embeddings: Tensor, attention_mask: Tensor | None, tape: Tape, **kwargs) -> Tensor:
        reads_each_layer = requested("output_hidden_states", self.config, kwargs)
        output, hidden_states = embeddings, tape.start(embeddings)
        for i, layer in enumerate(self.layer):
            hidden_states = layer(hidden_states, attention_mask, tape=tape, **kwargs)
            if reads_each_layer or i == len(self.layer) - 1:
                before, output = output, apply_norm(*tape.norm, tape.finish(hidden_states))
                self.hidden_state(before, output)
        return output


class RevRobertaPooler(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


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
    _can_record_outputs = {"hidden_states": HiddenState, "attentions": RevRobertaSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RevRobertaLMHead):
            init.zeros_(module.bias)


class RevRobertaModel(RevRobertaPreTrainedModel):
    """[`RobertaModel`] with reversible layers."""

    def __init__(self, config: RevRobertaConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = RevRobertaEmbeddings(config)
        self.encoder = RevRobertaEncoder(config)
        self.pooler = RevRobertaPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

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
        """Arguments and shapes are those of [`RobertaModel`]; `(batch, length)` ids in, `(batch, length, width)` out.

        An encoder has no cache: `use_cache` is in the signature because every RoBERTa configuration sets it.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, or a sequence has more tokens than
                the model has positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeddings = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask
        )
        sequence_output = self.encode(embeddings, attention_mask, position_ids=position_ids, **kwargs)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output, pooler_output=pooled_output
        )


class RevRobertaLMHead(nn.Module):
    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(nn.functional.gelu(self.dense(features))))


class RevRobertaForMaskedLM(RevRobertaPreTrainedModel):
    """[`RobertaForMaskedLM`] with reversible layers."""

    _tied_weights_keys = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: RevRobertaConfig):
        super().__init__(config)
        self.roberta = RevRobertaModel(config, add_pooling_layer=False)
        self.roberta.logits_per_state = config.vocab_size
        self.lm_head = RevRobertaLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """`labels` of shape `(batch, length)`; -100 is ignored."""
        outputs = self.roberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RevRobertaClassificationHead(nn.Module):
    """Sentence-level classifier on the first token."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        hidden_states = torch.tanh(self.dense(self.dropout(features[:, 0, :])))
        return self.out_proj(self.dropout(hidden_states))


def classifier_dropout(config: RevRobertaConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class RevRobertaForSequenceClassification(RevRobertaPreTrainedModel):
    """[`RobertaForSequenceClassification`] with reversible layers."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RevRobertaModel(config, add_pooling_layer=False)
        self.classifier = RevRobertaClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`labels` of shape `(batch,)`, or `(batch, num_labels)` for regression and multi-label problems."""
        outputs = self.roberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RevRobertaForTokenClassification(RevRobertaPreTrainedModel):
    """[`RobertaForTokenClassification`] with reversible layers."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RevRobertaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """`labels` of shape `(batch, length)`; -100 is ignored."""
        outputs = self.roberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RevRobertaForQuestionAnswering(RevRobertaPreTrainedModel):
    """[`RobertaForQuestionAnswering`] with reversible layers."""

    def __init__(self, config: RevRobertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RevRobertaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """`start_positions` and `end_positions` of shape `(batch,)`; positions past the end are ignored."""
        outputs = self.roberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).split(1, dim=-1)
        start_logits, end_logits = start_logits.squeeze(-1).contiguous(), end_logits.squeeze(-1).contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RevRobertaForMultipleChoice(RevRobertaPreTrainedModel):
    """[`RobertaForMultipleChoice`] with reversible layers."""

    # transformers has no loss function for multiple choice that would divide by num_items_in_batch: Trainer has to.
    accepts_loss_kwargs = False

    def __init__(self, config: RevRobertaConfig):
        super().__init__(config)
        self.roberta = RevRobertaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Inputs of shape `(batch, choices, length)`, `labels` of shape `(batch,)`."""
        choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        outputs = self.roberta(
            flat(input_ids),
            attention_mask=flat(attention_mask),
            token_type_ids=flat(token_type_ids),
            position_ids=flat(position_ids),
            inputs_embeds=flat(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.to(logits.device))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
