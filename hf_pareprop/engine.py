"""Backpropagation through a chain of reversible layers without stored activations.

A layer takes and returns one tensor, the hidden state. It is the state ``s[i]`` *decoded*, which means converted from
integers to floats (see :mod:`coupling`). So autograd sees a plain chain of hidden states. The recurrence also needs the
state before, ``s[i-1]``. In the forward pass it travels beside the chain, on the :class:`~tape.Tape`. In the backward pass
the rebuilt states and the gradient of ``s[i-1]`` travel on the :class:`Trail`. The backward pass of step ``i`` starts from
``s[i]``, ``s[i+1]`` and the gradients of both, and computes

    rebuild     Phi_i(s[i]), with its local graph;  s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    gradients   g[i] = J_Phi_i(s[i])^T g[i+1] + beta * g[i+2]

Two neighbouring states are a *pair*. Three autograd Functions do the work. From :class:`Enter` on, autograd sees only the
second state of a pair. :class:`RebuiltLayer` is one layer. At :class:`Leave` the pair is stored, and autograd sees both of
its states again.

An engine decides when rebuilding happens: see :class:`Autograd`, :class:`Reprop` and :class:`PaReprop`. All three run
the same arithmetic on the same numbers and yield the same gradients. This module does not depend on transformers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .coupling import decode
from .findings import Findings
from .lanes import Job, Lane, Session, inline_lane, side_lane
from .layer_call import LayerCall, Pair, RebuiltStep, check_backward_mode
from .observer import Observer
from .plan import check_engine
from .torch_private import backward_pass, is_fake, keeps_graph

WRONG = (
    "the states that {} rebuilt in the backward pass are not those of the forward pass, so its gradients would be wrong. "
    "A layer computed something else than before. Likely causes: the attention implementation was switched between the "
    "forward pass and its backward; an input such as the attention mask was overwritten; another thread draws random numbers "
    "while dropout is replayed; the layer is not a function of its inputs. Avoid that, or call "
    "model.set_backward_engine('autograd') before the forward pass, which stores activations."
)


class Engine:
    """How reversible layers run, and how their gradients are computed.

    Attributes:
        rebuilds: whether layers are rebuilt in the backward pass, instead of storing their activations.
        lane: gives the lane of a device, which is the place where rebuilds run (see :mod:`lanes`).
    """

    rebuilds = True
    lane: Callable[[torch.device], Lane] = staticmethod(inline_lane)


class Autograd(Engine):
    """Store every activation and let autograd compute the gradients. This is the reference for the other two engines.

    Prefer it when memory is no concern, and where the others cannot work: higher-order gradients, attention maps as
    outputs, transforms of ``torch.func``.
    """

    rebuilds = False


class Reprop(Engine):
    """Store one pair of states per segment and rebuild the rest, step by step, on the caller's thread and stream.

    This engine needs the least memory: the autograd graph of one step at a time, and ``m`` stored bits per element and step
    at ``beta = 2**-m``. It costs one more forward pass, like activation checkpointing. It has no higher-order gradients.

    Gomez et al. 2017, arXiv 1707.04585, algorithm 1.
    """


class PaReprop(Engine):
    """Rebuild step ``i-1`` on another lane while the gradients of step ``i`` are computed.

    It does the same work on the same numbers as :class:`Reprop`, and keeps the graphs of two steps at a time. It is faster
    where one step does not fill the device: with small batches, short sequences or narrow models.

    Zhu & Mangalam 2023, arXiv 2306.09342, section 3.2.
    """

    lane = staticmethod(side_lane)


ENGINES: dict[str, Engine] = {"autograd": Autograd(), "reprop": Reprop(), "pareprop": PaReprop()}


def get_engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        ValueError: no engine has that name.
    """
    check_engine(name)
    return ENGINES[name]


class Trail:
    """What the backward pass of one forward pass needs: the calls of layers, and what each leaves for the layer below it.

    Only the autograd nodes of that forward pass keep a trail alive. The trail holds no tensor with a graph of the same
    pass: the two would keep each other alive.
    """

    def __init__(self, engine: Engine, observer: Observer, findings: Findings):
        self.engine, self.observer, self.findings = engine, observer, findings
        self.calls: dict[int, LayerCall] = {}
        self._ahead: dict[int, Job] = {}
        self._left: dict[int, tuple[int, Pair, Tensor | None]] = {}
        self._verdict: Tensor | None = None

    def leave(self, position: int, pair: Pair, grad_previous: Tensor | None) -> None:
        """Leave for the layer at ``position`` the pair that it returned, and the gradient of the pair's first state."""
        self._left[position] = backward_pass(), pair, grad_previous

    def take(self, position: int) -> tuple[Pair, Tensor | None]:
        """Take what was left for ``position`` in this backward pass.

        Raises:
            RuntimeError: nothing was left, or another backward pass left it.
        """
        task, pair, grad = self._left.pop(position, (None, None, None))
        if task != backward_pass() or pair is None:
            raise RuntimeError(
                "the backward pass came to a reversible layer, but not from the layers above it: a loss uses the output of one "
                "layer. Take that output with a forward hook or with output_hidden_states, or call "
                "model.set_backward_engine('autograd') before the forward pass."
            )
        return pair, grad

    def start(self, session: Session, position: int, step: int, current: Tensor, following: Tensor) -> Job:
        """Begin to rebuild a step."""
        return session.start(partial(self._rebuild, position, step, current, following))

    def _rebuild(self, position: int, step: int, current: Tensor, following: Tensor) -> RebuiltStep:
        with self.observer.rebuilding(position, step):
            rebuilt = self.calls[position].rebuild(step, current, following)
        self.observer.step_rebuilt(position, step, rebuilt)
        return rebuilt

    def look_ahead(self, session: Session, position: int, pair: Pair) -> None:
        """Begin to rebuild the last step of layer ``position`` before its own backward is called.

        This is done only if its states and its parameters are already on the same device. Under FSDP2 and ZeRO-3 the
        parameters arrive with the layer's own backward, and a model may be spread over several devices.
        """
        call = self.calls[position]
        if call.is_resident() and call.device == pair[0].device and call.conditions_hold():
            self._ahead[position] = self.start(session, position, len(call.steps) - 1, *pair)

    def begun(self, position: int) -> Job | None:
        """The rebuild that :meth:`look_ahead` began for ``position``, if it did."""
        return self._ahead.pop(position, None)

    def check(self, module: nn.Module, right: Tensor) -> None:
        """Note whether a layer was rebuilt correctly. On a GPU the answer stays on the device, for :meth:`settle`.

        Args:
            right: the answer, a 0-d bool.

        Raises:
            RuntimeError: on a CPU, if the layer was not rebuilt correctly.
        """
        if is_fake(right):
            return
        if right.device.type == "cpu":
            if not right:
                raise RuntimeError(WRONG.format(type(module).__name__))
            return
        verdict = torch.where(right, 1.0, torch.nan)
        self._verdict = verdict if self._verdict is None else self._verdict.to(verdict.device) * verdict

    def settle(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return ``gradients``, as NaN if any layer was rebuilt wrongly. Called at the end of a chain of rebuilt layers.

        The host does not wait for the device to learn this. The next call of the model raises the error.
        """
        if self._verdict is None:
            return gradients
        verdict, self._verdict = self._verdict, None
        self.findings.expect(verdict, _raise_if_wrong)
        return [None if grad is None else grad * verdict.to(grad.device, grad.dtype) for grad in gradients]


def _raise_if_wrong(verdict: float) -> None:
    if verdict != 1:
        raise RuntimeError(
            "In an earlier training step, " + WRONG.format("a layer") + " The gradients of that step were NaN."
        )


class Enter(torch.autograd.Function):
    """The node where a chain of rebuilt layers begins. The gradient of ``previous`` comes from the trail.

    Forward takes the hidden state and the state before it, both decoded, and returns the hidden state.
    """

    @staticmethod
    def forward(ctx: Any, trail: Trail, position: int, previous: Tensor, hidden: Tensor) -> Tensor:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        check_backward_mode()
        _, grad_previous = ctx.trail.take(ctx.position - 1)
        return None, None, *ctx.trail.settle([grad_previous, grad])


class Leave(torch.autograd.Function):
    """The node where a chain of rebuilt layers ends. It stores the pair from which the backward pass starts rebuilding.

    Forward takes the pair, and the hidden state after layer ``position`` with its autograd history. It returns both states
    decoded, in new memory, because hooks of other libraries may write to it. Backward puts the gradient of ``previous`` on
    the trail.
    """

    @staticmethod
    def forward(ctx: Any, trail: Trail, position: int, pair: Pair, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*pair)
        call = trail.calls[position]
        previous, current = (decode(state, call.plan.grid_bits, call.dtype) for state in pair)
        return previous, current

    @staticmethod
    def backward(ctx: Any, grad_previous: Tensor | None, grad: Tensor | None) -> Any:
        check_backward_mode()
        previous, current = ctx.saved_tensors
        ctx.trail.leave(ctx.position, (previous, current), grad_previous)
        return None, None, None, grad


class RebuiltLayer(torch.autograd.Function):
    """One reversible layer. It keeps no states, and rebuilds them from the pair that the layer above leaves on the trail.

    Forward takes the state that the layer's call computed, the hidden state that the layer read, and the call's sources. It
    returns the computed state, decoded.
    """

    @staticmethod
    def forward(ctx: Any, trail: Trail, position: int, bits: Tensor, hidden: Tensor, *sources: Tensor) -> Tensor:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)  # optimizers skip a parameter without gradient, but not one with zeros
        # Their values are not needed. They are saved so that autograd notices if one is modified.
        ctx.save_for_backward(*sources)
        call = trail.calls[position]
        return decode(bits, call.plan.grid_bits, call.dtype)

    @staticmethod
    def backward(ctx: Any, grad_current: Tensor | None) -> Any:
        check_backward_mode()
        _ = ctx.saved_tensors  # raises if a source was modified, or if the graph was freed
        trail, position = ctx.trail, ctx.position
        call = trail.calls[position]
        beta, last = call.plan.beta, len(call.steps) - 1
        goes_on = ctx.needs_input_grad[3]
        may_repeat = keeps_graph()
        totals: list[Tensor | None] = [None] * len(call.sources)
        (current, following), grad_previous = trail.take(position)

        # PyTorch's flags are shared by all threads. If a rebuild has to change them, it must not overlap with gradients.
        lane = (trail.engine.lane if call.conditions_hold() else inline_lane)(call.device)
        with lane.session() as session:
            job = trail.begun(position) or trail.start(session, position, last, current, following)
            scale = 1.0  # the factor that grad_previous still lacks: beta, once a step of this layer has set it
            for i in range(last, -1, -1):
                rebuilt, here = job.result(), job.here()
                current, following = rebuilt.previous, current
                if not may_repeat:
                    call.forget(i)
                # Begin to rebuild step i-1 ...
                if i > 0:
                    job = trail.start(session, position, i - 1, current, following)
                elif lane.overlaps and goes_on and call.follows:
                    trail.look_ahead(session, position - 1, (current, following))
                # ... while the gradients of step i are computed: g[i] = J^T g[i+1] + beta * g[i+2].
                with here, trail.observer.differentiating(position, i):
                    if i == 0:
                        trail.check(call.module, call.is_right(current, following))
                    grad_state, *grads = rebuilt.gradients(grad_current)
                    if grad_current is not None:
                        call.check_gradients(i, [grad_state, *grads])
                    totals = [_sum(total, grad) for total, grad in zip(totals, grads, strict=True)]
                    grad_previous = _sum(grad_state, grad_previous, scale)
                    grad_previous, grad_current, scale = grad_current, grad_previous, beta
                    if i == 0:
                        grad_previous = _sum(None, grad_previous, beta)
                del rebuilt, grad_state, grads
            trail.observer.layer_rebuilt(position, (current, following))
        if goes_on:
            trail.leave(position - 1, (current, following), grad_previous)
        else:
            totals = trail.settle(totals)
        return None, None, None, grad_current, *totals


def _sum(a: Tensor | None, b: Tensor | None, scale: float = 1.0) -> Any:
    """``a + scale * b``, where ``None`` is zero."""
    if b is None:
        return a
    if a is None:
        return b if scale == 1 else b * scale
    return torch.add(a, b, alpha=scale)
