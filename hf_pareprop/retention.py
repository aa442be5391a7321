"""What is not rebuilt: layers that keep their graphs from the forward pass, or their products, while memory allows.

Rebuilding a layer costs another forward of it, so it is done for as few layers as memory asks for. The backward pass
begins with the last layers: what they keep is the first to be freed, before the gradients of all parameters exist.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cuda_rng import capturing
from .memory_probe import coming, counting_saved, free_memory, in_use
from .plan import LayerPlan, check_retention
from .saved_linear import SavedLinears

T = TypeVar("T")
Shape = tuple[torch.Size, torch.dtype, bool]
"""Of the embeddings, their dtype, and whether in autocast."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what "auto" takes: fragments get lost on CUDA, and others want a share of a CPU's."""

WARM_UPS = 2
"""Steps before free memory is looked at: after the first one the optimizer has its state, so the second is typical."""

STEPS = 2
"""Of a layer."""


class Sizes(NamedTuple):
    """Bytes that a layer keeps: with its graph, or with its products alone."""

    graph: float = 0.0
    products: float = 0.0


class RetentionPlan(NamedTuple):
    """So many of the last layers keep their graphs, and so many below those the results of products."""

    graphs: int = 0
    products: int = 0

    def bytes(self, sizes: Sizes) -> float:
        return self.graphs * sizes.graph + self.products * sizes.products


def share_out(allowance: float, sizes: Sizes, depth: int) -> RetentionPlan:
    """What of ``depth`` layers to keep within ``allowance`` bytes.

    SavedLinears first: for their size they save several times as much time as whole graphs do.
    """
    if allowance >= depth * sizes.graph:
        return RetentionPlan(graphs=depth)
    allowance = max(0, allowance)
    spare = allowance - depth * sizes.products
    if spare < 0:
        return RetentionPlan(products=int(allowance // sizes.products))
    graphs = int(spare // (sizes.graph - sizes.products))
    return RetentionPlan(graphs, depth - graphs if sizes.products else 0)


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
        self._kept, self._planned = RetentionPlan(), 0.0  # in the last forward pass; bytes
        self._waiting: WeakKeyDictionary[object, float] = WeakKeyDictionary()  # bytes, of other forward passes

    def __reduce__(self) -> Any:
        # A copy, or one in another process, measures for itself.
        return Retention, (self._layers, self._budget, self._parameters, self._logits)

    @torch.compiler.disable  # its counting would be compiled anew at every step
    def plan(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> RetentionPlan:
        """What to keep in the forward pass that begins with ``embeddings``.

        Raises:
            ValueError: the free memory of this device is not known.
        """
        depth = len(plans)
        if self._budget is None or not torch.is_grad_enabled():
            return RetentionPlan(min(self._layers, depth))
        if capturing(embeddings.device):  # into a CUDA graph, which repeats the forward pass before it
            return self._kept
        shape = (embeddings.shape, embeddings.dtype, torch.is_autocast_enabled(embeddings.device.type))
        self._unmeasured = None if shape in self._sizes else shape
        sizes = self._sizes.get(shape) or self._expected(embeddings)
        allowance = self._allowed(embeddings, plans)
        if allowance is None:
            kept = RetentionPlan(graphs=1)
        elif not sizes.graph:
            kept = RetentionPlan(graphs=int(allowance > 0))
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
        products = SavedLinears()
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
