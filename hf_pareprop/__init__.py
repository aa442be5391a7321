"""Reversible Transformers for Hugging Face: train without stored activations."""

from typing import Any

import transformers

from .tools.callbacks import MemoryBudget
from .tools.convert import to_reversible, to_stock
from .tools.families import FAMILIES
from .tools.graphs import GraphedStep
from .tools.schedule import BetaSchedule
from .tools.verify import verify
from .version import __version__

_FAMILY_CLASSES = {cls.__name__: cls for family in FAMILIES.values() for cls in family.public_classes}
globals().update(_FAMILY_CLASSES)

__all__ = [
    "BetaSchedule",
    "GraphedStep",
    "MemoryBudget",
    "__version__",
    "to_reversible",
    "to_stock",
    "verify",
    *_FAMILY_CLASSES,
]


def __getattr__(name: str) -> Any:
    """For type checkers, which do not see the classes of the families; called for names that are not there.

    Raises:
        AttributeError: always.
    """
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}.")


def register() -> None:
    """Tell the Auto classes of transformers about every family; again, if they know them already."""
    for family in FAMILIES.values():
        transformers.AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for auto, model in family.auto_classes.items():
            getattr(transformers, auto).register(family.config_class, model, exist_ok=True)


register()
