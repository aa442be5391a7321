"""Reversible Transformers for Hugging Face: train without stored activations."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_rev_mvit import RevMViTConfig
from .configuration_rev_roberta import RevRobertaConfig
from .configuration_rev_swin import RevSwinConfig
from .configuration_rev_vit import RevViTConfig
from .modeling_rev_mvit import RevMViTForImageClassification, RevMViTModel
from .modeling_rev_roberta import (
    RevRobertaForMaskedLM,
    RevRobertaForMultipleChoice,
    RevRobertaForQuestionAnswering,
    RevRobertaForSequenceClassification,
    RevRobertaForTokenClassification,
    RevRobertaModel,
)
from .modeling_rev_swin import (
    RevSwinBackbone,
    RevSwinForImageClassification,
    RevSwinForMaskedImageModeling,
    RevSwinModel,
)
from .modeling_rev_vit import RevViTForImageClassification, RevViTForMaskedImageModeling, RevViTModel
from .tools.callbacks import MemoryBudget
from .tools.convert import to_reversible, to_stock
from .tools.graphs import GraphedStep
from .tools.schedule import BetaSchedule
from .tools.verify import verify
from .version import __version__

for config in (RevRobertaConfig, RevViTConfig, RevSwinConfig, RevMViTConfig):
    AutoConfig.register(config.model_type, config)
for auto, model in (
    (AutoModel, RevRobertaModel),
    (AutoModelForMaskedLM, RevRobertaForMaskedLM),
    (AutoModelForSequenceClassification, RevRobertaForSequenceClassification),
    (AutoModelForTokenClassification, RevRobertaForTokenClassification),
    (AutoModelForQuestionAnswering, RevRobertaForQuestionAnswering),
    (AutoModelForMultipleChoice, RevRobertaForMultipleChoice),
    (AutoModel, RevSwinModel),
    (AutoModelForImageClassification, RevSwinForImageClassification),
    (AutoModelForMaskedImageModeling, RevSwinForMaskedImageModeling),
    (AutoBackbone, RevSwinBackbone),
    (AutoModel, RevViTModel),
    (AutoModelForImageClassification, RevViTForImageClassification),
    (AutoModelForMaskedImageModeling, RevViTForMaskedImageModeling),
    (AutoModel, RevMViTModel),
    (AutoModelForImageClassification, RevMViTForImageClassification),
):
    auto.register(model.config_class, model)


__all__ = [
    "BetaSchedule",
    "GraphedStep",
    "MemoryBudget",
    "RevMViTConfig",
    "RevMViTForImageClassification",
    "RevMViTModel",
    "RevRobertaConfig",
    "RevRobertaForMaskedLM",
    "RevRobertaForMultipleChoice",
    "RevRobertaForQuestionAnswering",
    "RevRobertaForSequenceClassification",
    "RevRobertaForTokenClassification",
    "RevRobertaModel",
    "RevSwinBackbone",
    "RevSwinConfig",
    "RevSwinForImageClassification",
    "RevSwinForMaskedImageModeling",
    "RevSwinModel",
    "RevViTConfig",
    "RevViTForImageClassification",
    "RevViTForMaskedImageModeling",
    "RevViTModel",
    "__version__",
    "to_reversible",
    "to_stock",
    "verify",
]
