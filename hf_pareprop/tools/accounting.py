"""Where the bytes of a training step go, predicted from a configuration: the step runs on tensors without data.

The step is run twice on fake tensors, which have shapes and storages but no memory. In the second run every storage
is followed from its allocation to its end; the moment at which most bytes are alive is the peak.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from ..lanes import InlineLane, Job, Lane, replaced, side_lane
from ..layer_call import Pair
from ..observer import Observer, observing
from ..torch_private import DispatchMode
from .contenders import Batch, Contender, Subject, forward_backward, make_optimizer


@dataclass(frozen=True)
class Accounting:
    """Bytes alive at the peak of a training step, by what they are for.

    Attributes:
        parameters: weights and buffers, and the batch.
        optimizer: its state.
        gradients: of parameters.
        states: what a reversible model keeps for rebuilding: pairs of states, side bits, results of linear layers.
        graphs: activations that autograd has saved: of the whole model where they are stored, of a step or two where
            they are rebuilt.
        workspace: everything else: results on their way, gradients of activations.
        activations: states and graphs at the moment when they are most, which may be another one.
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
        """Those that are alive together."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "activations"}


def predict(subject: Subject, contender: Contender, batch: Batch, device: torch.device, bf16: bool) -> Accounting:
    """What a training step with AdamW will need at its peak.

    Args:
        batch: tensors of the shapes and dtypes of the batch, on any device; their values are not read.
        device: as of which the step runs: kernels, and with them what is saved, differ between devices.

    Raises:
        ValueError: ``contender`` is compiled or selective: what is kept is known after it has run.
    """
    if not contender.predictable:
        raise ValueError(f"the memory of {contender.name} is not predicted: measure it.")
    with FakeTensorMode(), no_init_weights():
        with torch.device(device):
            model = subject.build(contender)
            model.tie_weights()  # transformers does so where it makes weights
            inputs = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in batch.items()}
        optimizer = make_optimizer(model)
        ledger = _Ledger()

        def step() -> None:
            forward_backward(model, inputs, contender, device, bf16)
            ledger.name("gradients", (p.grad for p in model.parameters() if p.grad is not None))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with observing(_Naming(ledger)), replaced(_ahead_lane):
            step()  # makes the optimizer's state
            ledger.name("parameters", [*model.parameters(), *model.buffers(), *inputs.values()])
            ledger.name("optimizer", (v for state in optimizer.state.values() for v in state.values()))
            with ledger, _saved_ones_named(ledger):
                step()
        return ledger.at_peak()


class _Ledger(DispatchMode):
    """Follows the storages that operators make.

    What a storage is for may be known long after it was made, so the kinds are looked up for the peak in the end.
    """

    def __init__(self) -> None:
        super().__init__()
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
        """Say what tensors are for."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._kinds[self._number(tensor)] = kind

    def name_saved(self, tensor: Tensor) -> None:
        """Like :meth:`name`, for what autograd saves; parameters and states are that besides."""
        self._kinds.setdefault(self._number(tensor), "graphs")

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            number = self._numbers[storage] = len(self._sizes)
            self._sizes.append(storage.nbytes())
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
    """Name what autograd saves, also under the hooks of others: activation checkpointing and offloading use them."""
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
    """The lane of ``device``, on a CPU without its second thread, which no ledger sees."""
    with replaced(None):
        lane = side_lane(device)
    return AheadLane() if lane.overlaps and device.type == "cpu" else lane


class AheadLane(InlineLane):
    """What a lane that overlaps has in memory, without overlapping: work runs as soon as it is begun."""

    overlaps = True

    def start(self, work: Any) -> Job:
        return super().start(partial(lambda value: value, work()))
