"""Check on real batches that a model rebuilds its states bit for bit, and has the gradients of plain autograd."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain import Pair
from ..modeling_reversible import ReversiblePreTrainedModel
from ..observer import Observer, observing
from ..plan import check_engine
from .wrapping import check_bare


@dataclass
class Report:
    """What :func:`verify` measured.

    Attributes:
        rebuilt: for each rebuilt layer, how many elements of its two input states were rebuilt with other bits. 0 means that
            they are bit-equal.
        largest: the largest absolute value of all states, and of what is added to them.
        limit: states have to stay below this limit, or the outputs are NaN.
        loss_equal: whether the loss is bit-equal to that of the ``autograd`` engine.
        gradient_error: the largest relative error of a parameter's gradient, compared with the ``autograd`` engine. The error
            is relative to the gradient's norm, but at least to a thousandth of the norm of all gradients.
        gradients_equal: whether all gradients are bit-equal.

    Example:
        >>> report = verify(model, batch)
        >>> assert report.exact and report.gradients_equal, report
    """

    rebuilt: dict[int, int] = field(default_factory=dict)
    largest: float = 0.0
    limit: float = math.inf
    loss_equal: bool = False
    gradient_error: float = float("nan")
    gradients_equal: bool = False

    @property
    def exact(self) -> bool:
        """Whether every state was rebuilt bit for bit and the loss is the reference's."""
        return self.loss_equal and not any(self.rebuilt.values())

    def __str__(self) -> str:
        wrong = sum(self.rebuilt.values())
        states = "bit-equal" if wrong == 0 else f"different in {wrong} elements"
        grads = "bit-equal" if self.gradients_equal else f"off by up to {self.gradient_error:.1e} (relative)"
        loss = "bit-equal" if self.loss_equal else "different"
        return (
            f"{len(self.rebuilt)} reversible layers: rebuilt states {states}, gradients {grads}, loss {loss}; "
            f"states up to {self.largest:.3g} of {self.limit:g}"
        )


class _Comparing(Observer):
    """Keeps the states that enter each layer, and compares the rebuilt states with them."""

    def __init__(self, report: Report):
        self._report = report
        self._begun: dict[int, Pair] = {}

    def layer_begins(self, position: int, pair: Pair, limit: float) -> None:
        self._begun[position] = pair[0].clone(), pair[1].clone()
        self._report.limit = min(self._report.limit, limit)

    def layer_rebuilt(self, position: int, pair: Pair) -> None:
        pairs = zip(pair, self._begun[position], strict=True)
        self._report.rebuilt[position] = sum(int((found != begun).sum()) for found, begun in pairs)

    def forward_ends(self, peak: Tensor, grid_bits: int | None) -> None:
        self._report.largest = peak.item() * 2.0 ** -(grid_bits or 0)


def verify(model: ReversiblePreTrainedModel, batch: Mapping[str, Any]) -> Report:
    """Run one training step twice, with the model's own engine and with ``autograd``, and compare.

    The model runs in its current mode (``train()`` or ``eval()``) and under the caller's autocast. Parameters, ``.grad`` and
    the global random number generators are left as they were. Both runs draw the same random numbers.

    Args:
        model: a reversible model.
        batch: the arguments of its forward, with tensors on its device. If there are labels the loss is differentiated,
            otherwise the sum of the first output.

    Returns:
        A report with the attributes ``exact``, ``rebuilt``, ``gradients_equal``, ``gradient_error``, ``loss_equal``,
        ``largest`` and ``limit``; as text, a line for people.

    Raises:
        TypeError: the model is compiled or wrapped.
        ValueError: the model is not reversible, or its engine is ``autograd``, which rebuilds nothing.
        RuntimeError: a layer was rebuilt with wrong states. Every training step checks that by itself.

    Example:
        >>> print(verify(model, batch))
        24 reversible layers: rebuilt states bit-equal, gradients bit-equal, loss bit-equal; states up to 3.66 of 16384
    """
    if not hasattr(model, "set_backward_engine"):  # some wrappers do not pass this attribute on
        check_bare(model)
        raise ValueError(
            f"{type(model).__name__} is not a reversible model: convert it with hf_pareprop.to_reversible."
        )
    engine = model.config.backward_engine
    check_engine(engine)
    if engine == "autograd":
        raise ValueError(
            "backward_engine='autograd' rebuilds nothing: choose the engine to verify, such as 'pareprop'."
        )
    report = Report()
    with observing(_Comparing(report)), torch.random.fork_rng():
        loss, gradients = _gradients(model, batch)
    try:
        model.set_backward_engine("autograd")
        with torch.random.fork_rng():
            reference_loss, reference = _gradients(model, batch)
    finally:
        model.set_backward_engine(engine)
    report.loss_equal = torch.equal(loss, reference_loss)
    same_names = gradients.keys() == reference.keys()
    report.gradients_equal = same_names and all(torch.equal(gradients[n], reference[n]) for n in reference)
    report.gradient_error = gradient_error(reference, gradients)
    return report


def gradient_error(reference: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    """The largest relative error over all parameters, in fp64. Infinite if the two have gradients for other parameters."""
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
