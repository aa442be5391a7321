"""Does a model rebuild its states bit for bit, and are its gradients those of plain autograd? Measured on real batches."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..coupling import enter
from ..engine import get_engine
from ..layer_call import Pair
from ..modeling_reversible import ReversiblePreTrainedModel
from ..plan import limit_of
from ..tape import Tape


@dataclass
class Report:
    """What :func:`verify` measured.

    Attributes:
        rebuilt: for each reversible layer, the largest absolute difference between its two input states as they were
            and as the backward pass rebuilt them; 0.0 means bit-equal.
        largest: the largest absolute value in the states that enter layers.
        limit: while they are below it, states are rebuilt exactly; 0 without a grid.
        loss_equal: whether the loss is bit-equal to that of the ``autograd`` engine.
        gradient_error: the largest relative error of a parameter's gradient against the ``autograd`` engine's; gradients
            below a thousandth of the whole are held against that.
        gradients_equal: whether all gradients are bit-equal.
    """

    rebuilt: dict[int, float] = field(default_factory=dict)
    largest: float = 0.0
    limit: float = math.inf
    loss_equal: bool = False
    gradient_error: float = float("nan")
    gradients_equal: bool = False

    @property
    def exact(self) -> bool:
        """Whether every state was rebuilt bit for bit and the loss is the reference's."""
        return self.loss_equal and all(difference == 0 for difference in self.rebuilt.values())

    def __str__(self) -> str:
        worst = max(self.rebuilt.values(), default=0.0)
        states = "bit-equal" if worst == 0 else f"off by up to {worst:.1e}"
        grads = "bit-equal" if self.gradients_equal else f"off by up to {self.gradient_error:.1e} (relative)"
        loss = "bit-equal" if self.loss_equal else "different"
        return (
            f"{len(self.rebuilt)} reversible layers: rebuilt states {states}, gradients {grads}, loss {loss}; "
            f"states up to {self.largest:.3g}, exact below {self.limit:g}"
        )


class _CheckingTape(Tape):
    """Keeps the states that enter each layer, and compares what the backward pass rebuilds with them."""

    def __init__(self, report: Report, tape: Tape):
        super().__init__(tape.engine, tape.plans)
        self.report = report
        self.entered: dict[int, Pair] = {}

    def layer(self, index, module, steps, previous, current, inputs=()) -> Pair:
        plan = self.plans[index]
        if plan.reversible:
            pair = (enter(previous, plan), enter(current, plan)) if plan.opens else (previous, current)
            self.entered[index] = pair[0].detach().clone(), pair[1].detach().clone()
            self.report.largest = max(
                self.report.largest, *(state.abs().max().item() for state in self.entered[index])
            )
            self.report.limit = min(self.report.limit, limit_of(plan, pair[0].dtype))
        return super().layer(index, module, steps, previous, current, inputs)

    def rebuilt(self, index: int, pair: Pair) -> None:
        super().rebuilt(index, pair)
        differences = [(a - b).abs().max().item() for a, b in zip(pair, self.entered[index], strict=True)]
        self.report.rebuilt[index] = max(differences)


def verify(model: ReversiblePreTrainedModel, batch: Mapping[str, Any]) -> Report:
    """Run one training step twice, with the model's own engine and with ``autograd``, and compare.

    The model runs in the mode it is in (``train()`` or ``eval()``) and under the caller's autocast; parameters,
    ``.grad`` and the global random number generators are left as they were. Both runs replay the same random numbers.

    Args:
        model: a reversible model.
        batch: the arguments of its forward, tensors on its device; with labels the loss is differentiated, without
            them the sum of the first output.

    Raises:
        ValueError: the model's engine is ``autograd``, which rebuilds nothing.
    """
    engine = model.config.backward_engine
    get_engine(engine)
    if engine == "autograd":
        raise ValueError(
            "backward_engine='autograd' rebuilds nothing: choose the engine to verify, such as 'pareprop'."
        )
    report = Report()
    base: Any = model.base_model
    new_tape = base.new_tape
    base.new_tape = lambda *args, **kwargs: _CheckingTape(report, new_tape(*args, **kwargs))
    try:
        loss, gradients = _replaying(partial(_gradients, model, batch))
        base.new_tape = new_tape
        model.set_backward_engine("autograd")
        reference_loss, reference = _replaying(partial(_gradients, model, batch))
    finally:
        base.__dict__.pop("new_tape", None)
        model.set_backward_engine(engine)
    report.loss_equal = torch.equal(loss, reference_loss)
    report.gradients_equal = all(torch.equal(gradients[n], reference[n]) for n in reference)
    report.gradient_error = gradient_error(reference, gradients)
    return report


def gradient_error(reference: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    """Largest relative error over parameters, in fp64; infinite if the two do not have the same ones."""
    if reference.keys() != gradients.keys():
        return float("inf")
    whole = sum(g.double().norm().item() ** 2 for g in reference.values()) ** 0.5
    if whole == 0:
        return max((g.double().norm().item() for g in gradients.values()), default=0.0)
    return max(
        (gradients[n].double() - g.double()).norm().item() / max(g.double().norm().item(), 1e-3 * whole)
        for n, g in reference.items()
    )


def _gradients(model: ReversiblePreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = model(**batch)
    loss = outputs.loss if outputs.get("loss") is not None else outputs[0].float().sum()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}


def _replaying(work):
    with torch.random.fork_rng():
        return work()
