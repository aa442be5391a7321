"""What is kept instead of being rebuilt, if there is memory for it: graphs of layers, or results of their linear layers.

Rebuilding a layer costs another forward of it, so as few layers are rebuilt as the memory allows. The last layers keep
something first. The backward pass begins with them, so what they keep is freed before the gradients of all parameters exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cuda_rng import capturing, schedule
from .layer_call import LayerCall
from .memory_probe import SavedBytes, coming, free_memory, in_use
from .plan import LayerPlan, parse_budget
from .processes import check_may_repeat
from .saved_linear import SavedLinears

Shape = tuple[torch.Size, torch.dtype, bool]
"""The shape and the dtype of the embeddings, and whether autocast is on."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""The fraction of free memory that "auto" uses. CUDA loses some to fragmentation; other processes need some of a CPU's."""

WARM_UPS = 2
"""Free memory is read after this many steps. The first one creates the optimizer's state, so the second one is typical."""


Kind = tuple[int, bool]
"""The stage of a layer, and whether it changes the shape of the hidden state. Layers of one kind keep equally much."""


class Sizes(NamedTuple):
    """How much a layer can keep.

    Attributes:
        graph: bytes of its graph.
        linears: bytes of the results of its narrowing linear layers.
        elements: the number of elements of its state.
    """

    graph: float = 0.0
    linears: float = 0.0
    elements: float = 0.0

    def scaled(self, factor: float) -> "Sizes":
        return Sizes(*(size * factor for size in self))

    def largest(self, other: "Sizes") -> "Sizes":
        return Sizes(*map(max, self, other))


UNKNOWN = Sizes(graph=float("inf"), linears=float("inf"))


class RetentionPlan(NamedTuple):
    """What one forward pass keeps.

    Attributes:
        graphs: how many of the last layers keep their graphs.
        linears: how many layers below those keep the results of their narrowing linear layers.
        bytes: how many bytes this takes.
        unmeasured: the shape of the batch, if this forward pass has to measure what layers keep for it.
    """

    graphs: int = 0
    linears: int = 0
    bytes: float = 0.0
    unmeasured: Shape | None = None


def share_out(allowance: float, layers: Sequence[Sizes]) -> RetentionPlan:
    """Decide what ``layers``, given from first to last, keep within ``allowance`` bytes.

    Results of linear layers come first: per byte they save several times as much time as whole graphs do.
    """
    last_first = layers[::-1]
    linears = _fitting(allowance, [size.linears for size in last_first])
    if linears < len(layers):
        return _plan(last_first, 0, linears)
    spare = allowance - sum(size.linears for size in layers)
    graphs = _fitting(spare, [size.graph - size.linears for size in last_first])
    return _plan(last_first, graphs, len(layers) - graphs if any(size.linears for size in layers) else 0)


def _fitting(allowance: float, sizes: Sequence[float]) -> int:
    """How many of ``sizes``, from the first one on, fit into ``allowance``."""
    return sum(total <= max(0, allowance) for total in accumulate(sizes))


def _plan(last_first: Sequence[Sizes], graphs: int, linears: int) -> RetentionPlan:
    taken = sum(size.graph for size in last_first[:graphs])
    return RetentionPlan(graphs, linears, taken + sum(size.linears for size in last_first[graphs : graphs + linears]))


class Retention:
    """Decides for every shape of batch how many of the last layers keep something.

    The first forward pass with a new shape measures what layers of every kind keep. After that, as much is kept as fits into
    the budget. The budget ``"gradients"`` costs no memory: the peak is at the end of the backward pass, when all gradients
    of parameters exist, and what was kept has been freed by then.

    On CUDA, free memory is what the first two steps leave free at their peak, with nothing kept. On a CPU it is what is free
    when the third step begins. It is reduced in proportion for larger batches than those, and by what is allocated later,
    such as the optimizer's state after several forward passes of gradient accumulation.

    Args:
        budget: see :func:`~plan.parse_budget`.
        parameters: a function that returns the parameters of the layers.
        logits: how many numbers the head computes from one position of the hidden states. Each is in memory three times in
            fp32 (logits, log-softmax, gradient) while everything that is kept is in memory too.

    Attributes:
        latest: what the last forward pass with a budget kept; ``None`` before the first one whose shape was measured.

    Raises:
        ValueError: ``budget`` is not a budget.
    """

    def __init__(
        self,
        budget: str | None = None,
        parameters: Callable[[], Iterable[Tensor]] = tuple,
        logits: int = 0,
    ):
        self._text, self._budget = budget, parse_budget(budget)
        self._parameters, self._logits = parameters, logits
        self._sizes: dict[Shape, dict[Kind, Sizes]] = {}
        self.latest: RetentionPlan | None = None
        self._latest_shape: Shape | None = None
        self._steps = 0
        self._largest = 0
        self._allowance: float | None = None  # bytes that may be kept
        self._per_element = 0.0  # bytes by which the allowance shrinks per element of a larger batch
        self._in_use = float("inf")  # bytes in use when the allowance was found
        self._most = float("inf")  # most bytes to keep, after memory has run out once
        self._waiting: WeakKeyDictionary[object, float] = WeakKeyDictionary()  # bytes kept by other forward passes

    def __reduce__(self) -> Any:
        # A copy measures for itself, in this process or in another one.
        return Retention, (self._text, self._parameters, self._logits)

    @property
    def measured(self) -> dict[Shape, dict[Kind, Sizes]]:
        """For every shape that was measured, what layers of every kind keep."""
        return {shape: dict(sizes) for shape, sizes in self._sizes.items()}

    @torch.compiler.disable  # the step counter changes, so it would be compiled again at every step
    def plan(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> RetentionPlan:
        """What to keep in the forward pass that begins with ``embeddings``.

        Raises:
            ValueError: the free memory of this device is not known.
        """
        if capturing(embeddings.device):  # a CUDA graph keeps what the ordinary forward pass before it kept
            followed = schedule()
            return RetentionPlan() if followed is None or followed.kept is None else followed.kept
        kept = self._plan(embeddings, plans)
        if (learning := schedule()) is not None:
            learning.kept = kept
        return kept

    def _plan(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> RetentionPlan:
        depth, budget = len(plans), self._budget
        if budget.layers is not None:
            self.latest = RetentionPlan(min(budget.layers, depth))
            return self.latest
        if self._text is None or not torch.is_grad_enabled():
            return RetentionPlan()
        shape = (embeddings.shape, embeddings.dtype, torch.is_autocast_enabled(embeddings.device.type))
        measured = self._sizes.get(shape, {})
        unmeasured = shape if any(_kind(plan) not in measured for plan in plans if plan.beta) else None
        layers = [Sizes() if plan.stores_activations else self._size(plan, measured, embeddings) for plan in plans]
        allowance = self._allowed(embeddings, plans, layers)
        if allowance is None:
            return RetentionPlan(unmeasured=unmeasured)
        if budget.gradients:
            # Only layers of the last stage keep something. Gradients are computed from the last layer on. Layers of earlier
            # stages keep more and have fewer parameters, so most gradients would exist before what those keep is freed.
            layers = [size for plan, size in zip(plans, layers, strict=True) if plan.stage == plans[-1].stage]
        found = share_out(min(allowance, self._most), layers)._replace(unmeasured=unmeasured)
        if unmeasured is None:
            self.latest, self._latest_shape = found, shape
        return found

    def of_all_graphs(self, plans: Sequence[LayerPlan]) -> float | None:
        """Bytes for the last batch if every layer keeps its graph, as in plain training; ``None`` if not measured."""
        measured = self._sizes.get(self._latest_shape) if self._latest_shape else None
        if measured is None:
            return None
        return sum(measured[_kind(plan)].graph for plan in plans if _kind(plan) in measured)

    def _size(self, plan: LayerPlan, measured: dict[Kind, Sizes], embeddings: Tensor) -> Sizes:
        """What a layer keeps. If this shape was not measured, the largest estimate from other shapes, in proportion."""
        kind = _kind(plan)
        if kind in measured:
            return measured[kind]
        others = [
            sizes[kind].scaled(embeddings.numel() / shape[0].numel())
            for shape, sizes in self._sizes.items()
            if kind in sizes
        ]
        return max(others, default=UNKNOWN._replace(elements=embeddings.numel()))

    def _allowed(self, embeddings: Tensor, plans: Sequence[LayerPlan], layers: Sequence[Sizes]) -> float | None:
        """How many bytes may be kept; ``None`` while that is unknown."""
        if self._budget.gradients:
            side_bits = sum(plan.side_bits_of_layer * size.elements for plan, size in zip(plans, layers, strict=True))
            head = 3 * torch.float32.itemsize * self._logits * embeddings.numel() / embeddings.shape[-1]
            return sum(map(coming, self._parameters())) - side_bits / 8 - head - sum(self._waiting.values())
        if self._allowance is None:
            self._look_around(embeddings)
        if self._allowance is None:
            return None
        beyond = max(0, embeddings.numel() - self._largest) * self._per_element
        return self._allowance - beyond - max(0.0, in_use(embeddings.device) - self._in_use)

    def _look_around(self, embeddings: Tensor) -> None:
        """Set the allowance, as soon as it can be known."""
        if self._budget.bytes is not None:
            self._allowance = self._budget.bytes
            return
        self._steps += 1
        if self._steps <= WARM_UPS:
            self._largest = max(self._largest, embeddings.numel())
            return
        device, share = embeddings.device, self._budget.share
        part = share if isinstance(share, float) else SHARE.get(device.type, 0.0)
        free, transient = free_memory(device)
        self._allowance = part * free
        self._per_element = transient / self._largest
        self._in_use = in_use(device)

    @contextmanager
    def measuring(self, kept: RetentionPlan, call: LayerCall, state: Tensor) -> Iterator[SavedBytes | None]:
        """A context in which a layer runs. If the batch has a new shape, it measures what the layer keeps or would keep.

        Args:
            kept: the plan of this forward pass.
            call: the call of the layer.
            state: the state that the layer reads.

        Yields:
            A counter for what autograd saves or would save, or ``None`` if nothing is to be measured.
        """
        if kept.unmeasured is None:
            yield None
            return
        meter, linears = SavedBytes(call.sources), SavedLinears()
        with nullcontext() if call.compiles else linears.keeping():
            yield meter
        results = 0 if call.plan.transition else sum(result.nbytes for result in linears.results)
        sizes, kind = self._sizes.setdefault(kept.unmeasured, {}), _kind(call.plan)
        sizes[kind] = Sizes(meter.total, results, state.numel()).largest(sizes.get(kind, Sizes()))

    def watch(self, output: Tensor, kept: RetentionPlan) -> None:
        """Reduce the budget of other forward passes until the backward pass of this one reaches its ``output``."""
        if self._budget.gradients:
            self._watch(output, kept)

    @torch.compiler.disable  # compiled code would run the hook at another time
    def _watch(self, output: Tensor, kept: RetentionPlan) -> None:
        if kept.bytes and output.requires_grad:
            forward = _Forward()
            self._waiting[forward] = kept.bytes

            def arrive(grad: Tensor) -> None:
                self._waiting.pop(forward, None)

            output.register_hook(arrive)

    def back_off(self, kept: RetentionPlan) -> bool:
        """After running out of memory, keep from now on at most half of what was kept.

        Returns:
            Whether anything was kept, so that it helps to repeat the forward pass.

        Raises:
            OutOfMemoryError: other processes take part in the forward pass, so this one cannot repeat it alone.
        """
        if self._budget.layers is not None or not kept.bytes:
            return False
        check_may_repeat(self._text)
        self._most = kept.bytes / 2
        return True


class _Forward:
    """A forward pass whose backward pass is still to come. It is freed with the graph."""


def _kind(plan: LayerPlan) -> Kind:
    return plan.stage, plan.transition
