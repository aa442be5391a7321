"""Every reversible family as small random models and batches. A new family joins the whole matrix by one line."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

import hf_pareprop as hp

TEXT = dict(vocab_size=61, hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=24)
TEXT |= dict(type_vocab_size=2, num_labels=3)
IMAGE = dict(image_size=12, patch_size=4, hidden_size=32, num_attention_heads=4, intermediate_size=64, num_labels=3)
IMAGE |= dict(encoder_stride=4)


def text_batch() -> dict[str, torch.Tensor]:
    """Three sentences of up to 11 tokens, two of them padded."""
    ids = torch.randint(4, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 4:] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 1), attention_mask=mask, labels=torch.tensor([0, 2, 1]))


def image_batch() -> dict[str, torch.Tensor]:
    """Three images of 12x12 pixels, 9 patches each."""
    pixels = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    return dict(pixel_values=pixels, labels=torch.tensor([0, 2, 1]))


class Family(NamedTuple):
    config: type
    model: type
    stock_config: type
    stock_model: type
    fields: dict[str, Any]
    batch: Callable[[], dict[str, torch.Tensor]]

    def build(self, depth: int = 3, dropout: float = 0.0, scale: float = 2.0, seed: int = 0, **fields):
        """A random model in training mode; weights are scaled up so that no branch is negligible."""
        torch.manual_seed(seed)
        model = self.model(self.config(**{**self.config_fields(depth, dropout), **fields})).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
        return model

    def build_stock(self, depth: int = 3, dropout: float = 0.0, seed: int = 0, **fields):
        torch.manual_seed(seed)
        return self.stock_model(self.stock_config(**{**self.config_fields(depth, dropout), **fields})).train()

    def config_fields(self, depth: int, dropout: float) -> dict[str, Any]:
        rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        return {**self.fields, **rates, "num_hidden_layers": depth}


FAMILIES = {
    "roberta": Family(
        hp.RevRobertaConfig,
        hp.RevRobertaForSequenceClassification,
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        TEXT,
        text_batch,
    ),
    "vit": Family(
        hp.RevViTConfig,
        hp.RevViTForImageClassification,
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        IMAGE,
        image_batch,
    ),
}


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def step(model, batch, engine: str | None = None, seed: int = 7, autocast: bool = False):
    """Loss, gradients by name and the state of the global generator after one training step."""
    if engine is not None:
        model.set_backward_engine(engine)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model), torch.get_rng_state()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit equality of every gradient."""
    assert a.keys() == b.keys()
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert not different, f"gradients differ: {different[:5]} of {len(different)}"


def assert_same_on_cuda(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Bit equality but where kernels add in any order: the gradients of embeddings."""
    assert found.keys() == reference.keys()
    for name, grad in reference.items():
        if "embeddings" in name:
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], grad), name
