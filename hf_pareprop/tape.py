"""One forward pass through a chain of reversible layers: what travels beside the hidden state."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .coupling import encode, merge_pair, poison, straight_through
from .engine import Engine, Enter, Leave, RebuiltLayer, Trail
from .findings import Findings
from .hooks import is_observed, is_observed_inside
from .layer_call import AUTOGRAD, Contents, LayerCall, State, Step, value_of
from .memory_probe import SavedBytes
from .observer import current_observer
from .plan import LayerPlan
from .retention import Retention, RetentionPlan
from .torch_private import in_functorch, shares_memory, version_of
from .transition import Transition, TransitionCall, run_steps

Grid = tuple[int, int]
"""Rows and columns of patches."""

CASTING = ("ToCopyBackward0", "RegisterPostBackwardFunctionBackward")
"""The nodes of the autograd graph of a hidden state that FSDP2 casts: the cast, and where FSDP2 learns of its gradient."""


class Tape:
    """One forward pass: the pair of states that it has come to, and how many layers it has run.

    What a layer has to do is call :meth:`layer` from its ``forward``; layers are counted in the order of these calls. A
    tape belongs to one forward pass: two forwards before a backward, nested or interleaved models and evaluation in between
    each have their own. The autograd graph keeps its :class:`~engine.Trail`, never the tape.

    Args:
        engine: one of :data:`~engine.ENGINES`.
        plans: the coupling of every layer in the order of calls, from :func:`~plan.plan_layers`.
        retention: decides what is kept instead of being rebuilt; by default nothing.
        findings: where trouble on the device is told.

    Attributes:
        dtype: the compute dtype: that of the embeddings.
        norm: of a post-LN model, the norm that ends the last layer, which the next reader applies, and its parameters.
        grid: of an image model, the rows and columns of patches that hidden states have now.
    """

    dtype: torch.dtype
    norm: tuple[nn.Module | None, tuple[Tensor, ...]] = (None, ())
    grid: Grid

    def __init__(
        self,
        engine: Engine,
        plans: Sequence[LayerPlan],
        retention: Retention | None = None,
        findings: Findings | None = None,
    ):
        self.engine, self.plans, self.retention = engine, plans, retention or Retention()
        self.findings = findings or Findings()
        self.kept = RetentionPlan()
        self.trail = Trail(engine, current_observer(), self.findings)
        self._position = 0
        self._plan: LayerPlan | None = None  # of the last layer of the segment that is open
        self._previous: State
        self._current: State
        self._handed_out: tuple[int, bool] = (0, False)  # version, and whether it required a gradient
        self._peak: Tensor

    @torch.compiler.disable
    def start(self, embeddings: Tensor) -> Tensor:
        """The first hidden state; its dtype becomes the compute dtype."""
        self.dtype = embeddings.dtype
        self.kept = self.retention.plan(embeddings, self.plans)
        self._peak = torch.zeros((), device=embeddings.device)
        return embeddings

    @torch.compiler.disable  # a compiled forward and an eager recomputation would differ in bits
    def layer(self, module: nn.Module, steps: Sequence[Step], hidden: Tensor, inputs: tuple[Any, ...] = ()) -> Tensor:
        """Apply the next layer to a hidden state and return the one after it, of the same shape.

        To be called from ``module.forward``, so that what wraps modules (FSDP2, hooks) is in place.

        Args:
            module: owner of the parameters that ``steps`` use.
            steps: one or more.
            hidden: what the layer below returned, or something else, which then opens a pair of its own.
            inputs: what steps read besides the state, passed to every step; tensors among them may need a gradient.

        Raises:
            RuntimeError: more layers are called than there are plans, or the layer cannot be rebuilt exactly.
        """
        if self._position == len(self.plans):
            raise RuntimeError(
                f"more than {len(self.plans)} layers were called in one forward pass, as many as the encoder has: its layers "
                "may be called once each."
            )
        plan = self.plans[self._position]
        if not plan.reversible:
            hidden = self._close(hidden, module, steps, inputs, plan)
            self._position += 1
            return hidden
        self._arrive(hidden, plan)
        held = Contents(module)
        call = LayerCall(module, steps, plan, self.dtype, inputs, held, self._current.bits.device)
        if not self._may_rebuild(call, self._previous.needs_gradient or self._current.needs_gradient):
            self._store(call)
        elif self._keeps_graph(call):
            self._know_both()  # before the measurement: a pair is stored once and not in every layer
            with (
                self.retention.measuring(self.kept, call, self._current.bits) as meter,
                meter.counting() if meter else nullcontext(),
            ):
                self._store(call)
        else:
            call.saves_linears = self._layers_from_here <= self.kept.graphs + self.kept.linears
            with self.retention.measuring(self.kept, call, self._current.bits) as meter:
                self._rebuild_later(call, meter)
        self._position += 1
        if is_observed(module):
            self._know_both()  # a loss on what the hook sees finds the pair stored, and is NaN where the output will be
            seen = value_of(self._current)
            self._current = self._current._replace(value=seen + poison(self._peak).to(seen.dtype))
        value = value_of(self._current)
        self._handed_out = version_of(value), value.requires_grad
        return value

    @torch.compiler.disable
    def finish(self, hidden: Tensor) -> Tensor:
        """The hidden state that the pair stands for, in the compute dtype; NaN if the states left their range."""
        if self._plan is not None:
            self._arrive(hidden, self._plan)
            handed_out = self._current.value  # and still what the next layer is given
            self._know_both()
            hidden = merge_pair(value_of(self._previous), value_of(self._current), self._plan.beta)
            self._current = self._current._replace(value=handed_out)
            hidden = hidden + poison(self._peak).to(hidden.dtype)  # added, so that gradients are what they are
        return hidden.to(self.dtype)

    @torch.compiler.disable
    def stage(self, hidden: Tensor) -> Tensor:
        """The first hidden state of a new stage, of another shape; its dtype becomes the compute dtype."""
        self._plan = None
        self.dtype = hidden.dtype
        return hidden

    @torch.compiler.disable
    def end(self) -> None:
        """The last layer has run: say what has to be said of the states."""
        grid_bits = next((plan.grid_bits for plan in self.plans if plan.reversible), None)
        self.trail.observer.forward_ends(self._peak.detach(), grid_bits)
        if grid_bits is not None:
            self.findings.expect(self._peak, partial(_warn_of_range, grid_bits))

    def _arrive(self, hidden: Tensor, plan: LayerPlan) -> None:
        """Take the hidden state that a layer is given: the one that was handed out, a changed one, or a segment's first."""
        opens, self._plan = self._plan is None, plan
        if not opens:
            self._check_shape(hidden)
            if hidden.dtype != (handed := value_of(self._current)).dtype:
                hidden = self._uncast(hidden, handed, plan)
            if self._is_unchanged(hidden):
                self._current = self._current._replace(value=hidden, needs_gradient=hidden.requires_grad)
                return
        bits, peak = encode(hidden.detach(), plan.grid_bits)
        self._peak = torch.maximum(self._peak.to(peak.device), peak)
        hidden = hidden.view_as(hidden)  # the chain's uses are added up here, before those of others

        def through() -> State:
            return State.of(bits, straight_through(bits, plan.grid_bits, self.dtype, (1.0, hidden)))

        if opens:
            self._previous = through()
        else:  # the state before a changed one stays what it is
            self._know_both()
            before = self._previous
            self._previous = State.of(before.bits.to(bits.device), value_of(before).to(bits.device))
        self._current = through()

    def _check_shape(self, hidden: Tensor) -> None:
        """
        Raises:
            RuntimeError: a layer is given another shape than the layer below returned.
        """
        handed = value_of(self._current)
        if hidden.shape != handed.shape:
            raise RuntimeError(
                f"a layer got a hidden state of shape {tuple(hidden.shape)}, the layer below returned {tuple(handed.shape)}: what "
                "stands between reversible layers has to keep the shape, since the state before it stays in use. Make the layers "
                "around it conventional (0 in a list of betas)."
            )

    def _uncast(self, hidden: Tensor, handed: Tensor, plan: LayerPlan) -> Tensor:
        """The hidden state of a layer whose inputs are cast, as FSDP2 does in mixed precision.

        Where all that happened to it is the cast, layers read the state that the layer below returned, in full precision, and
        the gradient takes the way of the cast.
        """
        changed = hidden.to(handed.dtype)
        if not hidden.requires_grad and not handed.requires_grad:
            # No graph says what happened, so the values do.
            return torch.where((hidden == handed.to(hidden.dtype)).all(), handed, changed)
        if version_of(handed) != self._handed_out[0] or version_of(hidden) or not _is_cast_of(hidden, handed):
            return changed
        uncast = straight_through(self._current.bits, plan.grid_bits, self.dtype, (1.0, hidden))
        self._current = self._current._replace(value=uncast)
        self._handed_out = version_of(uncast), uncast.requires_grad
        return uncast

    def _is_unchanged(self, hidden: Tensor) -> bool:
        """Whether a layer is given what the layer below returned, or a view of it: FSDP2 hands on another object."""
        handed = value_of(self._current)
        same = hidden is handed or (shares_memory(hidden, handed) and _descends(hidden, handed))
        return same and (version_of(hidden), hidden.requires_grad) == self._handed_out

    @property
    def _layers_from_here(self) -> int:
        return len(self.plans) - self._position

    def _may_rebuild(self, call: LayerCall, state_needs_gradient: bool) -> bool:
        """Whether there is a backward pass in which the layer could be rebuilt."""
        needs_gradient = state_needs_gradient or any(source.requires_grad for source in call.sources)
        return self.engine.rebuilds and torch.is_grad_enabled() and needs_gradient

    def _keeps_graph(self, call: LayerCall) -> bool:
        """Whether a layer that could be rebuilt stores its activations: by the budget, or since others look into it."""
        return self._layers_from_here <= self.kept.graphs or is_observed_inside(call.held.modules)

    def _close(
        self, hidden: Tensor, module: nn.Module, steps: Sequence[Step], inputs: tuple[Any, ...], plan: LayerPlan
    ) -> Tensor:
        """Run a layer that is not reversible: a segment ends before it, and with one that changes the shape a stage."""
        hidden = self.finish(hidden)
        self._plan = None
        if not plan.transition:
            return _conventional(module, steps, hidden, *inputs)
        hidden = hidden.view_as(hidden)  # the layer's uses are added up here, before those of others
        if plan.stores_activations:
            return self.stage(_conventional(module, steps, hidden, *inputs))
        call = TransitionCall(module, steps, plan, self.dtype, inputs, Contents(module), hidden.device)
        if not self._may_rebuild(call, hidden.requires_grad):
            return self.stage(_conventional(module, steps, hidden, *inputs))
        with self.retention.measuring(self.kept, call, hidden) as meter:
            if not self._keeps_graph(call):
                return self.stage(self._run_again_later(call, hidden, meter))
            with meter.counting() if meter else nullcontext():
                return self.stage(_conventional(module, steps, hidden, *inputs))

    def _run_again_later(self, call: TransitionCall, hidden: Tensor, meter: SavedBytes | None) -> Tensor:
        """Run a layer that changes the shape, and that runs again in the backward pass."""
        _refuse_transforms()
        self.trail.calls[self._position] = call
        sources = call.sources  # with their history; the call keeps leaves
        computed = [call.run_forgetfully(hidden, meter)]
        self.trail.observer.layer_keeps(self._position, [hidden])
        return Transition.apply(self.trail, self._position, computed, hidden, *sources)

    def _store(self, call: LayerCall) -> None:
        """Run a layer whose activations autograd stores."""
        self._know_both()
        self._previous, self._current, peak = call.run(self._previous, self._current)
        self._peak = torch.maximum(self._peak, peak)

    def _rebuild_later(self, call: LayerCall, meter: SavedBytes | None) -> None:
        """Run a layer whose activations are rebuilt."""
        if call.plan.grid_bits is None:
            raise RuntimeError(
                "grid_bits=None leaves states floats, which cannot be rebuilt bit for bit: give grid_bits, or "
                f"{AUTOGRAD}"
            )
        _refuse_transforms()
        position, trail = self._position, self.trail
        previous, current = self._previous, self._current
        call.opens, call.follows = previous.bits is current.bits, previous.value is None
        hidden = value_of(current)
        if previous.value is not None and (previous.needs_gradient or current.needs_gradient):
            hidden = Enter.apply(trail, position, previous.value, hidden)
        trail.calls[position] = call
        trail.observer.layer_begins(position, (previous.bits, current.bits), call.plan.limit)
        sources = call.sources  # with their history; the call keeps leaves
        self._previous, after, peak = call.run_undoably(previous, current, meter)
        hidden = RebuiltLayer.apply(trail, position, after.bits, hidden, *sources)
        self._current = after._replace(value=hidden)
        self._peak = torch.maximum(self._peak, peak)
        trail.observer.layer_keeps(position, [hidden, self._previous.bits, after.bits, *call.kept()])

    def _know_both(self) -> None:
        """Have autograd know both states: the layers below are rebuilt from here."""
        if self._previous.value is None:
            pair = self._previous.bits, self._current.bits
            values = Leave.apply(self.trail, self._position - 1, pair, value_of(self._current))
            self._previous, self._current = (State.of(b, v) for b, v in zip(pair, values, strict=True))


def _refuse_transforms() -> None:
    if in_functorch():
        raise RuntimeError(f"transforms of torch.func cannot see through layers that are rebuilt: {AUTOGRAD}")


def _descends(view: Tensor, original: Tensor) -> bool:
    """Whether the gradient of ``view``, if it has one, goes to ``original`` by way of few nodes."""
    if not original.requires_grad:
        return True
    nodes = [view.grad_fn]
    for _ in range(4):
        nodes = [below for node in nodes if node is not None for below, _ in node.next_functions]
        if original.grad_fn in nodes:
            return original.grad_fn is not None
    return False


def _is_cast_of(hidden: Tensor, handed: Tensor) -> bool:
    """Whether between two tensors, by their autograd graph, there is a cast and nothing else."""
    edge = hidden.grad_fn, hidden.output_nr
    for _ in range(4):
        node, number = edge
        if node is None or node is handed.grad_fn or node.name() not in CASTING:
            break
        edge = node.next_functions[number]  # both return as many tensors as they take
    return edge == (handed.grad_fn, handed.output_nr) and handed.grad_fn is not None


def _conventional(module: nn.Module, steps: Sequence[Step], hidden: Tensor, *inputs: Any) -> Tensor:
    """A stock layer whose activations are stored by autograd, or checkpointed where that is on."""
    run = partial(run_steps, steps)
    if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
        checkpoint: Any = module._gradient_checkpointing_func  # set by transformers, as for every layer
        return checkpoint(run, hidden, *inputs)
    return run(hidden, *inputs)


def _warn_of_range(grid_bits: int, peak: float) -> None:
    limit = LayerPlan(1.0, grid_bits).limit
    largest = peak * 2.0**-grid_bits
    if largest < limit:
        return
    what = f"reached {largest:.3g}" if math.isfinite(largest) else "held an infinity or a NaN"
    warnings.warn(
        f"the states of a reversible model {what}, and at grid_bits={grid_bits} they have to stay below {limit:g}: the outputs "
        "of that forward pass are NaN. If the stock model is fine with the same inputs, take fewer grid_bits.",
        stacklevel=2,
    )
