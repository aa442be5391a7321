"""One forward pass through a chain of reversible layers: what travels beside the hidden state."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain, State, advance_stored
from .coupling import encode, merge_pair, poison, straight_through
from .engine import Engine
from .findings import Findings
from .layer_call import AUTOGRAD, LayerCall, StepFunction, named_parameters_of, run_steps
from .observer import current_observer
from .plan import LayerPlan
from .retention import Retention, RetentionPlan
from .torch_private import (
    hook_tables,
    in_functorch,
    local_part,
    shares_memory,
    transforming,
    version_of,
)

Grid = tuple[int, int]
"""Rows and columns of patches."""

CASTING = ("ToCopyBackward0", "RegisterPostBackwardFunctionBackward")
"""The autograd nodes that FSDP2 adds to a hidden state when it casts it: the cast, and FSDP2's own hook."""


class Tape:
    """One forward pass: the current pair of states, and how many layers have run.

    A layer calls :meth:`layer` from its ``forward``, and layers are counted in the order of these calls. A tape belongs to
    one forward pass. So two forward passes before a backward pass, nested or interleaved models, and an evaluation in
    between have a tape each. The autograd graph keeps its chains alive (see :mod:`chain`), never the tape.

    Args:
        engine: one of :data:`~engine.ENGINES`.
        plans: the coupling of every layer in the order of calls, from :func:`~plan.plan_layers`.
        retention: decides what is kept instead of being rebuilt; by default nothing.
        findings: receives what is found wrong on the device.
        compiles: whether the steps of layers run as compiled code where a backward pass may follow.

    Attributes:
        dtype: the compute dtype, which is the dtype of the embeddings.
        norm: only in a post-LN model whose steps are sub-blocks: the norm that ends the last layer, and its parameters. The
            next reader of the hidden state applies it.
        grid: only in an image model: the rows and columns of patches that hidden states have now.
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
        compiles: bool = False,
    ):
        self.compiles = compiles
        self.engine, self.plans, self.retention = engine, plans, retention or Retention()
        self.findings = findings or Findings()
        self.kept = RetentionPlan()
        self._observer = current_observer()
        self._position = 0
        self._chain: Chain | None = None  # of rebuilt steps that ends with the current pair
        self._plan: LayerPlan | None = None  # of the last layer in the open segment; None if no segment is open
        self._previous: State
        self._current: State
        self._handed_out: tuple[int, bool] = (0, False)  # of the last output: version, and whether it needs a gradient
        self._peak: Tensor

    @property
    def layers_run(self) -> int:
        """The number of layers that have been called so far."""
        return self._position

    @torch.compiler.disable
    def start(self, embeddings: Tensor) -> Tensor:
        """Begin with the first hidden state. Its dtype becomes the compute dtype."""
        self.dtype = embeddings.dtype
        self.kept = self.retention.plan(embeddings, self.plans)
        self._peak = torch.zeros((), device=embeddings.device)
        return embeddings

    @torch.compiler.disable  # a compiled forward and an eager recomputation would differ in bits
    def layer(
        self,
        module: nn.Module,
        steps: Sequence[StepFunction],
        hidden: Tensor,
        inputs: tuple[Any, ...] = (),
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Apply the next layer to a hidden state and return the next hidden state, of the same shape.

        Call this from ``module.forward``: only then are wrappers of the module in place, such as FSDP2 and hooks.

        Args:
            module: owner of the parameters that ``steps`` use.
            steps: one or more; if the plan makes a whole layer one step, they are run as one.
            hidden: what the layer below returned. Any other hidden state opens a new pair.
            inputs: what steps read besides the state, passed to every step; tensors among them may need a gradient.
            norm: the norm that ends a layer of a post-LN model. If the whole layer is one step, the step applies the norm.
                Otherwise the next reader of the hidden state applies it, and finds it in :attr:`norm`.

        Raises:
            RuntimeError: more layers are called than there are plans, the layer cannot be rebuilt exactly, or the norm's
                parameters are not in the module now.
        """
        if self._position == len(self.plans):
            raise RuntimeError(
                f"more than {len(self.plans)} layers were called in one forward pass, but the encoder has only that many: call "
                "each layer once."
            )
        plan = self.plans[self._position]
        if plan.whole:
            return self._run(module, [_whole(steps, norm)], hidden, inputs, plan)
        hidden = self._run(module, steps, hidden, inputs, plan)
        if norm is not None:
            self.norm = norm, _to_hand_on(norm, hidden)
        return hidden

    def _run(
        self,
        module: nn.Module,
        steps: Sequence[StepFunction],
        hidden: Tensor,
        inputs: tuple[Any, ...],
        plan: LayerPlan,
    ) -> Tensor:
        if not plan.reversible:
            hidden = self._close(hidden, module, steps, inputs, plan)
            self._position += 1
            return hidden
        self._arrive(hidden, plan)
        call = LayerCall(module, steps, plan, self.dtype, inputs, self._position, self._current.bits.device)
        call.compiles = self.compiles and torch.is_grad_enabled() and not transforming()
        value = self._current.value
        if not self._may_rebuild(call, value.requires_grad or self._previous.value.requires_grad):
            self._store(call)
        else:
            with self.retention.measuring(self.kept, call, self._current.bits) as meter:
                if self._keeps_graph() or not _can_run_again(call):
                    with meter.counting() if meter else nullcontext():
                        self._store(call)
                else:
                    call.meter = meter
                    self._rebuild_later(call)
        self._position += 1
        if any(hook_tables([module])):
            # A hook may use this hidden state in a loss. So the value is NaN already here if the states left their range.
            value = self._current.value
            self._current = self._current._replace(value=value + poison(self._peak).to(value.dtype))
        value = self._current.value
        self._handed_out = version_of(value), value.requires_grad
        return value

    @torch.compiler.disable
    def finish(self, hidden: Tensor) -> Tensor:
        """The hidden state that a pair is merged to, in the compute dtype; NaN if the states left their range."""
        if self._plan is not None:
            self._arrive(hidden, self._plan)
            hidden = merge_pair(self._previous.value, self._current.value, self._plan.beta)
            hidden = hidden + poison(self._peak).to(hidden.dtype)  # an addition leaves the gradients unchanged
        return hidden.to(self.dtype)

    @torch.compiler.disable
    def stage(self, hidden: Tensor) -> Tensor:
        """Begin a new stage with a hidden state of another shape. Its dtype becomes the compute dtype."""
        self._plan = None
        self.dtype = hidden.dtype
        return hidden

    @torch.compiler.disable
    def end(self) -> None:
        """After the last layer: report the states to the observer, and have a warning given if they left their range."""
        grid_bits = next((plan.grid_bits for plan in self.plans if plan.reversible), None)
        self._observer.forward_ends(self._peak.detach(), grid_bits)
        if grid_bits is not None:
            self.findings.expect(self._peak, partial(_warn_of_range, grid_bits))

    def _arrive(self, hidden: Tensor, plan: LayerPlan) -> None:
        """Take the hidden state that a layer gets: the one handed out before, a changed one, or the first of a segment."""
        opens, self._plan = self._plan is None, plan
        if not opens:
            self._check_shape(hidden)
            if hidden.dtype != (handed := self._current.value).dtype:
                hidden = self._uncast(hidden, handed, plan)
            if self._is_unchanged(hidden):
                self._current = self._current._replace(value=hidden)
                return
        bits, peak = encode(hidden.detach(), plan.grid_bits)
        self._peak = torch.maximum(self._peak.to(peak.device), peak)
        hidden = hidden.view_as(hidden)  # gradients from the chain are summed here, before gradients from elsewhere

        def through() -> State:
            return State(bits, straight_through(bits, plan.grid_bits, self.dtype, (1.0, hidden)))

        if opens:
            self._previous = through()
        else:  # the hidden state was changed; the state before it is not
            before = self._previous
            self._previous = State(before.bits.to(bits.device), before.value.to(bits.device))
        self._current = through()

    def _check_shape(self, hidden: Tensor) -> None:
        """
        Raises:
            RuntimeError: the hidden state that a layer gets does not have the shape that the layer below returned.
        """
        handed = self._current.value
        if hidden.shape != handed.shape:
            raise RuntimeError(
                f"a layer got a hidden state of shape {tuple(hidden.shape)}, but the layer below returned {tuple(handed.shape)}: "
                "what runs between reversible layers has to keep the shape, because the state before it is still used. Make the "
                "layers around it conventional (0 in a list of betas)."
            )

    def _uncast(self, hidden: Tensor, handed: Tensor, plan: LayerPlan) -> Tensor:
        """The hidden state for a layer whose inputs were cast, as FSDP2 does in mixed precision.

        If nothing but a cast happened to it, the layer reads what the layer below returned, in full precision, and the gradient
        goes through the cast.
        """
        changed = hidden.to(handed.dtype)
        if not hidden.requires_grad and not handed.requires_grad:
            # There is no graph that shows what happened, so the values are compared.
            return torch.where((hidden == handed.to(hidden.dtype)).all(), handed, changed)
        if version_of(handed) != self._handed_out[0] or version_of(hidden) or not _is_cast_of(hidden, handed):
            return changed
        uncast = straight_through(self._current.bits, plan.grid_bits, self.dtype, (1.0, hidden))
        self._current = self._current._replace(value=uncast)
        self._handed_out = version_of(uncast), uncast.requires_grad
        return uncast

    def _is_unchanged(self, hidden: Tensor) -> bool:
        """Whether a layer gets what the layer below returned, or a view of it (FSDP2 makes a new tensor object)."""
        handed = self._current.value
        same = hidden is handed or (shares_memory(hidden, handed) and _descends(hidden, handed))
        return same and (version_of(hidden), hidden.requires_grad) == self._handed_out

    @property
    def _layers_from_here(self) -> int:
        return len(self.plans) - self._position

    def _may_rebuild(self, call: LayerCall, state_needs_gradient: bool) -> bool:
        """Whether there is a backward pass in which the layer could be rebuilt."""
        needs_gradient = state_needs_gradient or any(source.requires_grad for source in call.sources)
        return self.engine.rebuilds and torch.is_grad_enabled() and needs_gradient

    def _keeps_graph(self) -> bool:
        """Whether a layer that could be rebuilt stores its activations, because the budget says so."""
        return self._layers_from_here <= self.kept.graphs

    def _close(
        self,
        hidden: Tensor,
        module: nn.Module,
        steps: Sequence[StepFunction],
        inputs: tuple[Any, ...],
        plan: LayerPlan,
    ) -> Tensor:
        """Run a layer that is not reversible. The segment ends before it; if it changes the shape, a new stage begins."""
        hidden = self.finish(hidden)
        self._plan = None
        if not plan.transition:
            return _conventional(module, steps, hidden, *inputs)
        hidden = hidden.view_as(hidden)  # gradients from the layer are summed here, before gradients from elsewhere
        if plan.stores_activations:
            return self.stage(_conventional(module, steps, hidden, *inputs))
        call = LayerCall(module, steps, plan, self.dtype, inputs, self._position, hidden.device)
        if not self._may_rebuild(call, hidden.requires_grad):
            return self.stage(_conventional(module, steps, hidden, *inputs))
        with self.retention.measuring(self.kept, call, hidden) as meter:
            if self._keeps_graph() or not _can_run_again(call):
                with meter.counting() if meter else nullcontext():
                    return self.stage(_conventional(module, steps, hidden, *inputs))
            call.meter = meter
            return self.stage(self._run_again_later(call, hidden))

    def _run_again_later(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run a layer that changes the shape, and that runs again in the backward pass."""
        _refuse_transforms()
        call.begin()
        value = self._new_chain().apply(call, hidden)
        call.end()
        self._observer.layer_keeps(self._position, [hidden])
        return value

    def _store(self, call: LayerCall) -> None:
        """Run a layer whose activations autograd stores."""
        self._chain = None
        self._advance(call, advance_stored)

    def _rebuild_later(self, call: LayerCall) -> None:
        """Run a layer whose activations are rebuilt."""
        if call.plan.grid_bits is None:
            raise RuntimeError(
                "grid_bits=None leaves states floats, which cannot be rebuilt bit for bit: set grid_bits, or "
                f"{AUTOGRAD}"
            )
        _refuse_transforms()
        pair = self._previous.bits, self._current.bits
        if self._chain is None or not self._chain.ends_with(pair):
            self._chain = self._new_chain()
        keeps_linears = self._layers_from_here <= self.kept.graphs + self.kept.linears
        call.saves_linears = keeps_linears and not call.compiles  # compiled code has no linear layers to intercept
        self._observer.layer_begins(self._position, pair, call.plan.limit)
        call.begin(self.norm[0])
        self._advance(call, self._chain.advance)
        call.end()
        kept = self._chain.kept_by(call)
        self._observer.layer_keeps(self._position, [self._previous.bits, self._current.bits, *kept])

    def _advance(self, call: LayerCall, advance: Callable[..., tuple[State, State, Tensor]]) -> None:
        # The gradients of both uses of a state within the chain are added up first, before gradients from elsewhere.
        current = self._current._replace(value=self._current.value.view_as(self._current.value))
        previous = self._previous
        for number in range(len(call.steps)):
            previous, current, self._peak = advance(call, number, previous, current, self._peak)
        self._previous, self._current = previous, current

    def _new_chain(self) -> Chain:
        return Chain(self.engine.lane, self._observer, self.findings)


def _whole(steps: Sequence[StepFunction], norm: nn.Module | None) -> StepFunction:
    """A step that runs the whole layer."""

    def layer(state: Tensor, *inputs: Any) -> Tensor:
        hidden = run_steps(steps, state, *inputs)
        return hidden if norm is None else norm(hidden)

    return layer


def _to_hand_on(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    """The parameters of the norm that ends a layer, for the next layer, which applies that norm.

    Raises:
        RuntimeError: not all of the parameters are in the module now.
    """
    parameters = tuple(named_parameters_of(norm).values())
    shape = getattr(norm, "normalized_shape", None)
    whole = all(
        local_part(p) is p and p.is_meta == hidden.is_meta and (shape is None or p.shape == shape) for p in parameters
    )
    if not whole or (not parameters and getattr(norm, "weight", None) is not None):
        raise RuntimeError(
            f"the {type(norm).__name__} that ends a layer is applied by the next layer, but its parameters are not in the "
            "module: FSDP1, FSDP2 on parts of a layer, DeepSpeed ZeRO-3 and the offloading of accelerate take them away in "
            "between. Make the whole layer one step, with steps='layer' in from_pretrained, to_reversible or the configuration. "
            "Or use FSDP2 on whole layers, or ZeRO-2."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return tuple(p.clone() for p in parameters)  # FSDP may free them when the layer has run
    return parameters


def _can_run_again(call: LayerCall) -> bool:
    there = call.can_run_again()
    if not there:
        warnings.warn(
            f"the parameters of {type(call.module).__name__} are not there when it begins, as with DeepSpeed ZeRO-3: the layer "
            "stores its activations. Shard with FSDP2 or ZeRO-2 to save that memory.",
            stacklevel=2,
        )
    return there


def _refuse_transforms() -> None:
    if in_functorch():
        raise RuntimeError(f"transforms of torch.func cannot see through layers that are rebuilt: {AUTOGRAD}")


def _descends(view: Tensor, original: Tensor) -> bool:
    """Whether the gradient of ``view``, if it has one, reaches ``original`` through at most four autograd nodes."""
    if not original.requires_grad:
        return True
    nodes = [view.grad_fn]
    for _ in range(4):
        nodes = [below for node in nodes if node is not None for below, _ in node.next_functions]
        if original.grad_fn in nodes:
            return original.grad_fn is not None
    return False


def _is_cast_of(hidden: Tensor, handed: Tensor) -> bool:
    """Whether the autograd graph shows a cast, and nothing else, between two tensors."""
    edge = hidden.grad_fn, hidden.output_nr
    for _ in range(4):
        node, number = edge
        if node is None or node is handed.grad_fn or node.name() not in CASTING:
            break
        edge = node.next_functions[number]  # both kinds of nodes have one input for each output
    return edge == (handed.grad_fn, handed.output_nr) and handed.grad_fn is not None


def _conventional(module: nn.Module, steps: Sequence[StepFunction], hidden: Tensor, *inputs: Any) -> Tensor:
    """Run a stock layer. Autograd stores its activations, or they are checkpointed if checkpointing is on."""
    run = partial(run_steps, steps)
    if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
        checkpoint: Any = module._gradient_checkpointing_func  # transformers sets this on every layer
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
        "of that forward pass are NaN. If the stock model has no NaN for the same inputs, set a smaller grid_bits.",
        stacklevel=2,
    )
