"""A step forward and back: what the forward pass drops, and how the backward pass rebuilds it. Read this page first.

The forward pass runs a step once, on the state ``s[i]``, and autograd records its graph. Only the tensors that this graph
*saves* are dropped. In place of each, autograd keeps a :class:`Ticket`. So gradients, those of ``s[i-1]`` included, flow
through autograd's own graph, and hooks, losses on inner tensors and second derivatives work as in any other model.

The backward pass needs the saved tensors of one step after the other, from the last step to the first. When it asks for the
first of them, the :class:`Chain` rebuilds: from the two states that it still has, it runs the step again, collects what the
step saves, and undoes the step's update, which yields the state before:

    forward     s[i+1] = Phi_i(s[i]) + beta * s[i-1]            :meth:`Chain.advance`
    rebuild     s[i-1] = (s[i+1] - Phi_i(s[i])) / beta          :meth:`Step.rebuild`
    gradients   g[i]   = J_Phi_i(s[i])^T g[i+1] + beta * g[i+2]     autograd, through the graph of the forward pass

Before anything is handed out, two things are checked: the step saves what it saved in the forward pass, and the state that
it rebuilds is the one of the forward pass.

Only autograd's nodes keep a chain alive, so the chain itself holds no tensor with a graph: the two would keep each other.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .coupling import advance, checksum, checksum_of_values, decode, retreat, straight_through
from .findings import Findings
from .lanes import Job, Lane
from .layer_call import AUTOGRAD, LayerCall
from .observer import Observer
from .onlookers import Onlookers
from .replay import StepContext, uncached_autocast
from .torch_private import (
    NO_PASS,
    at_end_of_backward,
    backward_pass,
    is_fake,
    keeps_graph,
    outside_transforms,
    owner_of,
    version_of,
)

Pair = tuple[Tensor, Tensor]
"""``(s[i-1], s[i])``: two neighbouring states, int32. The rest of the chain depends on nothing else."""

WRONG = (
    "the states that {} rebuilt in the backward pass are not those of the forward pass, so its gradients would be wrong. "
    "A layer computed something else than before. Likely causes: a parameter or an input such as the attention mask was "
    "overwritten; a module was replaced; another thread draws random numbers while dropout is replayed; saved-tensor hooks "
    "change what they are given; the layer is not a function of its inputs. Avoid that, or call "
    "model.set_backward_engine('autograd') before the forward pass, which stores activations."
)


MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: an activation inside {}, by the "
    "layer itself or by a hook in it. Return a new tensor instead."
)


class State(NamedTuple):
    """A state in the forward pass.

    Attributes:
        bits: int32, in units of the grid.
        value: the state decoded to floats, with its autograd graph.
    """

    bits: Tensor
    value: Tensor


class Ticket:
    """What autograd keeps in place of a tensor that a step saved. It dies when nobody can ask for the tensor any more.

    Attributes:
        step: which step of the chain.
        tensor: the tensor, while its step is handed out.
    """

    __slots__ = ("__weakref__", "step", "tensor")

    def __init__(self, step: int):
        self.step = step
        self.tensor: Tensor | None = None


class Saved(NamedTuple):
    """What is noted about a saved tensor: in both passes it has to be the same."""

    shape: torch.Size
    dtype: torch.dtype
    parameter: str | None

    def __str__(self) -> str:
        return self.parameter or f"a tensor of shape {tuple(self.shape)}"


@dataclass
class Rebuilt:
    """What rebuilding a step yields.

    Attributes:
        saved: what the step saved, in the order of the forward pass; ``None`` for what nobody can ask for any more.
        previous: ``s[i-1]``; for a layer that changes the shape of the hidden state, what the layer computed.
        right: whether the step computed what it computed in the forward pass: a 0-d bool.
    """

    saved: list[Tensor | None]
    previous: Any
    right: Any


class Step:
    """One step of a chain: all that is needed to run it again and to undo it, except states.

    Args:
        index: the step's place in the chain.
        call: the call of the layer that the step belongs to.
        number: the step's place in the layer.
        needs_gradient: whether the state that the step reads needs a gradient. PyTorch chooses kernels by that.
    """

    def __init__(self, index: int, call: LayerCall, number: int, needs_gradient: bool):
        self.index, self.call, self.number, self.needs_gradient = index, call, number, needs_gradient
        self.context = StepContext(call.conditions, call.saves_linears)
        self.sides: Sequence[Tensor] = ()
        self.onlookers = Onlookers() if call.has_onlookers else None
        self.checksum: Tensor | None = None  # of s[i-1]; None if it is the same state as s[i]
        self.after: Tensor | None = None  # the checksum of s[i+1], as soon as it is needed
        self._saved: list[Saved] = []
        self._tickets: list[weakref.ref[Ticket]] = []

    def pack(self, tensor: Tensor) -> Ticket:
        """Drop a tensor that autograd saves in the forward pass."""
        ticket = Ticket(self.index)
        self._saved.append(Saved(tensor.shape, tensor.dtype, self.call.names.get(owner_of(tensor))))
        self._tickets.append(weakref.ref(ticket))
        if self.call.meter is not None:
            self.call.meter.hold(tensor)
        return ticket

    def is_wanted(self) -> bool:
        """Whether a backward pass may still ask for what the step saved."""
        return any(ticket() is not None for ticket in self._tickets)

    def read(self, bits: Tensor) -> Tensor:
        """What the step reads in the forward pass, from the state."""
        return decode(bits, self.call.plan.grid_bits, self.call.dtype)

    def undo(self, value: Tensor, following: Any) -> Tensor:
        """``s[i-1]``, from ``Phi_i(s[i])`` and ``s[i+1]``."""
        return retreat(value, following, self.call.plan, self.sides)

    def is_right(self, previous: Tensor, current: Tensor) -> Tensor:
        """Whether ``s[i-1]`` was rebuilt as it was in the forward pass: a 0-d bool."""
        return (previous == current).all() if self.checksum is None else checksum(previous) == self.checksum

    def is_right_again(self, value: Tensor, previous: Tensor) -> Tensor:
        """The same for a step that was undone before, from ``Phi_i(s[i])`` and ``s[i-1]``: whether they yield ``s[i+1]``."""
        bits, _, _ = advance(value, previous, self.call.plan, torch.zeros((), device=value.device))
        assert self.after is not None
        return checksum(bits) == self.after

    def rebuild(self, current: Tensor, following: Any, previous: Any = None) -> Rebuilt:
        """Run the step again, from ``s[i]``, and undo it, from ``s[i+1]``.

        Args:
            previous: ``s[i-1]``, if the step was undone before and only has to run again.

        Raises:
            RuntimeError: the step saves something else than in the forward pass, or what it reads or saves was modified.
        """
        self.call.check_unmodified()
        saved: list[Tensor | None] = []
        found: list[Saved] = []
        versions: list[int] = []
        work, names = self.call.again(partial(self.call.phi, self.number))

        def collect(tensor: Tensor) -> None:
            place = len(saved)
            found.append(Saved(tensor.shape, tensor.dtype, names.get(owner_of(tensor))))
            wanted = place < len(self._tickets) and self._tickets[place]() is not None
            saved.append(tensor.detach() if wanted else None)
            versions.append(version_of(tensor))

        with outside_transforms(), torch.enable_grad():
            state = self.read(current).requires_grad_(self.needs_gradient)
            with saved_tensors_hooks(collect, _refuse), self.onlookers.left_out() if self.onlookers else nullcontext():
                value = self.context.replay(partial(work, state)).detach()
            if found != self._saved:
                raise RuntimeError(_difference(self.call, self._saved, found))
            if any(t is not None and version_of(t) != v for t, v in zip(saved, versions, strict=True)):
                raise RuntimeError(MODIFIED.format(type(self.call.module).__name__))
            with torch.no_grad():
                if previous is None:
                    previous = self.undo(value, following)
                    right = self.is_right(previous, current)
                else:
                    right = self.is_right_again(value, previous)
                linears = self.context.linears.right if self.context.linears else []
                return Rebuilt(saved, previous, torch.stack([right, *linears]).all() if linears else right)

    def below(self, previous: Tensor, current: Tensor) -> Pair:
        """The pair ``s[i-1]`` and ``s[i]``. At the beginning of a segment it is the same state twice."""
        return current if self.checksum is None else previous, current

    def hand_out(self, saved: Sequence[Tensor | None]) -> None:
        """Put what was rebuilt where autograd will ask for it."""
        for reference, tensor in zip(self._tickets, saved, strict=True):
            if (ticket := reference()) is not None:
                ticket.tensor = tensor

    def take_back(self) -> None:
        """Let go of what was handed out and may be asked for again, in another backward pass."""
        self.hand_out([None] * len(self._tickets))


class StepFromInput(Step):
    """A layer that changes the shape of the hidden state, as the only step of a chain.

    It cannot be undone. The hidden state that it read is stored, and the layer runs again from it.
    """

    def read(self, bits: Tensor) -> Tensor:
        return bits.detach()

    def undo(self, value: Tensor, following: Any) -> Tensor:
        return value

    def is_right(self, previous: Tensor, current: Tensor) -> Tensor:
        assert self.checksum is not None
        return torch.eq(checksum_of_values(previous), self.checksum)

    def is_right_again(self, value: Tensor, previous: Tensor) -> Tensor:
        return self.is_right(value, previous)

    def below(self, previous: Tensor, current: Tensor) -> Pair:
        return current, current  # what the layer computed is not needed any more


class Descent:
    """How far down one backward pass has rebuilt a chain.

    Attributes:
        pair: the two states from which the next step is rebuilt, ``s[i]`` and ``s[i+1]``.
        at: the index of that step.
        step: the step that is handed out, the one above.
        job: the rebuild that was begun ahead, of the step ``at``.
        verdict: on a device other than the CPU, 1 or NaN: whether everything was rebuilt right.
        differentiating: the observer's context in which the gradients of the step are computed.
    """

    def __init__(self, pair: Any, at: int):
        self.pair, self.at = pair, at
        self.step: Step | None = None
        self.job: Job | None = None
        self.verdict: Tensor | None = None
        self.differentiating: AbstractContextManager[None] = nullcontext()

    def abandon_job(self) -> None:
        """Return when no work runs any more."""
        if self.job is not None:
            self.job.abandon()
        self.job = None


class Chain:
    """Steps that follow one another and are rebuilt from the last to the first, in one forward pass and its backward pass.

    Args:
        lane: gives the lane of a device on which the next step is rebuilt ahead.
        observer: sees what happens.
        findings: receives what is found wrong on a device other than the CPU.

    Attributes:
        top: the two states from which the last step is rebuilt, ``s[n-1]`` and ``s[n]``. They are all that is stored. A
            backward pass that frees the graph moves them down.
    """

    def __init__(self, lane: Callable[[torch.device], Lane], observer: Observer, findings: Findings):
        self._lane, self._observer, self._findings = lane, observer, findings
        self.top: Any = None
        self._at = -1  # the index of the step that is rebuilt from them
        self._steps: list[Step] = []
        self._descents: dict[int, Descent] = {}

    # Forward

    def ends_with(self, pair: Pair) -> bool:
        """Whether these are the two states after the last step."""
        return self.top[0] is pair[0] and self.top[1] is pair[1]

    def kept_by(self, call: LayerCall) -> list[Tensor]:
        """What the steps of the last layer keep: side bits, and results of linear layers."""
        steps = self._steps[-len(call.steps) :]
        linears = (step.context.linears.results for step in steps if step.context.linears)
        return [tensor for tensors in (*(step.sides for step in steps), *linears) for tensor in tensors]

    def advance(
        self, call: LayerCall, number: int, previous: State, current: State, peak: Tensor
    ) -> tuple[State, State, Tensor]:
        """``s[i+1] = Phi_i(s[i]) + beta * s[i-1]``, without what the step saves.

        Returns:
            ``s[i]`` and ``s[i+1]``; and ``peak``, raised to that of the step.
        """
        if not self._steps and current.bits.device.type != "cpu":
            for value in (previous.value, current.value):
                if value.requires_grad:
                    value.register_hook(self._settle)
        state = current.value.view_as(current.value)
        step = Step(len(self._steps), call, number, state.requires_grad)
        if previous.bits is not current.bits:
            step.checksum = checksum(previous.bits)
        if step.index > 1:
            self._steps[-2].after = step.checksum
        value = self._record(step, state)
        bits, step.sides, peak = advance(value.detach(), previous.bits, call.plan, peak, keep=True)
        self.top = current.bits, bits
        return current, _next_state(call, bits, value, previous), peak

    def apply(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run a layer that changes the shape of the hidden state, without what it saves. It is the chain's only step."""
        step = StepFromInput(0, call, 0, hidden.requires_grad)
        value = self._record(step, hidden)
        step.checksum = checksum_of_values(value)
        self.top = hidden.detach(), None
        if hidden.requires_grad and hidden.device.type != "cpu":
            hidden.register_hook(self._settle)
        return value

    def _record(self, step: Step, state: Tensor) -> Tensor:
        self._at = step.index
        self._steps.append(step)
        call, onlookers, version = step.call, step.onlookers, version_of(state)
        with saved_tensors_hooks(step.pack, self._unpack), onlookers.watched() if onlookers else nullcontext():
            value: Tensor = step.context.record(partial(call.phi, step.number, state, *call.inputs))
        _check_unmodified(state, version, call)
        if call.meter is not None:
            call.meter.let_go()
        return value

    # Backward

    @torch.compiler.disable  # compiled autograd would trace it
    def _unpack(self, ticket: Ticket) -> Tensor:
        """Hand out a tensor that a step saved. Autograd calls this."""
        if ticket.tensor is not None:
            return ticket.tensor
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"a backward pass within torch.inference_mode() cannot rebuild layers: leave that mode before it, or {AUTOGRAD}"
            )
        task = backward_pass()
        descent = self._descents.get(task) or self._begin(task)
        self._leave(descent)
        self._reach(descent, ticket.step)
        assert ticket.tensor is not None, "a step was rebuilt without a tensor that autograd still needs"
        tensor = ticket.tensor
        if task == NO_PASS:  # somebody looks at a node, and no end of a pass will come
            self._leave(descent)
            return tensor
        self._look_ahead(descent)
        step = self._steps[ticket.step]
        descent.differentiating = self._observer.differentiating(step.call.position, step.number)
        descent.differentiating.__enter__()
        return tensor

    def _begin(self, task: int) -> Descent:
        descent = self._descents[task] = Descent(self.top, self._at)
        if task != NO_PASS:
            at_end_of_backward(partial(self._close, task))
        return descent

    def _reach(self, descent: Descent, index: int) -> None:
        """Rebuild down to the step ``index``, and hand it out."""
        if index > descent.at or descent.at > self._at:  # it was handed out before, or another pass has come further
            descent.abandon_job()
            descent.pair, descent.at = self.top, self._at
        if index > descent.at:
            step = self._steps[index]
            previous, current = descent.pair
            rebuilt = self._rebuild(step, current, None, previous)
            self._check(descent, step, rebuilt, current)
        while descent.at >= index:
            step = self._steps[descent.at]
            job, descent.job = descent.job, None
            rebuilt = job.result() if job else self._rebuild(step, *descent.pair)
            current, following = descent.pair
            self._check(descent, step, rebuilt, current)
            if step.after is None and following is not None:
                step.after = checksum(following)
            descent.pair, descent.at = step.below(rebuilt.previous, current), descent.at - 1
        step.hand_out(rebuilt.saved)
        descent.step = step
        if not keeps_graph() and not any(above.is_wanted() for above in self._steps[index + 1 :]):
            del self._steps[index + 1 :]
            self.top, self._at, step.sides = descent.pair, descent.at, ()

    def _leave(self, descent: Descent) -> None:
        """Autograd has come to another step, or to the end."""
        descent.differentiating.__exit__(None, None, None)
        descent.differentiating = nullcontext()
        if descent.step is not None:
            descent.step.take_back()
        descent.step = None

    def _look_ahead(self, descent: Descent) -> None:
        """Begin to rebuild the step below, while autograd computes the gradients of the step that is handed out."""
        if descent.at < 0:
            return
        step = self._steps[descent.at]
        lane = self._lane(step.call.device)
        if lane.overlaps and step.is_wanted() and step.call.can_run_ahead():
            descent.job = lane.job(partial(self._rebuild, step, *descent.pair))
            descent.job.begin()

    def _rebuild(self, step: Step, current: Tensor, following: Any, previous: Any = None) -> Rebuilt:
        position, number = step.call.position, step.number
        with self._observer.rebuilding(position, number):
            rebuilt = step.rebuild(current, following, previous)
        self._observer.step_rebuilt(position, number, rebuilt)
        return rebuilt

    def _check(self, descent: Descent, step: Step, rebuilt: Rebuilt, current: Tensor) -> None:
        """Check a rebuilt step, before anything of it is handed out.

        Raises:
            RuntimeError: on a CPU, if it is wrong. Another device is not waited for: there gradients become NaN where the
                chain begins, and the next call of the model raises the error.
        """
        right = rebuilt.right
        if is_fake(right):
            pass
        elif right.device.type == "cpu":
            if not right:
                raise RuntimeError(WRONG.format(type(step.call.module).__name__))
        else:
            verdict = torch.where(right, 1.0, torch.nan)
            descent.verdict = verdict if descent.verdict is None else verdict * descent.verdict.to(verdict.device)
            if step.index == 0 and not step.needs_gradient:  # no gradient leaves the chain below this step
                rebuilt.saved[:] = [t if t is None else _or_nan(t, descent.verdict) for t in rebuilt.saved]
        if step.number == 0 and not step.call.plan.transition:
            self._observer.layer_rebuilt(step.call.position, (rebuilt.previous, current))

    def _settle(self, grad: Tensor) -> Tensor:
        """The gradient that leaves the chain where it begins; NaN if anything was rebuilt wrongly."""
        descent = self._descents.get(backward_pass())
        return grad if descent is None or descent.verdict is None else _or_nan(grad, descent.verdict)

    def _close(self, task: int) -> None:
        """The backward pass ends, or has failed."""
        descent = self._descents.pop(task, None)
        if descent is None:
            return
        descent.abandon_job()
        self._leave(descent)
        if descent.verdict is not None:
            self._findings.expect(descent.verdict, _raise_if_wrong)


def advance_stored(
    call: LayerCall, number: int, previous: State, current: State, peak: Tensor
) -> tuple[State, State, Tensor]:
    """The same as :meth:`Chain.advance`, where autograd keeps what the step saves."""
    state = current.value.view_as(current.value)
    version = version_of(state)
    with uncached_autocast(call.device):
        value = call.phi(number, state, *call.inputs)
    _check_unmodified(state, version, call)
    bits, _, peak = advance(value.detach(), previous.bits, call.plan, peak)
    return current, _next_state(call, bits, value, previous), peak


def _next_state(call: LayerCall, bits: Tensor, value: Tensor, previous: State) -> State:
    """``s[i+1]``, whose gradient goes to ``Phi_i(s[i])`` and, times beta, to ``s[i-1]``."""
    plan = call.plan
    return State(bits, straight_through(bits, plan.grid_bits, call.dtype, (1.0, value), (plan.beta, previous.value)))


def _check_unmodified(state: Tensor, version: int, call: LayerCall) -> None:
    if version_of(state) != version:
        raise RuntimeError(MODIFIED.format(type(call.module).__name__))


def _or_nan(tensor: Tensor, verdict: Tensor) -> Tensor:
    """``tensor``, or NaN in its place."""
    return tensor * verdict.to(tensor.device, tensor.dtype) if tensor.is_floating_point() else tensor


def _refuse(nothing: None) -> Tensor:
    raise RuntimeError(
        f"a layer computes gradients in its forward pass, which a rebuilt layer cannot do again: {AUTOGRAD}"
    )


def _raise_if_wrong(verdict: float) -> None:
    if verdict != 1:
        raise RuntimeError(
            "In an earlier training step, " + WRONG.format("a layer") + " The gradients of that step were NaN."
        )


def _difference(call: LayerCall, before: Sequence[Saved], after: Sequence[Saved]) -> str:
    """What the error says if a step saves other tensors than in the forward pass."""
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    if pairs:
        what = f"{pairs[0][0]} in the forward pass, and {pairs[0][1]} in the backward pass"
    else:
        what = f"{len(before)} tensors in the forward pass, and {len(after)} in the backward pass"
    return (
        f"{type(call.module).__name__} uses {what}, so its gradients would be wrong: between the passes an adapter was "
        f"switched, a module was replaced, parameters were moved or a flag was changed. Leave them as they are until the "
        f"backward pass is over, or {AUTOGRAD}"
    )
