"""Which layers are not rebuilt at all: the last ones, whose graphs are kept from the forward pass while memory allows.

Rebuilding a layer costs another forward of it, so it is done for as few layers as memory asks for. The backward pass
begins with the last layers: what they keep is the first to be freed, before the gradients of all parameters exist.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")
Shape = tuple[torch.Size, torch.dtype, bool]
"""Of the embeddings, their dtype, and whether in autocast."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what "auto" takes: fragments get lost on CUDA, and others want a share of a CPU's."""

WARM_UPS = 2
"""Steps before free memory is looked at: after the first one the optimizer has its state, so the second is typical."""

MEMINFO = Path("/proc/meminfo")


def check_retention(layers: int, budget: str | int | float | None) -> None:
    """
    Raises:
        ValueError: one of the two is out of range, or both are given.
    """
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
        raise ValueError(f"retained_layers={layers!r} is not a number of layers: give 0 or more.")
    if budget is None:
        return
    if layers:
        raise ValueError(
            f"retained_layers={layers} and memory_budget={budget!r} exclude each other: give one of them."
        )
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        sound = budget >= 0 if isinstance(budget, int) else 0 <= budget <= 1
    else:
        sound = budget == "auto"
    if not sound:
        raise ValueError(
            f"memory_budget={budget!r} is not None, 'auto', a whole number of bytes, or a fraction of the free memory from "
            "0.0 to 1.0."
        )


class Retention:
    """How many of the last layers keep their graphs, for every shape of batch.

    With a budget, what a layer keeps is measured once for each shape, in a forward pass that keeps one or more, and as
    many are kept as fit. Free memory is what the first two steps leave at their peak, with one layer kept (on CUDA; on a
    CPU, what is free when the third step begins). For larger batches than theirs it shrinks in proportion, and by what
    is allocated later, such as the optimizer's state after several forward passes of gradient accumulation.

    Args:
        layers: how many, where there is no ``budget``.
        budget: bytes (``int``) that kept graphs may take; a fraction (``float``) of the free memory; "auto" for 0.9 of
            it on CUDA and 0.5 on a CPU.
    """

    def __init__(self, layers: int = 0, budget: str | int | float | None = None):
        check_retention(layers, budget)
        self._layers, self._budget = layers, budget
        self._sizes: dict[Shape, int] = {}
        self._unmeasured: Shape | None = None
        self._densest = 0.0  # bytes that a layer keeps per element of the embeddings, where most
        self._steps = 0
        self._largest = 0
        self._allowance: float | None = None  # bytes that kept graphs may take
        self._per_element = 0.0  # by which that shrinks for larger batches
        self._in_use = float("inf")  # bytes, when the allowance was found
        self._last = (0, 0.0)

    @torch.compiler.disable  # its counting would be compiled anew at every step
    def layers_for(self, embeddings: Tensor, depth: int) -> int:
        """How many layers of ``depth`` to keep in the forward pass that begins with ``embeddings``.

        Raises:
            ValueError: the free memory of this device is not known.
        """
        if self._budget is None or not torch.is_grad_enabled():
            return min(self._layers, depth)
        shape = (embeddings.shape, embeddings.dtype, torch.is_autocast_enabled(embeddings.device.type))
        self._unmeasured = None if shape in self._sizes else shape
        size = self._sizes.get(shape, self._densest * embeddings.numel())
        if self._allowance is None:
            self._look_around(embeddings)
        if self._allowance is None:
            kept = 1
        elif not size:
            kept = int(self._allowance > 0)
        else:
            beyond = max(0, embeddings.numel() - self._largest) * self._per_element
            grown = max(0.0, in_use(embeddings.device) - self._in_use)
            kept = max(0, int((self._allowance - beyond - grown) // size))
        kept = min(kept, depth)
        self._last = kept, size
        return kept

    def _look_around(self, embeddings: Tensor) -> None:
        """Find out what kept graphs may take, as soon as that is known."""
        if isinstance(self._budget, int):
            self._allowance = self._budget
            return
        self._steps += 1
        if self._steps <= WARM_UPS:
            self._largest = max(self._largest, embeddings.numel())
            return
        device = embeddings.device
        share = SHARE.get(device.type, 0.0) if self._budget == "auto" else float(self._budget)  # type: ignore[arg-type]
        free, transient = free_memory(device)
        self._allowance = share * free + max(self._sizes.values(), default=0)
        self._per_element = transient / self._largest
        self._in_use = in_use(device)

    def run(self, work: Callable[[], T], parameters: tuple[Tensor, ...]) -> T:
        """Run the forward pass of a kept layer; measure what it keeps if the batch has a new shape."""
        if self._unmeasured is None:
            return work()
        shape, self._unmeasured = self._unmeasured, None
        with counting_saved(parameters) as kept:
            result = work()
        self._sizes[shape] = sum(kept.values())
        self._densest = max(self._densest, self._sizes[shape] / shape[0].numel())
        return result

    def back_off(self) -> bool:
        """After running out of memory: let kept graphs take half of what they took, from now on.

        Returns:
            Whether any were kept.
        """
        kept, size = self._last
        if self._budget is None or not kept:
            return False
        self._allowance, self._in_use, self._last = kept // 2 * size, float("inf"), (0, 0.0)
        return True


@contextmanager
def counting_saved(parameters: tuple[Tensor, ...]) -> Iterator[dict[int, int]]:
    """The bytes of every storage that autograd saves, by an address; those of ``parameters`` are there anyway."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor.detach()  # not itself: a node that saves its own result would keep itself alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def in_use(device: torch.device) -> int:
    """Bytes of tensors, as far as that is counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that were free at the highest peak so far, and bytes of that peak that are not in use now.

    Raises:
        ValueError: not known of this device.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        limit = min(total, int(share * torch.cuda.get_device_properties(device).total_memory))
        peak = torch.cuda.max_memory_allocated(device)
        return max(0, limit - peak), peak - in_use(device)
    if device.type != "cpu":
        raise ValueError(f"how much memory of {device} is free is not known: give memory_budget as a number of bytes.")
    if MEMINFO.exists():
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024, 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
