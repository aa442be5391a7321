"""Change the coupling while a model is trained: towards the stock model, or away from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..plan import betas_per_layer
from .callbacks import reversible_in

HALVINGS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 0.0)


class BetaSchedule(TrainerCallback, ExportableState):
    """A callback of Trainer that limits every layer's `beta`, in stages of the training.

    `BetaSchedule.anneal()` is the way back to the stock model: at the end of the training the weights belong to
    `beta=0`, so that `to_stock` and `hf-pareprop export` give a model that computes the same. At 0 activations are
    stored, so the last stage needs the memory of plain training. A last cap above 0, such as 1/16, avoids that and leaves a
    small difference. The last step is always in the last stage, even if there are few steps.

    Args:
        caps: maps a fraction of the training (0 to 1) to the largest `beta` of any layer from there on. A layer whose
            own `beta` is smaller keeps it, so conventional layers stay conventional.

    Raises:
        ValueError: a fraction or a cap is out of range. Also at the start of training with `load_best_model_at_end`, which
            would load weights of one stage into a model with the coupling of another.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[BetaSchedule.anneal(start=0.5)]).train()
        >>> stock = to_stock(model)  # computes what the trained model computes
    """

    def __init__(self, caps: Mapping[float, float]):
        caps = {float(fraction): cap for fraction, cap in caps.items()}  # a checkpoint has strings as keys
        for fraction in caps:
            if not 0 <= fraction <= 1:
                raise ValueError(f"{fraction!r} is not a fraction of the training: give a number from 0 to 1.")
        betas_per_layer(list(caps.values()), len(caps))
        self.caps = dict(sorted(caps.items()))
        self._own: tuple[float, ...] = ()

    @classmethod
    def anneal(cls, start: float = 0.5, caps: Sequence[float] = HALVINGS) -> "BetaSchedule":
        """A schedule with stages of equal length, from the fraction `start` of the training to its end.

        Args:
            start: the fraction of the training at which the first cap begins.
            caps: the largest `beta` of each stage, by default 1/4, 1/8, 1/16, 1/32 and 0.

        Example:
            >>> BetaSchedule.anneal(start=0.8, caps=[1 / 4, 1 / 16])
        """
        return cls({start + i * (1 - start) / len(caps): cap for i, cap in enumerate(caps)})

    def beta(self, progress: float) -> float | list[float]:
        """`beta` at a fraction of the training: one number if all layers have the same, otherwise one per layer."""
        cap = next((cap for fraction, cap in reversed(self.caps.items()) if fraction <= progress), 1.0)
        betas = [min(beta, cap) for beta in self._own]
        return betas[0] if len(set(betas)) == 1 else betas

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True puts the weights of one stage into the coupling of another: turn it off, or "
                "train without BetaSchedule."
            )
        reversible = reversible_in(model)
        config = reversible.config
        own: Any = self._own_betas_in(state) or config.beta
        self._own = betas_per_layer(own, sum(config.stage_depths))
        for fraction in self.caps:  # so that an impossible stage is refused now, and not in the middle of the training
            reversible.set_beta(self.beta(fraction))
        reversible.set_beta(own)

    def state(self) -> dict[str, Any]:
        """What Trainer saves with a checkpoint: the caps and the layers' own betas. The saved model has those of a stage."""
        return {"args": {"caps": self.caps}, "attributes": {"_own": list(self._own)}}

    def _own_betas_in(self, state: Any) -> list[float] | None:
        """The betas that the layers had at the start of the training that is resumed here."""
        if not state.global_step:
            return None
        found = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        own: list[float] | None = found.get("attributes", {}).get("_own") if isinstance(found, dict) else None
        return own or None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        last = state.global_step + 1 >= state.max_steps
        reversible, beta = reversible_in(model), self.beta(1.0 if last else state.global_step / state.max_steps)
        if reversible.config.beta != beta:
            reversible.set_beta(beta)
