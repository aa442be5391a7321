"""Shifted windows over a grid of patches (Liu et al. 2021, arXiv 2103.14030, section 3.2)."""

import torch
from torch import Tensor

from .tape import Grid


def windows_of(image: Tensor, window: int) -> Tensor:
    """`(batch, rows, columns, width)` to `(batch * windows, patches, width)`."""
    windows = image.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return windows.transpose(2, 3).contiguous().flatten(3, 4).flatten(0, 2)


def image_of(windows: Tensor, window: int, grid: Grid) -> Tensor:
    """The inverse of :func:`windows_of`: `(batch * windows, patches, width)` to `(batch, rows, columns, width)`."""
    rows, columns = (size // window for size in grid)
    image = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3).contiguous()
    return image.view(-1, *grid, windows.shape[-1])


def shift_mask(grid: Grid, window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The attention mask of shifted windows, `(windows, patches, patches)`.

    It is -100 between patches of one window that are not neighbours in the image, and 0 elsewhere.
    """
    down, across = (torch.arange(size, device=device) for size in grid)
    regions = (
        (at >= size - window).int() + (at >= size - shift).int() for at, size in zip((down, across), grid, strict=True)
    )
    rows, columns = regions
    found = windows_of((3 * rows[:, None] + columns)[None, :, :, None], window).squeeze(-1)
    apart = found[:, None, :] != found[:, :, None]
    return apart.to(dtype).mul(-100.0)
