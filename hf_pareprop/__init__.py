"""Reversible Transformers for Hugging Face: train without stored activations."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .tools.callbacks import MemoryBudget
    from .tools.convert import to_reversible, to_stock
    from .tools.graphs import GraphedStep
    from .tools.schedule import BetaSchedule
    from .tools.verify import verify

__all__ = ["BetaSchedule", "GraphedStep", "MemoryBudget", "__version__", "to_reversible", "to_stock", "verify"]


def load() -> None:
    """Load all of the package and tell the Auto classes of transformers about it; done already if it was imported.

    The command `hf-pareprop` does so when it runs a command.
    """
    from .tools import callbacks, convert, families, graphs, schedule, verify

    classes = {cls.__name__: cls for family in families.FAMILIES.values() for cls in family.public_classes}
    globals().update(classes)
    for module in (callbacks, convert, graphs, schedule, verify):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})
    __all__.extend(name for name in classes if name not in __all__)
    register()


def register() -> None:
    """Tell the Auto classes of transformers about every family; again, if they know them already."""
    import transformers

    from .tools.families import FAMILIES

    for family in FAMILIES.values():
        transformers.AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for auto, model in family.auto_classes.items():
            getattr(transformers, auto).register(family.config_class, model, exist_ok=True)


def __getattr__(name: str) -> Any:
    """For names that are not there: an error, and for type checkers the classes of the families.

    Raises:
        AttributeError: always.
    """
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}.")


if Path(next(iter(getattr(sys, "argv", [])), "")).stem != "hf-pareprop":  # whose --help needs no PyTorch
    load()
