"""What the callbacks of Trainer share, and the callback that keeps graphs while there is memory."""

from typing import Any

from transformers import TrainerCallback

from ..memory_probe import now_and_at_the_peak
from ..modeling_reversible import ReversiblePreTrainedModel, logger
from ..plan import parse_budget
from .records import size_in_words


def reversible_in(model: Any) -> ReversiblePreTrainedModel:
    """The reversible model in ``model``, which may be an adapter around it.

    Raises:
        ValueError: ``model`` holds no reversible model.
    """
    for module in model.modules():
        if hasattr(module, "set_beta"):
            return module
    raise ValueError(f"{type(model).__name__} is not a reversible model.")


class MemoryBudget(TrainerCallback):
    """While Trainer trains, keeps as many results of linear layers and graphs of layers as fit, instead of rebuilding them.

    The gradients are the same. If everything fits, nothing is rebuilt. The configuration and the checkpoints are not changed,
    because the budget depends on the machine. As soon as it is known what is kept, and again at the end of training, a line
    at level INFO tells it. The line also has the peak of memory, and about what plain training would need.

    Args:
        budget: "gradients", "auto", an amount such as "4GB", a part of the free memory such as "80%", or "4 layers"; see
            `memory_budget` of the configuration.

    Raises:
        ValueError: ``budget`` is none of these; at the start of training, if the model is not reversible.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[MemoryBudget("gradients")]).train()
    """

    def __init__(self, budget: str = "auto"):
        parse_budget(budget)
        self.budget = budget
        self._before: Any = None
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        reversible = reversible_in(model)
        self._before = reversible.layer_runner.retention
        reversible.keep_within(self.budget)
        self._told = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._told and (said := memory_in_words(reversible_in(model))) is not None:
            logger.info(said)
            self._told = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        reversible = reversible_in(model)
        if (said := memory_in_words(reversible)) is not None:
            logger.info(said)
        runner: Any = reversible.layer_runner
        runner.retention = self._before


def memory_in_words(model: ReversiblePreTrainedModel) -> str | None:
    """What a model keeps of its forward passes and how much memory it uses, in words; ``None`` while that is unknown.

    The prediction for plain training is what is in use between steps, plus the measured graphs of all layers or the
    gradients of all parameters, whichever is more.
    """
    runner: Any = model.layer_runner
    retention, plans = runner.retention, model.layer_plans
    if retention is None or retention.latest is None:
        return None
    kept, depth = retention.latest, len(plans)
    parts = [f"{kept.graphs} of {depth} layers keep their graphs"]
    if kept.linears:
        parts.append(f"{kept.linears} results of linear layers")
    said = f"memory: {' and '.join(parts)}"
    if (found := now_and_at_the_peak(model.device)) is None:
        return said + "."
    now, peak = found
    said += f"; the peak so far is {size_in_words(peak)}"
    graphs = retention.of_all_graphs(plans)
    if graphs is None:
        return said + "."
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return f"{said}, and plain training would need about {size_in_words(now + max(graphs, gradients))}."
