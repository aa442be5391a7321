"""Shifted windows over a grid of patches (Liu et al. 2021, arXiv 2103.14030, section 3.2)."""

import torch
from torch import Tensor

from .tape import Grid


def windows_of(image: Tensor, window: int) -> Tensor:
    """`(batch, rows, columns, width)` to `(batch * windows, patches, width)`."""
    windows = image.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return windows.transpose(2, 3).contiguous().flatten(3, 4).flatten(0, 2)


def image_of(windows: Tensor, window: int, grid: Grid) -> Tensor:
    """What :func:`windows_of` took apart."""
    rows, columns = (size // window for size in grid)
    image = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3).contiguous()
    return image.view(-1, *grid, windows.shape[-1])


def shift_mask(grid: Grid, window: int, shift: int, like: Tensor) -> Tensor:
    """-100 between patches of a shifted window that are no neighbours in the image, `(windows, patches, patches)`, else 0."""
    down, across = (torch.arange(size, device=like.device) for size in grid)
    regions = (
        (at >= size - window).int() + (at >= size - shift).int() for at, size in zip((down, across), grid, strict=True)
    )
    rows, columns = regions
    found = windows_of((3 * rows[:, None] + columns)[None, :, :, None], window).squeeze(-1)
    apart = found[:, None, :] != found[:, :, None]
    return apart.to(like.dtype).mul(-100.0)
