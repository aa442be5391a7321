"""What is not rebuilt: layers that keep their graphs, or results of their linear layers, while memory allows.

Rebuilding a layer costs another forward of it, so it is done for as few layers as memory asks for. The backward pass
begins with the last layers: what they keep is the first to be freed, before the gradients of all parameters exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cuda_rng import capturing, schedule
from .layer_call import LayerCall
from .memory_probe import SavedBytes, coming, free_memory, in_use
from .plan import LayerPlan, parse_budget
from .saved_linear import SavedLinears

Shape = tuple[torch.Size, torch.dtype, bool]
"""Of the embeddings, their dtype, and whether in autocast."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""The part of the free memory that "auto" uses: fragments get lost on CUDA, and others want a share of a CPU's."""

WARM_UPS = 2
"""Steps before free memory is looked at: after the first one the optimizer has its state, so the second is typical."""

STEPS = 2
"""Of a layer."""


Kind = tuple[int, bool]
"""Layers of one kind keep the same: the stage that they are in, and whether they change the shape of the hidden state."""


class Sizes(NamedTuple):
    """What a layer keeps.

    Attributes:
        graph: bytes, with its graph.
        linears: bytes, with the results of its narrowing linear layers alone.
        elements: of its state.
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
        graphs: so many of the last layers keep their graphs,
        linears: and so many below those the results of their narrowing linear layers.
        bytes: that this takes.
        unmeasured: the shape of the batch, if what layers keep for it is to be measured.
    """

    graphs: int = 0
    linears: int = 0
    bytes: float = 0.0
    unmeasured: Shape | None = None


def share_out(allowance: float, layers: Sequence[Sizes]) -> RetentionPlan:
    """What of ``layers``, from the first one on, to keep within ``allowance`` bytes.

    Results of linear layers first: for their size they save several times as much time as whole graphs do.
    """
    last_first = layers[::-1]
    linears = _fitting(allowance, [size.linears for size in last_first])
    if linears < len(layers):
        return _plan(last_first, 0, linears)
    spare = allowance - sum(size.linears for size in layers)
    graphs = _fitting(spare, [size.graph - size.linears for size in last_first])
    return _plan(last_first, graphs, len(layers) - graphs if any(size.linears for size in layers) else 0)


def _fitting(allowance: float, sizes: Sequence[float]) -> int:
    """How many of ``sizes``, from the first one on, fit."""
    return sum(total <= max(0, allowance) for total in accumulate(sizes))


def _plan(last_first: Sequence[Sizes], graphs: int, linears: int) -> RetentionPlan:
    taken = sum(size.graph for size in last_first[:graphs])
    return RetentionPlan(graphs, linears, taken + sum(size.linears for size in last_first[graphs : graphs + linears]))


class Retention:
    """Decides how many of the last layers keep something, for every shape of batch.

    With a budget, what layers of every kind keep is measured once for each shape, in its first forward pass, and as much is
    kept as fits. The gradients of parameters are a budget that costs nothing: they do not exist yet while
    what is kept is in memory, and make the peak, at the end of the backward pass.

    Free memory is what the first two steps leave at their peak, with nothing kept (on CUDA; on a CPU, what is free when
    the third step begins). For larger batches than theirs it shrinks in proportion, and by what is allocated later, such
    as the optimizer's state after several forward passes of gradient accumulation.

    Args:
        budget: see :func:`~plan.parse_budget`.
        parameters: of the layers, as they are when called.
        logits: numbers that the head computes of every state, each three times in fp32 (log-softmax, gradient), while
            all that is kept is in memory.

    Attributes:
        latest: what the last forward pass with a budget kept; ``None`` before there was one that knew.

    Raises:
        ValueError: the budget is not one.
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
        self._per_element = 0.0  # by which that shrinks for larger batches
        self._in_use = float("inf")  # bytes, when the allowance was found
        self._most = float("inf")  # bytes, since memory ran out
        self._waiting: WeakKeyDictionary[object, float] = WeakKeyDictionary()  # bytes, of other forward passes

    def __reduce__(self) -> Any:
        # A copy, or one in another process, measures for itself.
        return Retention, (self._text, self._parameters, self._logits)

    @property
    def measured(self) -> dict[Shape, dict[Kind, Sizes]]:
        """What layers of every kind keep, for every shape that was measured."""
        return {shape: dict(sizes) for shape, sizes in self._sizes.items()}

    @torch.compiler.disable  # its counting would be compiled anew at every step
    def plan(self, embeddings: Tensor, plans: Sequence[LayerPlan]) -> RetentionPlan:
        """What to keep in the forward pass that begins with ``embeddings``.

        Raises:
            ValueError: the free memory of this device is not known.
        """
        if capturing(embeddings.device):  # into a CUDA graph, which repeats the forward pass before it
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
            # Of the last stage alone: gradients come from the last layer on, and where the layers of earlier stages keep
            # more and have fewer parameters than those, most of them would be there before what is kept is freed.
            layers = [size for plan, size in zip(plans, layers, strict=True) if plan.stage == plans[-1].stage]
        found = share_out(min(allowance, self._most), layers)._replace(unmeasured=unmeasured)
        if unmeasured is None:
            self.latest, self._latest_shape = found, shape
        return found

    def of_all_graphs(self, plans: Sequence[LayerPlan]) -> float | None:
        """Bytes that the last batch takes if every layer keeps its graph, as in plain training; ``None`` if not measured."""
        measured = self._sizes.get(self._latest_shape) if self._latest_shape else None
        if measured is None:
            return None
        return sum(measured[_kind(plan)].graph for plan in plans if _kind(plan) in measured)

    def _size(self, plan: LayerPlan, measured: dict[Kind, Sizes], embeddings: Tensor) -> Sizes:
        """Of a shape that was not measured: by the one whose layers keep most for its size."""
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
        """Bytes that may be kept; ``None`` while that is not known."""
        if self._budget.gradients:
            side_bits = STEPS * sum(plan.side_bits * size.elements for plan, size in zip(plans, layers, strict=True))
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
        """Within this context a layer runs; if the batch has a new shape, what it keeps or would keep is measured.

        Args:
            call: of the layer.
            state: that it reads.

        Yields:
            What the layer has to count all with that autograd saves or would save.
        """
        if kept.unmeasured is None:
            yield None
            return
        meter, linears = SavedBytes(call.sources), SavedLinears()
        with linears.keeping():
            yield meter
        results = 0 if call.plan.transition else sum(result.nbytes for result in linears.results)
        sizes, kind = self._sizes.setdefault(kept.unmeasured, {}), _kind(call.plan)
        sizes[kind] = Sizes(meter.total, results, state.numel()).largest(sizes.get(kind, Sizes()))

    def watch(self, forward: object, output: Tensor, kept: RetentionPlan) -> None:
        """Until the backward pass of ``forward`` comes to ``output``, other forward passes get what it leaves."""
        if self._budget.gradients:
            self._watch(forward, output, kept)

    @torch.compiler.disable  # a hook that compiled code would run elsewhere
    def _watch(self, forward: object, output: Tensor, kept: RetentionPlan) -> None:
        if kept.bytes and output.requires_grad:
            self._waiting[forward] = kept.bytes

            def arrive(grad: Tensor) -> None:
                self._waiting.pop(forward, None)

            output.register_hook(arrive)

    def back_off(self, kept: RetentionPlan) -> bool:
        """After running out of memory: keep half of what was kept, from now on.

        Returns:
            Whether anything was.
        """
        if self._budget.layers is not None or not kept.bytes:
            return False
        self._most = kept.bytes / 2
        return True


def _kind(plan: LayerPlan) -> Kind:
    return plan.stage, plan.transition
