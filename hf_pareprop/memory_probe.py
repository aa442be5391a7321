"""Measures memory for :mod:`retention`: how much is free, how much is in use, and how much autograd saves."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .torch_private import has_hooks_after_accumulation, local_part, storage_key, store, stored

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")


def coming(parameter: Tensor) -> int:
    """Bytes of the gradient that the backward pass will compute for ``parameter`` and leave in memory."""
    if not parameter.requires_grad or parameter.grad is not None or has_hooks_after_accumulation(parameter):
        return 0
    local = local_part(parameter)
    return local.numel() * local.element_size()


class SavedBytes:
    """Counts the bytes that autograd saves. Every storage is counted once.

    Args:
        known: tensors that are in memory anyway, such as parameters. They are not counted.

    Attributes:
        total: the number of bytes so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        self._known = set(map(storage_key, known))
        self._found: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._let_go = 0

    @property
    def total(self) -> int:
        return self._let_go + sum(self._found.values())

    def counting(self) -> saved_tensors_hooks:
        """A context in which everything that autograd saves is counted, and stays saved."""
        return saved_tensors_hooks(self._keep, stored)

    def _keep(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._count(tensor)
        return store(tensor)

    def _count(self, tensor: Tensor) -> None:
        if (key := storage_key(tensor)) not in self._known:
            self._found[key] = tensor.untyped_storage().nbytes()

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that autograd would save.

        The tensor is kept alive until :meth:`let_go`, so that no other tensor gets the same address and is left out.
        """
        self._count(tensor)
        self._held.append(tensor.detach())

    def let_go(self) -> None:
        self._let_go, self._found, self._held = self.total, {}, []


def in_use(device: torch.device) -> int:
    """Bytes of tensors in use on a CUDA device; 0 on other devices, where this is not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def now_and_at_the_peak(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use now and at the highest peak so far: tensors on CUDA, the whole process on a CPU; ``None`` if unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if line.startswith("Vm"))
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that were free at the highest peak so far, and bytes of that peak that are not in use now.

    Raises:
        ValueError: it is not known for this kind of device.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        limit = min(total, int(share * torch.cuda.get_device_properties(device).total_memory))
        peak = torch.cuda.max_memory_allocated(device)
        return max(0, limit - peak), peak - in_use(device)
    if device.type != "cpu":
        raise ValueError(
            f"how much memory of {device} is free is not known: give memory_budget as an amount, such as '4GB'."
        )
    if MEMINFO.exists():
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024, 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
