"""The engines: whether steps are rebuilt in the backward pass, and when.

All of them run the same arithmetic on the same numbers and yield the same gradients: see :mod:`chain`.
"""

from collections.abc import Callable

import torch

from .lanes import Lane, inline_lane, side_lane
from .plan import check_engine


class Engine:
    """How reversible layers run, and how their gradients are computed.

    Attributes:
        rebuilds: whether layers are rebuilt in the backward pass, instead of storing their activations.
        lane: gives the lane of a device, which is the place where rebuilds run (see :mod:`lanes`).
    """

    rebuilds = True
    lane: Callable[[torch.device], Lane] = staticmethod(inline_lane)


class Autograd(Engine):
    """Store every activation and let autograd compute the gradients. This is the reference for the other two engines.

    Prefer it when memory is no concern, and where the others cannot work: attention maps as outputs, transforms of
    ``torch.func``.
    """

    rebuilds = False


class Reprop(Engine):
    """Store one pair of states per segment and rebuild the rest, step by step, on the caller's thread and stream.

    This engine needs the least memory: the activations of one step at a time, and ``m`` stored bits per element and step
    at ``beta = 2**-m``. It costs one more forward pass, like activation checkpointing.

    Gomez et al. 2017, arXiv 1707.04585, algorithm 1.
    """


class PaReprop(Engine):
    """Rebuild step ``i-1`` on another lane while the gradients of step ``i`` are computed.

    It does the same work on the same numbers as :class:`Reprop`, and keeps the activations of two steps at a time. It is
    faster where one step does not fill the device: with small batches, short sequences or narrow models.

    Zhu & Mangalam 2023, arXiv 2306.09342, section 3.2.
    """

    lane = staticmethod(side_lane)


ENGINES: dict[str, Engine] = {"autograd": Autograd(), "reprop": Reprop(), "pareprop": PaReprop()}


def get_engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        ValueError: no engine has that name.
    """
    check_engine(name)
    return ENGINES[name]
