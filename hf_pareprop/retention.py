"""What is not rebuilt: layers that keep their graphs from the forward pass, or their products, while memory allows.

Rebuilding a layer costs another forward of it, so it is done for as few layers as memory asks for. The backward pass
begins with the last layers: what they keep is the first to be freed, before the gradients of all parameters exist.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .capture import capturing
from .coupling import LayerPlan
from .products import Products

T = TypeVar("T")
Shape = tuple[torch.Size, torch.dtype, bool]
"""Of the embeddings, their dtype, and whether in autocast."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what "auto" takes: fragments get lost on CUDA, and others want a share of a CPU's."""

WARM_UPS = 2
"""Steps before free memory is looked at: after the first one the optimizer has its state, so the second is typical."""

STEPS = 2
"""Of a layer."""

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
        sound = budget in ("auto", "gradients")
    if not sound:
        raise ValueError(
            f"memory_budget={budget!r} is not None, 'auto', 'gradients', a whole number of bytes, or a fraction of the free "
            "memory from 0.0 to 1.0."
        )


class Sizes(NamedTuple):
    """Bytes that a layer keeps: with its graph, or with its products alone."""

    graph: float = 0.0
    products: float = 0.0


class Kept(NamedTuple):
    """So many of the last layers keep their graphs, and so many below those the results of products."""

    graphs: int = 0
    products: int = 0

    def bytes(self, sizes: Sizes) -> float:
        return self.graphs * sizes.graph + self.products * sizes.products


def share_out(allowance: float, sizes: Sizes, depth: int) -> Kept:
    """What of ``depth`` layers to keep within ``allowance`` bytes.

    Products first: for their size they save several times as much time as whole graphs do.
    """
    if allowance >= depth * sizes.graph:
        return Kept(graphs=depth)
    allowance = max(0, allowance)
    spare = allowance - depth * sizes.products
    if spare < 0:
        return Kept(products=int(allowance // sizes.products))
    graphs = int(spare // (sizes.graph - sizes.products))
    return Kept(graphs, depth - graphs if sizes.products else 0)


class Retention:
    """How many of the last layers keep their graphs or products, for every shape of batch.

    With a budget, what a layer keeps is measured once for each shape, in a forward pass that keeps one graph or more, and
    as much is kept as fits. The gradients of parameters are a budget that costs nothing: they do not exist yet while
    what is kept is in memory, and make the peak, at the end of the backward pass.

    Free memory is what the first two steps leave at their peak, with one layer kept (on CUDA; on a CPU, what is free when
    the third step begins). For larger batches than theirs it shrinks in proportion, and by what is allocated later, such
    as the optimizer's state after several forward passes of gradient accumulation.

    Args:
        layers: how many keep their graphs, where there is no ``budget``.
        budget: bytes (``int``) that may be kept; a fraction (``float``) of the free memory; "auto" for 0.9 of it on CUDA
            and 0.5 on a CPU; "gradients" for the bytes of those that the backward pass will make.
        parameters: of the layers, as they are when called.
        logits: numbers that the head computes of every state, each three times in fp32 (log-softmax, gradient), while
            all that is kept is in memory.
    """

    def __init__(
        self,
        layers: int = 0,
        budget: str | int | float | None = None,
        parameters: Callable[[], Iterable[Tensor]] = tuple,
        logits: int = 0,
    ):
        check_retention(layers, budget)
        self._layers, self._budget, self._parameters, self._logits = layers, budget, parameters, logits
        self._sizes: dict[Shape, Sizes] = {}
        self._unmeasured: Shape | None = None
        self._steps = 0
        self._largest = 0
        self._allowance: float | None = None  # bytes that may be kept
        self._per_element = 0.0  # by which that shrinks for larger batches
        self._in_use = float("inf")  # bytes, when the allowance was found
        self._most = float("inf")  # bytes, since memory ran out
        self._kept, self._planned = Kept(), 0.0  # in the last forward pass; bytes
        self._waiting: WeakKeyDictionary[object, float] = WeakKeyDictionary()  # bytes, of other forward passes

    def __reduce__(self) -> Any:
        # A copy, or one in another process, measures for itself.
        return Retention, (self._layers, self._budget, self._parameters, self._logits)

    @torch.compiler.disable  # its counting would be compiled anew at every step
    def plan(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> Kept:
        """What to keep in the forward pass that begins with ``embeddings``.

        Raises:
            ValueError: the free memory of this device is not known.
        """
        depth = len(plans)
        if self._budget is None or not torch.is_grad_enabled():
            return Kept(min(self._layers, depth))
        if capturing(embeddings.device):  # into a CUDA graph, which repeats the forward pass before it
            return self._kept
        shape = (embeddings.shape, embeddings.dtype, torch.is_autocast_enabled(embeddings.device.type))
        self._unmeasured = None if shape in self._sizes else shape
        sizes = self._sizes.get(shape) or self._expected(embeddings)
        allowance = self._allowed(embeddings, plans)
        if allowance is None:
            kept = Kept(graphs=1)
        elif not sizes.graph:
            kept = Kept(graphs=int(allowance > 0))
        else:
            kept = share_out(min(allowance, self._most), sizes, depth)
        self._kept, self._planned = kept, kept.bytes(sizes)
        return kept

    def _expected(self, embeddings: Tensor) -> Sizes:
        """For a shape that was not measured: of the one whose layers keep most for its size."""
        per_element = (tuple(size / shape[0].numel() for size in sizes) for shape, sizes in self._sizes.items())
        return Sizes(*(size * embeddings.numel() for size in max(per_element, default=Sizes())))

    def _allowed(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> float | None:
        """Bytes that may be kept; ``None`` while that is not known."""
        if self._budget == "gradients":
            side_bits = sum(plan.side_bits for plan in plans) * STEPS * embeddings.numel()
            head = 3 * torch.float32.itemsize * self._logits * embeddings.numel() / embeddings.shape[-1]
            return sum(map(coming, self._parameters())) - side_bits / 8 - head - sum(self._waiting.values())
        if self._allowance is None:
            self._look_around(embeddings)
        if self._allowance is None:
            return None
        beyond = max(0, embeddings.numel() - self._largest) * self._per_element
        return self._allowance - beyond - max(0.0, in_use(embeddings.device) - self._in_use)

    def _look_around(self, embeddings: Tensor) -> None:
        """Find out what may be kept, as soon as that is known."""
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
        self._allowance = share * free + max((sizes.graph for sizes in self._sizes.values()), default=0)
        self._per_element = transient / self._largest
        self._in_use = in_use(device)

    def run(self, work: Callable[[], T], parameters: tuple[Tensor, ...]) -> T:
        """Run the forward pass of a layer that keeps its graph; measure what it keeps if the batch has a new shape."""
        if self._unmeasured is None:
            return work()
        shape, self._unmeasured = self._unmeasured, None
        products = Products()
        with counting_saved(parameters) as kept, products.keeping():
            result = work()
        self._sizes[shape] = Sizes(sum(kept.values()), sum(result.nbytes for result in products.results))
        return result

    def watch(self, forward: object, output: Tensor) -> None:
        """Until the backward pass of ``forward`` comes to ``output``, other forward passes get what it leaves."""
        if self._budget == "gradients":
            self._watch(forward, output)

    @torch.compiler.disable  # a hook that compiled code would run elsewhere
    def _watch(self, forward: object, output: Tensor) -> None:
        if self._planned and output.requires_grad:
            self._waiting[forward] = self._planned

            def arrive(grad: Tensor) -> None:
                self._waiting.pop(forward, None)

            output.register_hook(arrive)

    def back_off(self) -> bool:
        """After running out of memory: keep half of what was kept, from now on.

        Returns:
            Whether anything was.
        """
        if self._budget is None or not self._planned:
            return False
        self._most, self._planned = self._planned / 2, 0.0
        return True


def coming(parameter: Tensor) -> int:
    """Bytes of the gradient that the backward pass will make of ``parameter`` and leave in memory."""
    if not parameter.requires_grad or parameter.grad is not None or parameter._post_accumulate_grad_hooks:
        return 0  # such hooks are there to use a gradient and free it
    local = getattr(parameter, "_local_tensor", parameter)  # of a DTensor, the shard
    return local.numel() * local.element_size()


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
