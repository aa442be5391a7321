"""Backpropagation through a chain of reversible layers without stored activations.

A layer is a sequence of steps (:data:`Step`), coupled as in :mod:`coupling`. The backward pass walks the chain from the
stored last pair of states. For step ``i``, given ``s[i]``, ``s[i+1]`` and the gradients of both,

    rebuild     Phi_i(s[i]), with its local graph;  s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    gradients   g[i] = J_Phi_i(s[i])^T g[i+1] + beta * g[i+2]

An engine decides when rebuilding happens: see :class:`Autograd`, :class:`Reprop` and :class:`PaReprop`. All three run
the same arithmetic on the same numbers and yield the same gradients.

Nothing here knows transformers. What a layer has to do is call :meth:`Tape.layer` from its ``forward``.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .lanes import Lane, inline_lane, side_lane
from .layer_call import LayerCall, Pair, named_parameters_of
from .plan import check_engine
from .tape import Engine, Tape


class Autograd:
    """Store every activation and let autograd do the rest: the reference for the other two.

    Prefer it when memory is no concern, and where the others cannot work: higher-order gradients, hidden states or
    attention maps as outputs, activation checkpointing.
    """

    def layer(self, tape: Tape, index: int, record: LayerCall, previous: Tensor, current: Tensor) -> Pair:
        return record.run(previous, current)


class Reprop:
    """Store one pair of states per segment and rebuild the rest, step by step, on the caller's thread and stream.

    Least memory: one step's graph is alive at a time, and ``m`` bits per element and step at ``beta = 2**-m``. Costs one more
    forward per step, like activation checkpointing. Cannot do higher-order gradients.

    Gomez et al. 2017, arXiv 1707.04585, algorithm 1.
    """

    lane: Callable[[torch.device], Lane] = staticmethod(inline_lane)

    def layer(self, tape: Tape, index: int, record: LayerCall, previous: Tensor, current: Tensor) -> Pair:
        parameters = tuple(named_parameters_of(record.module).values())
        sources = (previous, current, *record.inputs, *parameters)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
            return record.run(previous, current)
        if index >= tape.graphs_from:
            return tape.retention.run(partial(record.run, previous, current), parameters)
        record.inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in record.inputs)
        record.parameters = parameters
        record.keeps_products = index >= tape.products_from
        tape.records[index] = record
        previous, current = _RebuiltLayer.apply(tape, index, *sources)
        if record.plan.closes or index + 1 == tape.graphs_from:
            previous, current = _Anchor.apply(tape, index, previous, current)
        return previous, current


class PaReprop(Reprop):
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


class _Anchor(torch.autograd.Function):
    """Stores the pair from which the backward pass starts rebuilding a segment; passes gradients through."""

    @staticmethod
    def forward(ctx, tape: Tape, index: int, previous: Tensor, current: Tensor) -> Pair:
        ctx.tape, ctx.index = tape, index
        ctx.save_for_backward(previous, current)
        return previous.view_as(previous), current.view_as(current)

    @staticmethod
    def backward(ctx, grad_previous: Tensor, grad_current: Tensor):
        ctx.tape.pairs[ctx.index] = ctx.saved_tensors
        return None, None, grad_previous, grad_current


class _RebuiltLayer(torch.autograd.Function):
    """One reversible layer: keeps no states, and rebuilds them from the pair that the layer above leaves on the tape."""

    @staticmethod
    def forward(ctx, tape: Tape, index: int, previous: Tensor, current: Tensor, *tensors: Tensor) -> Pair:
        ctx.tape, ctx.index = tape, index
        # Not for their values, which are read from the module, but so that autograd notices when one was modified.
        ctx.save_for_backward(*tensors)
        return tape.records[index].run(previous, current, undoable=True)

    @staticmethod
    def backward(ctx, grad_previous: Tensor, grad_current: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True needs activations that the engines 'reprop' and 'pareprop' do not store: call "
                "model.set_backward_engine('autograd') before the forward pass."
            )
        tape, index = ctx.tape, ctx.index
        record = tape.records[index]
        beta = record.plan.beta
        wants_state = any(ctx.needs_input_grad[2:4])
        _ = ctx.saved_tensors  # raises if a parameter was modified, or if the graph was freed
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: there may be a second backward
        totals: list[Tensor | None] = [None] * (len(record.inputs) + len(record.parameters))

        lane = tape.engine.lane(grad_current.device)
        with lane.session() as session:
            current, following = (state.to(grad_current.device) for state in tape.pairs.pop(index))
            last = len(record.steps) - 1
            job = tape.ahead.pop(index, None) or session.start(
                partial(record.rebuild, last, current, following, last > 0 or wants_state)
            )
            scale = 1.0  # what grad_previous still has to be multiplied by: beta where a step of this layer left it
            for i in range(last, -1, -1):
                rebuilt, here = job.result(), job.here()
                current, following = rebuilt.previous, current
                if not again:
                    record.forget(i)
                # Begin to rebuild step i-1 ...
                if i > 0:
                    job = session.start(partial(record.rebuild, i - 1, current, following, i > 1 or wants_state))
                elif wants_state:
                    tape.rebuilt(index, (current, following))
                    if lane.overlaps and not record.plan.opens:
                        tape.look_ahead(index - 1, session)
                # ... while the gradients of step i are computed: g[i] = J^T g[i+1] + beta * g[i+2].
                with here:
                    grad_state, *grads = rebuilt.gradients(grad_current)
                    totals = [_sum(total, grad) for total, grad in zip(totals, grads, strict=True)]
                    if grad_state is not None:
                        grad_previous = torch.add(grad_state, grad_previous, alpha=scale)
                    grad_previous, grad_current, scale = grad_current, grad_previous, beta
                    if i == 0 and beta != 1:
                        grad_previous = grad_previous * beta
                del rebuilt, grad_state, grads
        return None, None, grad_previous, grad_current, *totals


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
