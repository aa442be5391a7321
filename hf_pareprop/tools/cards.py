"""Model cards: what a reversible checkpoint is, how it was trained, how to load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from yaml import YAMLError

from ..modeling_reversible import ReversiblePreTrainedModel
from ..version import __version__
from .records import layers_in_words, width_of

TEMPLATE = Path(__file__).with_name("card_template.md")

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}


INHERITED = ("license", "license_name", "license_link", "language")
"""The metadata of a base model's card that also hold for models derived from it."""


def model_card(
    model: ReversiblePreTrainedModel,
    *,
    model_name: str,
    base_model: str,
    dataset: str = "none yet",
    training: str = "none yet",
    accuracy: float | None = None,
    left_out: Sequence[str] = (),
    base_card: Path | None = None,
) -> ModelCard:
    """The card of a reversible model.

    Args:
        model_name: directory or Hub id to load it from.
        base_model: the checkpoint that was converted, or `trained from scratch`. A Hub id is also written as metadata.
        accuracy: between 0 and 1, on the test split of ``dataset``. It is also written as metadata.
        left_out: tensors of the base model that the reversible model has no place for.
        base_card: the base model's card, whose licence and languages are taken over if it exists.

    Example:
        >>> model_card(model, model_name="rev-vit", base_model="google/vit-base-patch16-224").save("rev-vit/README.md")
    """
    name, config = type(model).__name__, model.config
    auto_class = next((auto for auto, cls in model.auto_map.items() if cls.endswith("." + name)), "AutoModel")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists()
    task = _PIPELINES.get(auto_class)
    results = None
    if accuracy is not None and task is not None:
        kind = re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-")
        results = [EvalResult(task, kind, dataset, "accuracy", round(accuracy, 4), dataset_split="test")]
    data = ModelCardData(
        library_name="transformers",
        tags=list(model.model_tags or []),
        pipeline_tag=task,
        base_model=base_model if on_hub else None,
        model_name=model_name if results else None,
        eval_results=results,
        metrics=["accuracy"] if results else None,
        **_inherited(base_card),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        architecture=name.removeprefix("Rev"),
        class_name=name,
        auto_class=auto_class,
        package_version=__version__,
        base_model=base_model,
        license=data.license or "not stated by the base model",
        beta=config.beta,
        steps="whole layers" if config.steps == "layer" else "sub-blocks of layers",
        layers=layers_in_words(config),
        width=width_of(config),
        grid_bits=config.grid_bits,
        dataset=dataset,
        training=training,
        accuracy="not measured" if accuracy is None else f"{100 * accuracy:.1f} % on the test split",
        left_out=", ".join(left_out) or "nothing",
        kind="A decoder" if "AutoModelForCausalLM" in model.auto_map else "An encoder only",
    )


def _inherited(card: Path | None) -> dict[str, Any]:
    """The metadata that a model inherits from a base model's card. Empty if there is no card or it cannot be read."""
    if card is None or not card.is_file():
        return {}
    try:
        data = ModelCard.load(card).data.to_dict()
    except (ValueError, OSError, YAMLError):
        return {}
    return {name: data[name] for name in INHERITED if data.get(name)}


def training_card(
    model: ReversiblePreTrainedModel, *, training: TrainingArguments, dataset: str, base_model: str, accuracy: float
) -> ModelCard:
    """The card of a model that `Trainer` has trained with the arguments `training`."""
    length = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    description = (
        f"{length}, batch size {training.per_device_train_batch_size}, learning rate {training.learning_rate:g}, seed "
        f"{training.seed}, engine {model.config.backward_engine}"
    )
    return model_card(
        model,
        model_name=Path(str(training.output_dir)).name,
        base_model=base_model,
        dataset=dataset,
        training=description,
        accuracy=accuracy,
    )
