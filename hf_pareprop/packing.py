"""Numbers of fewer than eight bits, packed into bytes."""

import torch
from torch import Tensor


def widths(bits: int) -> list[int]:
    """``bits`` as a sum of widths that fill bytes: 8, 4, 2 and 1."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def pack(values: Tensor, width: int) -> Tensor:
    """Pack small numbers into ``width / 8`` of their bytes. :func:`unpack` is the inverse.

    Args:
        values: numbers below ``2**width``, of dtype uint8 and any shape, contiguous or not.
        width: 1, 2, 4 or 8.
    """
    rows = _filled(values.reshape(-1), 8 // width)
    while len(rows) > 1:  # merge the two halves of the rows: the bits of the second half go above those of the first
        half = len(rows) // 2
        rows = torch.add(rows[:half], rows[half:], alpha=2 ** (half * width))
    return rows.view(-1)


def _filled(values: Tensor, rows: int) -> Tensor:
    """``values`` as a matrix of ``rows`` rows, filled up with zeros at the end."""
    missing = -len(values) % rows
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(rows, -1)


def unpack(packed: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Unpack what :func:`pack` returned, as numbers of ``shape``."""
    rows = packed.new_empty(8 // width, len(packed))
    for i, row in enumerate(rows):
        torch.bitwise_right_shift(packed, i * width, out=row)
    return rows.bitwise_and_(2**width - 1).view(-1)[: shape.numel()].view(shape)
