"""Pooling over a grid of patches, and distances between grids that were pooled differently (MViTv2, section 4.1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .tape import Grid


def pooled(states: Tensor, prefix_length: int, grid: Grid, pool: Callable[[Tensor], Tensor]) -> tuple[Tensor, Grid]:
    """Pool patches `(..., patches, width)` to a coarser grid. Returns them and that grid.

    The first `prefix_length` tokens, such as a CLS token, are not pooled.
    """
    prefix, patches = states[..., :prefix_length, :], states[..., prefix_length:, :]
    planes = pool(patches.reshape(-1, *grid, states.shape[-1]).permute(0, 3, 1, 2).contiguous())
    patches = planes.reshape(*states.shape[:-2], states.shape[-1], -1).transpose(-1, -2)
    rows, columns = planes.shape[2:]
    return torch.cat((prefix, patches), dim=-2) if prefix_length else patches, (rows, columns)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """Indices `(queries, keys)` into a table of relative positions, for every query and key along one axis.

    Distances are in steps of the finer of the two grids.
    """
    query_step, key_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    at_query = torch.arange(queries, device=device, dtype=torch.float32).unsqueeze(-1) * query_step
    at_key = torch.arange(keys, device=device, dtype=torch.float32).unsqueeze(0) * key_step
    return (at_query - at_key + (keys - 1) * key_step).long()
