"""Backpropagation through a chain of reversible layers without stored activations.

Layers take and return one tensor, the hidden state: ``s[i]``, decoded. Autograd sees a plain chain of hidden states. The
neighbour ``s[i-1]`` travels beside it on the :class:`~tape.Tape`, and in the backward pass the rebuilt states and the
gradient of ``s[i-1]`` travel on the :class:`Trail`. For step ``i``, given ``s[i]``, ``s[i+1]`` and the gradients of both,

    rebuild     Phi_i(s[i]), with its local graph;  s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    gradients   g[i] = J_Phi_i(s[i])^T g[i+1] + beta * g[i+2]

Three autograd Functions carry everything: :class:`Enter`, where the pair leaves the sight of autograd, the
:class:`RebuiltLayer`, and :class:`Leave`, where the pair is stored and autograd knows both of its states again.

An engine decides when rebuilding happens: see :class:`Autograd`, :class:`Reprop` and :class:`PaReprop`. All three run
the same arithmetic on the same numbers and yield the same gradients. Nothing here knows transformers.
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
    "Something was computed otherwise than before. Likely causes: the attention implementation was switched between the "
    "forward pass and its backward; an input such as the attention mask was overwritten; another thread draws random numbers "
    "while dropout is replayed; the layer is not a function of its inputs. Avoid that, or call "
    "model.set_backward_engine('autograd') before the forward pass, which stores activations."
)


class Engine:
    """How reversible layers are run, and with it how they are differentiated.

    Attributes:
        rebuilds: whether layers are rebuilt in the backward pass, instead of storing their activations.
        lane: where rebuilds run, by device.
    """

    rebuilds = True
    lane: Callable[[torch.device], Lane] = staticmethod(inline_lane)


class Autograd(Engine):
    """Store every activation and let autograd do the rest: the reference for the other two.

    Prefer it when memory is no concern, and where the others cannot work: higher-order gradients, attention maps as
    outputs, transforms of ``torch.func``.
    """

    rebuilds = False


class Reprop(Engine):
    """Store one pair of states per segment and rebuild the rest, step by step, on the caller's thread and stream.

    Least memory: one step's graph is alive at a time, and ``m`` bits per element and step at ``beta = 2**-m``. Costs one more
    forward per step, like activation checkpointing. Cannot do higher-order gradients.

    Gomez et al. 2017, arXiv 1707.04585, algorithm 1.
    """


class PaReprop(Engine):
    """Rebuild step ``i-1`` on another lane while the gradients of step ``i`` are computed.

    The same work and the same numbers as :class:`Reprop`, with two steps' graphs alive. Faster where one step does not
    fill the device: small batches, short sequences, narrow models.

    Zhu & Mangalam 2023, arXiv 2306.09342, section 3.2.
    """

    lane = staticmethod(side_lane)


ENGINES: dict[str, Engine] = {"autograd": Autograd(), "reprop": Reprop(), "pareprop": PaReprop()}


def get_engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    check_engine(name)
    return ENGINES[name]


class Trail:
    """What the backward pass of one forward pass needs: calls of layers, and what one leaves for the one below it.

    Autograd nodes keep it alive and nothing else does. It holds no tensor with a graph of its own pass, which would keep
    itself alive.
    """

    def __init__(self, engine: Engine, observer: Observer, findings: Findings):
        self.engine, self.observer, self.findings = engine, observer, findings
        self.calls: dict[int, LayerCall] = {}
        self._ahead: dict[int, Job] = {}
        self._left: dict[int, tuple[int, Pair, Tensor | None]] = {}
        self._verdict: Tensor | None = None

    def leave(self, position: int, pair: Pair, grad_previous: Tensor | None) -> None:
        """For the layer at ``position``: the pair that it returned, and the gradient of the first of the two."""
        self._left[position] = backward_pass(), pair, grad_previous

    def take(self, position: int) -> tuple[Pair, Tensor | None]:
        """What was left for ``position`` in this backward pass.

        Raises:
            RuntimeError: nothing, or by another backward pass.
        """
        task, pair, grad = self._left.pop(position, (None, None, None))
        if task != backward_pass() or pair is None:
            raise RuntimeError(
                "the backward pass came to a reversible layer, but not from the layers above it: a loss on what one layer "
                "returned, taken by other means than a forward hook or output_hidden_states, needs "
                "model.set_backward_engine('autograd')."
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

        Only where its states and parameters already are: under FSDP2 and ZeRO-3 the parameters come with the layer's
        own backward, and a model may be spread over devices.
        """
        call = self.calls[position]
        if call.is_resident() and call.device == pair[0].device and call.conditions_hold():
            self._ahead[position] = self.start(session, position, len(call.steps) - 1, *pair)

    def begun(self, position: int) -> Job | None:
        """The rebuild that :meth:`look_ahead` began for ``position``."""
        return self._ahead.pop(position, None)

    def check(self, module: nn.Module, right: Tensor) -> None:
        """Take the answer to whether a layer was rebuilt rightly, a 0-d bool. On a GPU it is left there, for :meth:`settle`.

        Raises:
            RuntimeError: on a CPU, if it was not.
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
        """Where a chain of rebuilt layers ends: ``gradients``, which become NaN if any layer was rebuilt wrongly.

        Nobody waits for the device: the next call of the model raises.
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
    """From here on layers are rebuilt: the gradient of ``previous`` comes on the trail.

    Forward: the hidden state and the state before it, both decoded; returns the hidden state.
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
    """Stores the pair from which the backward pass starts rebuilding; puts the gradient of ``previous`` on the trail.

    Forward: the hidden state after layer ``position``, as autograd knows it, and the pair; returns both states decoded, in
    new memory, since hooks of others may write to it.
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
    """One reversible layer: keeps no states, and rebuilds them from the pair that the layer above leaves on the trail.

    Forward: the state that the layer's call computed, the hidden state that it read, and the call's sources; returns the
    state, decoded.
    """

    @staticmethod
    def forward(ctx: Any, trail: Trail, position: int, bits: Tensor, hidden: Tensor, *sources: Tensor) -> Tensor:
        ctx.trail, ctx.position = trail, position
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zeros: an optimizer tells them apart
        # Not for their values, but so that autograd notices when one was modified.
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

        # Flags of PyTorch hold for all threads: where a rebuild has to change them, gradients wait for it.
        lane = (trail.engine.lane if call.conditions_hold() else inline_lane)(call.device)
        with lane.session() as session:
            job = trail.begun(position) or trail.start(session, position, last, current, following)
            scale = 1.0  # what grad_previous still has to be multiplied by: beta where a step of this layer left it
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
