"""Write a stock checkpoint as a reversible one, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling_reversible import ReversiblePreTrainedModel
from .architectures import Architecture
from .checkpoint import Loaded
from .convert import architecture_behind, reversible_structure, to_reversible
from .weights import write_shards


@dataclass
class Conversion:
    """The conversion of one checkpoint.

    Attributes:
        twin: the reversible model to write. It has a configuration, but no values.
        plan: the plan of the stock model, from :func:`~hf_pareprop.tools.checkpoint.plan_stock`.
        architecture: the architecture of the stock model.
        sources: maps the names of the twin's tensors to tensors of the stock model. Tied tensors are listed once.
        origins: maps tensors of the stock model to names in the stock checkpoint.
    """

    twin: ReversiblePreTrainedModel
    plan: Loaded
    architecture: Architecture
    sources: dict[str, str]
    origins: dict[str, str]

    @classmethod
    def of(cls, plan: Loaded, **fields: Any) -> "Conversion":
        """Plan the conversion of a stock model.

        Args:
            plan: the plan of the stock model.
            fields: fields of the reversible configuration, such as ``beta``.

        Raises:
            ValueError: a field is out of range, or the model has no reversible twin.
        """
        model = plan.model
        if isinstance(model, ReversiblePreTrainedModel):  # a model of timm: the plan is made of the twin itself
            twin = to_reversible(model, **fields)
            architecture, sources = architecture_behind(type(model), model.config), {n: n for n in model.state_dict()}
        else:
            twin, architecture, sources = reversible_structure(model, fields)
        for tied in getattr(twin, "all_tied_weights_keys", {}):
            sources.pop(tied, None)
        return cls(twin, plan, architecture, sources, plan.weights.origins(model))

    def write(self, folder: Path, max_shard_size: str, dtype: str = "auto") -> None:
        """Write what `save_pretrained` would write of the model, but hold one tensor at a time.

        Args:
            folder: the directory to write into.
            max_shard_size: the largest size of a file, such as `"5GB"`.
            dtype: the dtype of the tensors; `auto` leaves every tensor as it is.
        """
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        shapes = {name: self._tensor(name, self.plan.weights.shapes, wanted) for name in self.sources}
        self.twin.save_structure(folder, wanted or self.plan.weights.dtype(self.plan.model.config))
        size = sum(shape.numel() * shape.element_size() for shape in shapes.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
            for written in write_shards(folder, shapes, lambda name: self._read(name, wanted), max_shard_size):
                bar.update(written)

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        origin = self.origins[self.sources[name]]
        return self._tensor(name, {origin: self.plan.weights.tensor(origin)}, dtype)

    def _tensor(self, name: str, given: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        """A tensor of the twin, made from one of the checkpoint."""
        source = self.sources[name]
        found = self.architecture.to_reversible_tensor(source, given[self.origins[source]], self.plan.model.config)
        return found if dtype is None else found.to(dtype)
