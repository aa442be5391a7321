"""How close two models are on real inputs: a conversion and its original, a reversible model and its export."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fidelity:
    """What :func:`fidelity` measured.

    Attributes:
        inputs: how many texts or images.
        cosine: mean over tokens (padding left out) of the cosine between the last hidden states of the two.
        agreement: the share of predictions that are the same, of a model that predicts; per token for heads that
            predict per token.
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
    """Run both on the same inputs, in evaluation mode, without gradients.

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
                        f"{type(model).__name__} yields NaN or infinity on these inputs, so there is nothing to compare: if it is a "
                        "reversible model, its states may have left their range (take fewer grid_bits)."
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


def _run(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states, and what the head predicts from them."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        outputs = model(**batch)
    finally:
        hook.remove()
    return seen[-1], [outputs[name] for name in ("logits", "start_logits", "end_logits") if name in outputs]


def _tokens(batch: Mapping[str, Any], states: Tensor) -> Tensor:
    """Which of the states `(inputs, tokens, width)` are not padding's."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.reshape(states.shape[:2]).bool()
