"""How close two models are on real inputs, such as a converted model and its original, or a reversible model and its export."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel
from ..observer import Observer, observing
from ..plan import DEFAULT_GRID_BITS, MOST_GRID_BITS, LayerPlan

MARGIN = 8
"""A chosen grid has room for states this many times as large as the largest one on the given inputs."""


@dataclass(frozen=True)
class Fidelity:
    """What :func:`fidelity` measured.

    Attributes:
        inputs: the number of texts or images.
        cosine: the cosine between the last hidden states of the two models, averaged over tokens without padding.
        agreement: the fraction of predictions that are the same, counted per token for heads that predict per token;
            ``None`` for a model without a head.
        identical: whether all hidden states are bit-equal.
    """

    inputs: int
    cosine: float
    agreement: float | None
    identical: bool

    def __str__(self) -> str:
        states = "bit-equal" if self.identical else f"cosine {self.cosine:.4f}"
        agreement = "" if self.agreement is None else f", predictions the same in {100 * self.agreement:.1f} %"
        return f"{self.inputs} inputs: hidden states {states}{agreement}"


def fidelity(a: PreTrainedModel, b: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Fidelity:
    """Run both models on the same inputs, in evaluation mode, without gradients, and compare them.

    Raises:
        ValueError: there are no batches, or a model yields NaN or infinity.
    """
    cosines: list[Tensor] = []
    agreements: list[Tensor] = []
    inputs, identical, modes = 0, True, (a.training, b.training)
    a.eval(), b.eval()
    try:
        for batch in batches:
            with torch.no_grad():
                states, predictions = zip(*(_run(model, batch) for model in (a, b)), strict=True)
            inputs += len(states[0])
            mask = _tokens(batch, states[0])
            first, second = (s[mask].float() for s in states)
            for model, found in ((a, first), (b, second)):
                if not found.isfinite().all():
                    raise ValueError(
                        f"{type(model).__name__} yields NaN or infinity on these inputs, so there is nothing to compare: if it is "
                        "a reversible model, its states may have left their range (set a smaller grid_bits)."
                    )
            identical = identical and torch.equal(first, second)
            cosines.append(torch.cosine_similarity(first, second, dim=-1).cpu())
            for one, other in zip(*predictions, strict=True):
                same = one.argmax(-1) == other.argmax(-1)
                agreements.append((same[mask] if same.shape == mask.shape else same.flatten()).float().cpu())
    finally:
        a.train(modes[0]), b.train(modes[1])
    if not cosines:
        raise ValueError("there are no inputs to compare the models on.")
    agreement = torch.cat(agreements).mean().item() if agreements else None
    return Fidelity(inputs, torch.cat(cosines).mean().item(), agreement, identical)


def grid_bits_for(model: ReversiblePreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """Choose the finest grid with a range of eight times the largest state on these inputs.

    Returns:
        The number of bits, and the largest state.

    Raises:
        ValueError: no grid has this range.

    Example:
        >>> grid_bits_for(model, [batch])
        (20, 14.2)
    """
    config: Any = model.config
    before, training, given = config.grid_bits, model.training, list(batches)
    model.eval()
    try:
        for bits in range(DEFAULT_GRID_BITS, 0, -4):  # until a grid on which the states do not overflow
            config.grid_bits, peaks = bits, _Peaks()
            with torch.no_grad(), observing(peaks), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about overflow
                for batch in given:
                    model(**batch)
            largest = max(peaks.found, default=0.0)
            wide_enough = [b for b in range(1, MOST_GRID_BITS + 1) if MARGIN * largest < LayerPlan(1.0, b).limit]
            if largest < LayerPlan(1.0, bits).limit and wide_enough:
                return wide_enough[-1], largest
    finally:
        config.grid_bits = before
        model.train(training)
    raise ValueError("the states are too large for any grid on these inputs, or not finite: train the stock model.")


class _Peaks(Observer):
    def __init__(self) -> None:
        self.found: list[float] = []

    def forward_ends(self, peak: Tensor, grid_bits: int | None) -> None:
        self.found.append(peak.item() * 2.0 ** -(grid_bits or 0))


def _run(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states, and the predictions of the head."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        outputs = model(**batch)
    finally:
        hook.remove()
    return seen[-1], [outputs[name] for name in ("logits", "start_logits", "end_logits") if name in outputs]


def _tokens(batch: Mapping[str, Any], states: Tensor) -> Tensor:
    """Which of the states `(inputs, tokens, width)` do not belong to padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.reshape(states.shape[:2]).bool()
