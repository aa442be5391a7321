"""What callbacks of Trainer share, and the one that keeps graphs while there is memory."""

from typing import Any

from transformers import TrainerCallback

from ..modeling_reversible import ReversiblePreTrainedModel
from ..plan import parse_budget


def reversible_in(model: Any) -> ReversiblePreTrainedModel:
    """The reversible model in ``model``, which may be an adapter around it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if hasattr(module, "set_beta"):
            return module
    raise ValueError(f"{type(model).__name__} is not a reversible model.")


class MemoryBudget(TrainerCallback):
    """Keeps as many results of linear layers and graphs of layers as fit, instead of rebuilding them, while Trainer trains.

    The gradients are the same. Where everything fits nothing is rebuilt. The configuration, and with it every
    checkpoint, stays as it is: the budget belongs to a machine.

    Args:
        budget: "gradients", "auto", an amount such as "4GB", a part of the free memory such as "80%", or "4 layers"; see
            `memory_budget` of the configuration.

    Raises:
        ValueError: ``budget`` is none of these; at the start of training, if the model is not reversible.
    """

    def __init__(self, budget: str = "auto"):
        parse_budget(budget)
        self.budget = budget
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        reversible = reversible_in(model)
        self._before = reversible.base_model.retention
        reversible.set_memory_budget(self.budget)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        base: Any = reversible_in(model).base_model
        base.retention = self._before
