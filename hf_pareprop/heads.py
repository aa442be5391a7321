"""The heads of text and image models, over the base model that a family names."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .blocks import height_and_width
from .modeling_reversible import ReversiblePreTrainedModel


class Head(ReversiblePreTrainedModel):
    """A model with a head. A subclass makes the head; a family's class names the base model.

    Attributes:
        base_class: the class of the base model, which becomes the attribute that `base_model_prefix` names.
        base_options: keyword arguments with which the base model is made.
        kind: the end of the stock class's name, by which transformers chooses the loss. The name of the class itself does
            not matter, so a subclass has the same loss as its parent.
    """

    base_class: ClassVar[Any]
    base_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    kind: ClassVar[str]

    def __init__(self, config: Any):
        super().__init__(config)
        self.loss_type = self.kind
        setattr(self, self.base_model_prefix, self.base_class(config, **self.base_options))
        self.make_head(config)
        self.post_init()

    def make_head(self, config: Any) -> None:
        """Set the modules of the head."""
        raise NotImplementedError


class ClassificationHead(Head):
    """A head with one label, one number or several labels per input."""

    def classification_loss(
        self, labels: Tensor, logits: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        """The stock loss, scaled to its share if Trainer accumulates the gradients of several batches.

        Args:
            labels: as in `forward`.
            logits: the output of the head.
            num_items_in_batch: the number of labels in all accumulated batches together. Trainer expects that the loss is
                divided by it, but the stock losses of regression and multi-label problems do not do that.
        """
        loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch, **kwargs)
        if num_items_in_batch is None or self.config.problem_type not in ("regression", "multi_label_classification"):
            return loss
        return loss * (labels.ne(-100).sum() / num_items_in_batch).to(loss.device)  # Trainer counts labels like this


def _recorded(outputs: Any) -> dict[str, Any]:
    """The hidden states and attention maps that a base model recorded."""
    names = ("hidden_states", "attentions", "reshaped_hidden_states")
    return {name: outputs[name] for name in names if name in outputs}


class TextHead(Head):
    """A head that reads the hidden states of tokens, or the pooled state."""

    output_class: ClassVar[Any]

    def logits(self, outputs: Any) -> Tensor:
        """The logits, from the output of the base model."""
        return self.classifier(self.dropout(outputs.last_hidden_state))

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)

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
    ) -> Any:
        """Arguments and outputs are those of the stock model.

        `labels` have the shape `(batch, length)`, and -100 is ignored. If the head reads one state per text, their shape is
        `(batch,)`, or `(batch, num_labels)` for regression and multi-label problems.
        """
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.logits(outputs)
        loss = None if labels is None else self.loss(logits, labels, **kwargs)
        return self.output_class(loss=loss, logits=logits, **_recorded(outputs))


def classifier_dropout(config: Any) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class LanguageModelHead(nn.Module):
    """Logits over the vocabulary. `decoder` is tied to the word embeddings."""

    def __init__(self, config: Any):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(nn.functional.gelu(self.dense(features))))


class ForMaskedLM(TextHead):
    kind = "ForMaskedLM"
    output_class = MaskedLMOutput

    def make_head(self, config: Any) -> None:
        self.base_model.logits_per_state = config.vocab_size
        self.lm_head = LanguageModelHead(config)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings

    def logits(self, outputs: Any) -> Tensor:
        return self.lm_head(outputs.last_hidden_state)

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)


class SentenceClassifier(nn.Module):
    """Classifies a text by its first token."""

    def __init__(self, config: Any):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = classifier_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        hidden_states = torch.tanh(self.dense(self.dropout(features[:, 0, :])))
        return self.out_proj(self.dropout(hidden_states))


class ForSequenceClassification(TextHead, ClassificationHead):
    kind = "ForSequenceClassification"
    output_class = SequenceClassifierOutput

    def make_head(self, config: Any) -> None:
        self.num_labels = config.num_labels
        self.classifier = SentenceClassifier(config)

    def logits(self, outputs: Any) -> Tensor:
        return self.classifier(outputs.last_hidden_state)

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.classification_loss(labels, logits, **kwargs)


class ForTokenClassification(TextHead):
    kind = "ForTokenClassification"
    output_class = TokenClassifierOutput

    def make_head(self, config: Any) -> None:
        self.num_labels = config.num_labels
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)


class ForMultipleChoice(TextHead):
    kind = "ForMultipleChoice"
    base_options = {}
    output_class = MultipleChoiceModelOutput

    # transformers' loss for multiple choice does not divide by num_items_in_batch, so Trainer has to.
    accepts_loss_kwargs = False

    def make_head(self, config: Any) -> None:
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)

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

        outputs = self.base_model(
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
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **_recorded(outputs))


class ForQuestionAnswering(TextHead):
    kind = "ForQuestionAnswering"

    def make_head(self, config: Any) -> None:
        self.num_labels = config.num_labels
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)

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
        """`start_positions` and `end_positions` have the shape `(batch,)`. Positions past the end of the text are ignored."""
        outputs = self.base_model(
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
            loss=loss, start_logits=start_logits, end_logits=end_logits, **_recorded(outputs)
        )


@dataclass
class StagedModelOutput(BaseModelOutputWithPooling):
    """Also has the hidden states of every stage as `(batch, width, rows, columns)`."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class StagedImageClassifierOutput(ImageClassifierOutput):
    """Also has the hidden states of every stage as `(batch, width, rows, columns)`."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class StagedMaskedImageModelingOutput(MaskedImageModelingOutput):
    """Also has the hidden states of every stage as `(batch, width, rows, columns)`."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


class ForImageClassification(ClassificationHead):
    kind = "ForImageClassification"
    output_class: ClassVar[Any] = ImageClassifierOutput

    def make_head(self, config: Any) -> None:
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()

    def logits(self, outputs: Any) -> Tensor:
        """The logits, from the CLS token in the output of the base model."""
        return self.classifier(outputs.last_hidden_state[:, 0, :])

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> Any:
        """`labels` of shape `(batch,)`, or `(batch, num_labels)` for regression and multi-label problems."""
        outputs = self.base_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.logits(outputs)
        loss = None if labels is None else self.classification_loss(labels, logits, **kwargs)
        return self.output_class(loss=loss, logits=logits, **_recorded(outputs))


class ForMaskedImageModeling(Head):
    """SimMIM: the head reconstructs the pixels of masked patches."""

    kind = "ForMaskedImageModeling"
    base_options = {"add_pooling_layer": False, "use_mask_token": True}
    output_class: ClassVar[Any] = MaskedImageModelingOutput

    # The loss is a mean over masked pixels. num_items_in_batch does not count those, so Trainer has to average.
    accepts_loss_kwargs = False

    def make_head(self, config: Any) -> None:
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )

    def feature_map(self, outputs: Any, size: tuple[int, int]) -> Tensor:
        """The last hidden state as `(batch, width, rows, columns)`, for images of `size` pixels."""
        rows, columns = (s // p for s, p in zip(size, height_and_width(self.config.patch_size), strict=True))
        patches = outputs.last_hidden_state[:, self.base_model.embeddings.prefix_length :]
        return patches.transpose(1, 2).unflatten(2, (rows, columns))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> Any:
        """`bool_masked_pos` of shape `(batch, patches)` says which patches to mask and reconstruct.

        Raises:
            ValueError: `bool_masked_pos` is given, and with `encoder_stride` the reconstruction has another size than the images.
        """
        outputs = self.base_model(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        size = pixel_values.shape[-2:]
        reconstruction = self.decoder(self.feature_map(outputs, size))
        loss = None if bool_masked_pos is None else self.loss(pixel_values, reconstruction, bool_masked_pos)
        return self.output_class(loss=loss, reconstruction=reconstruction, **_recorded(outputs))

    def loss(self, pixel_values: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor) -> Tensor:
        size, config = pixel_values.shape[-2:], self.config
        if reconstruction.shape[-2:] != size:
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels are reconstructed with {'x'.join(map(str, reconstruction.shape[-2:]))}: "
                f"encoder_stride={config.encoder_stride} has to lead back from patches of {config.patch_size} to pixels."
            )
        patch = height_and_width(config.patch_size)
        mask = bool_masked_pos.reshape(-1, *(s // p for s, p in zip(size, patch, strict=True)))
        mask = mask.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2).unsqueeze(1)
        error = nn.functional.l1_loss(pixel_values, reconstruction, reduction="none")
        return (error * mask).sum() / (mask.sum() + 1e-5) / config.num_channels


class Backbone(BackboneMixin, ReversiblePreTrainedModel):
    """Feature maps of the stages in `out_features`, for detectors for example.

    Attributes:
        base_class: the class of the base model.
        base_arguments: keyword arguments with which the base model is called.
    """

    base_class: ClassVar[Any]
    base_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_features = [config.embed_dim, *(config.embed_dim * 2**stage for stage in range(len(config.depths)))]
        setattr(self, self.base_model_prefix, self.base_class(config, add_pooling_layer=False))
        self.hidden_states_norms = nn.ModuleDict(
            {stage: nn.LayerNorm(width) for stage, width in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Return `feature_maps` of shape `(batch, width, rows, columns)`, one for each of `out_features`."""
        outputs = self.base_model(pixel_values, **self.base_arguments, **kwargs)
        feature_maps = tuple(
            self.hidden_states_norms[stage](found.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()
            for stage, found in zip(self.stage_names, outputs.reshaped_hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.reshaped_hidden_states, attentions=outputs.attentions
        )
