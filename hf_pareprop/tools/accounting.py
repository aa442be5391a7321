"""Predict where the bytes of a training step go, from a configuration. The step runs on tensors without data.

It runs twice on fake tensors, which have shapes and storages but no memory. In the second run every storage is followed
from its allocation to its end. The moment at which most bytes are alive is the peak.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from ..chain import Pair
from ..lanes import InlineJob, InlineLane, Job, Lane, replaced, side_lane
from ..observer import Observer, observing
from ..torch_private import DispatchMode, free_workspaces
from .contenders import Batch, Contender, forward_backward, make_optimizer


@dataclass(frozen=True)
class Accounting:
    """Bytes alive at the peak of a training step, by purpose.

    Attributes:
        parameters: weights, buffers and the batch.
        optimizer: the state of the optimizer.
        gradients: the gradients of parameters.
        states: what a reversible model keeps for rebuilding: pairs of states, side bits, results of linear layers.
        graphs: activations that autograd has saved. They are those of the whole model if activations are stored, and those
            of one or two steps if they are rebuilt.
        workspace: everything else: intermediate results, gradients of activations, and the workspaces of cuBLAS. What
            attention kernels allocate while they run is not known.
        activations: the largest sum of states and graphs, which may occur at another moment than the peak.
    """

    parameters: int = 0
    optimizer: int = 0
    gradients: int = 0
    states: int = 0
    graphs: int = 0
    workspace: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts that are alive together at the peak."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "activations"}


class Buildable(Protocol):
    """Anything that can build models: a :class:`~hf_pareprop.tools.contenders.Subject`, for example."""

    def build(self, contender: Contender) -> Any:
        """A model for ``contender``, in training mode."""


def predict(subject: Buildable, contender: Contender, batch: Batch, device: torch.device, bf16: bool) -> Accounting:
    """Predict what a training step with AdamW needs at its peak.

    Args:
        subject: builds the model.
        contender: the way to train.
        batch: tensors with the shapes and dtypes of the batch, on any device. Their values are not read.
        device: the device to predict for. Kernels differ between devices, and with them what autograd saves.
        bf16: whether the step computes in bf16 autocast.

    Raises:
        ValueError: ``contender`` is compiled or selective. What it keeps is known only after it has run.
    """
    if not contender.predictable:
        raise ValueError(f"the memory of {contender.name} is not predicted: measure it.")
    libraries = _taken_by_libraries(contender, device)
    with FakeTensorMode(), no_init_weights():
        with torch.device(device):
            model = subject.build(contender)
            model.tie_weights()  # transformers does this only if it initializes weights
            inputs = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in batch.items()}
        optimizer = make_optimizer(model)
        ledger = _Ledger(device)

        def step() -> None:
            forward_backward(model, inputs, contender, device, bf16)
            ledger.name("gradients", (p.grad for p in model.parameters() if p.grad is not None))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with observing(_Naming(ledger)), replaced(_ahead_lane):
            step()  # creates the optimizer's state
            ledger.name("parameters", [*model.parameters(), *model.buffers(), *inputs.values()])
            ledger.name("optimizer", (v for state in optimizer.state.values() for v in state.values()))
            with ledger, _saved_ones_named(ledger):
                step()
        found = ledger.at_peak()
        return replace(found, workspace=found.workspace + libraries)


def _taken_by_libraries(contender: Contender, device: torch.device) -> int:
    """The bytes of cuBLAS's workspaces: it keeps one for each pair of a thread and a stream.

    The forward and the backward pass have a thread each. With rebuilding ahead the backward thread uses two more streams.
    """
    if device.type != "cuda":
        return 0
    return _workspace_of_a_stream(device) * (4 if contender.engine == "pareprop" else 2)


@cache
def _workspace_of_a_stream(device: torch.device) -> int:
    """The bytes that the first matrix products on a new stream leave allocated."""
    with torch.cuda.stream(torch.cuda.Stream(device)):
        matrix = torch.ones(16, 16, device=device)
        before = torch.cuda.memory_allocated(device)
        for dtype in (torch.float32, torch.bfloat16):
            one = matrix.to(dtype)
            torch.nn.functional.linear(one, one, one[0])
        del one
        taken = torch.cuda.memory_allocated(device) - before
    free_workspaces()
    return taken


class _Ledger(DispatchMode):
    """Follows the storages that operators create.

    The purpose of a storage may become known long after it was created, so purposes are looked up at the end.

    Args:
        device: the device whose memory is counted. Offloaded activations, for example, are on another device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._sizes: list[int] = []
        self._kinds: dict[int, str] = {}
        self._history: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._number(leaf)
        return result

    def name(self, kind: str, tensors: Iterable[Any]) -> None:
        """Set the purpose of tensors."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._kinds[self._number(tensor)] = kind

    def name_saved(self, tensor: Tensor) -> None:
        """Like :meth:`name`, for a tensor that autograd saves. Parameters and states keep their own purpose."""
        self._kinds.setdefault(self._number(tensor), "graphs")

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            number = self._numbers[storage] = len(self._sizes)
            self._sizes.append(storage.nbytes() if tensor.device.type == self._device_type else 0)
            self._history.append((number, +1))
            weakref.finalize(storage, self._history.append, (number, -1)).atexit = False
        return self._numbers[storage]

    def at_peak(self) -> Accounting:
        alive: dict[int, None] = {}
        now = highest = kept = most_kept = 0
        peak: list[int] = []
        for number, change in self._history:
            now += change * self._sizes[number]
            if self._kinds.get(number) in ("states", "graphs"):
                kept += change * self._sizes[number]
                most_kept = max(most_kept, kept)
            if change > 0:
                alive[number] = None
            else:
                del alive[number]
            if now > highest:
                highest, peak = now, list(alive)
        totals = dict.fromkeys(Accounting().parts(), 0)
        for number in peak:
            totals[self._kinds.get(number, "workspace")] += self._sizes[number]
        return Accounting(**totals, activations=most_kept)


@contextmanager
def _saved_ones_named(ledger: _Ledger) -> Iterator[None]:
    """Name what autograd saves, even inside other saved-tensor hooks: activation checkpointing and offloading use them."""
    hooks: Any = saved_tensors_hooks
    original = hooks.__init__

    def noting(self: Any, pack: Any, unpack: Any) -> None:
        def pack_and_note(tensor: Tensor) -> Any:
            ledger.name_saved(tensor)
            return pack(tensor)

        original(self, pack_and_note, unpack)

    hooks.__init__ = noting
    try:
        with saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            yield
    finally:
        hooks.__init__ = original


class _Naming(Observer):
    """Names the states of a reversible model, and what it keeps for rebuilding."""

    def __init__(self, ledger: _Ledger):
        self._ledger = ledger

    def layer_keeps(self, position: int, tensors: list[Tensor]) -> None:
        self._ledger.name("states", tensors)

    def layer_rebuilt(self, position: int, pair: Pair) -> None:
        self._ledger.name("states", pair)


def _ahead_lane(device: torch.device) -> Lane:
    """The lane to predict for ``device``. On a CPU it uses no second thread, because the ledger would not see it."""
    with replaced(None):
        lane = side_lane(device)
    return AheadLane() if lane.overlaps and device.type == "cpu" else lane


class AheadLane(InlineLane):
    """A lane with the memory use of a lane that overlaps, but without overlap: work runs as soon as it is begun."""

    overlaps = True

    def job(self, work: Any) -> Job:
        return _AheadJob(work)


class _AheadJob(InlineJob):
    def begin(self) -> None:
        value = super().result()
        self._work = partial(lambda value: value, value)
