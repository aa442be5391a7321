"""Every reversible family as small random models and batches, from its row in `hf_pareprop.tools.families`."""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from hf_pareprop.tools import families
from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.contenders import Subject


def text_batch() -> dict[str, torch.Tensor]:
    """Three sentences of up to 11 tokens, two of them padded."""
    ids = torch.randint(4, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 4:] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 1), attention_mask=mask, labels=torch.tensor([0, 2, 1]))


def image_batch(size: int = 12) -> dict[str, torch.Tensor]:
    """Three square images; a ViT divides those of 12x12 pixels into 9 patches."""
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    return dict(pixel_values=pixels, labels=torch.tensor([0, 2, 1]))


@dataclass(frozen=True)
class Family:
    """A family for tests. Tests that build stock models are skipped if transformers has none for the family."""

    row: families.Family

    @property
    def config(self) -> type:
        return self.row.config_class

    @property
    def model(self) -> type:
        return self.row.classifier

    @property
    def has_stock(self) -> bool:
        return self.row.architectures[0].has_stock_classes

    @property
    def stock_model(self) -> type:
        if not self.has_stock:
            pytest.skip(f"transformers has no stock classes for {self.row.name}")
        return self.row.architectures[0].stock_class(self.model)

    @property
    def stock_config(self) -> type:
        return self.stock_model.config_class

    def build(
        self,
        depth: int = 3,
        dropout: float = 0.0,
        scale: float = 2.0,
        seed: int = 0,
        wider: int = 1,
        mlp_ratio: float | None = None,
        one_stage: bool = False,
        **fields,
    ):
        """A random model in training mode; weights are scaled up so that no branch is negligible.

        Args:
            one_stage: whether the model has only one stage, for tests that need layers that are all alike.
        """
        torch.manual_seed(seed)
        given = self.config_fields(depth, dropout, wider, mlp_ratio)
        if one_stage:
            small = self.row.small
            ratio = small.mlp_ratio if mlp_ratio is None else mlp_ratio
            given |= self.row.shape_fields(small._replace(width=wider * small.width, depths=(depth,), mlp_ratio=ratio))
        config = self.config(**{**given, **fields})
        model = self.model(config).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
        return model

    def build_stock(self, depth: int = 3, dropout: float = 0.0, seed: int = 0, **fields):
        torch.manual_seed(seed)
        return self.stock_model(self.stock_config(**{**self.config_fields(depth, dropout), **fields})).train()

    def config_fields(
        self, depth: int, dropout: float = 0.0, wider: int = 1, mlp_ratio: float | None = None
    ) -> dict[str, Any]:
        return self.row.small_config_fields(depth, dropout, wider, mlp_ratio)

    def subject(
        self, depth: int, dropout: float = 0.0, wider: int = 1, mlp_ratio: float | None = None, **fields
    ) -> Subject:
        """The model to train in comparisons of contenders."""
        return Subject(self.model, self.config(**{**self.config_fields(depth, dropout, wider, mlp_ratio), **fields}))

    def batch(self) -> dict[str, torch.Tensor]:
        return image_batch(self.row.small_fields["image_size"]) if self.row.takes_images else text_batch()

    def large_batch(self) -> dict[str, torch.Tensor]:
        """A batch of several hundred tokens or patches."""
        return resized(self.batch(), 6 if self.row.staged else 64)


FAMILIES = {name: Family(row) for name, row in families.FAMILIES.items()}


def rebuilt_steps(model, layers=None) -> list[tuple[int, int]]:
    """The steps that run again in the backward pass, as position and step. By default those of all layers.

    A layer that changes the shape of the hidden state has one step, and so has every layer with `steps="layer"`.
    """
    found = []
    for i, plan in enumerate(model.base_model.layer_plans):
        if not plan.stores_activations and (layers is None or i in layers):
            found += [(i, 0)] if plan.transition or plan.whole else [(i, 0), (i, 1)]
    return found


def linears(layer: nn.Module) -> list[nn.Linear]:
    """The linear layers within a layer: the last three end attention, begin the MLP and end it."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def put(layer: nn.Module, index: int, module: nn.Module) -> None:
    """Replace one of the linear layers within a layer."""
    old = linears(layer)[index]
    layer.set_submodule(next(name for name, found in layer.named_modules() if found is old), module)


def adaptable(model) -> list[str]:
    """The names of the linear layers that begin attention, for adapters."""
    (name, *_) = (n for n, m in model.encoder_layers[0].named_modules() if isinstance(m, nn.Linear))
    return [name.rpartition(".")[2]]


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


@contextmanager
def never_waiting():
    """A context in which it is an error if the host waits for CUDA."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Assert that every gradient is bit-equal. Gradients of embeddings may differ on CUDA, where kernels add in any order."""
    assert a.keys() == b.keys()
    in_any_order = {n for n in a if a[n].is_cuda and re.search("embed|wte|wpe", n)}
    for name in in_any_order:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    different = [n for n in a if n not in in_any_order and not torch.equal(a[n], b[n])]
    assert not different, f"gradients differ: {different[:5]} of {len(different)}"
