"""Reversible Transformers for Hugging Face: train without stored activations."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .tools.callbacks import MemoryBudget
    from .tools.convert import to_reversible, to_stock
    from .tools.graphed_trainer import GraphedTrainer
    from .tools.graphs import GraphedStep
    from .tools.schedule import BetaSchedule
    from .tools.verify import verify

__all__ = [
    "BetaSchedule",
    "GraphedStep",
    "GraphedTrainer",
    "MemoryBudget",
    "__version__",
    "to_reversible",
    "to_stock",
    "verify",
]


def load() -> None:
    """Load the whole package and register its classes with the Auto classes of transformers.

    Importing the package does this already. Only the command `hf-pareprop` does it later, when it runs a command.
    """
    from .tools import callbacks, convert, families, graphed_trainer, graphs, schedule, verify

    classes = {cls.__name__: cls for family in families.FAMILIES.values() for cls in family.public_classes}
    for architecture in families.STOCK_LAYERS.values():
        for model in architecture.heads.values():
            config_class: Any = model.config_class
            classes |= {cls.__name__: cls for cls in (model, config_class)}
    globals().update(classes)
    for module in (callbacks, convert, graphed_trainer, graphs, schedule, verify):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})
    __all__.extend(name for name in classes if name not in __all__)
    register()


def register() -> None:
    """Register every family with the Auto classes of transformers. It may be called more than once."""
    import transformers

    from .tools.families import FAMILIES, STOCK_LAYERS

    for architecture in STOCK_LAYERS.values():
        for model in architecture.heads.values():
            config_class: Any = model.config_class
            transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            for auto, path in model.auto_map.items():
                if path.endswith(f".{model.__name__}"):
                    getattr(transformers, auto).register(config_class, model, exist_ok=True)
    for family in FAMILIES.values():
        transformers.AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for auto, model in family.auto_classes.items():
            getattr(transformers, auto).register(family.config_class, model, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Raise a helpful error for a missing name. For type checkers it also stands for the classes of the families.

    Raises:
        AttributeError: always.
    """
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}.")


if Path(next(iter(getattr(sys, "argv", [])), "")).stem != "hf-pareprop":  # the command's --help needs no PyTorch
    load()
