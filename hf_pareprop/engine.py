"""Backpropagation through a chain of reversible layers without stored activations.

A layer is a sequence of steps (:data:`Step`), coupled as in :mod:`coupling`. The backward pass walks the chain from the
stored last pair of states. For step ``i``, given ``s[i]``, ``s[i+1]`` and the gradients of both,

    rebuild     Phi_i(s[i]), with its local graph;  s[i-1] = (s[i+1] - Phi_i(s[i])) / beta
    gradients   g[i] = J_Phi_i(s[i])^T g[i+1] + beta * g[i+2]

An engine decides when rebuilding happens: see :class:`Autograd`, :class:`Reprop` and :class:`PaReprop`. All three run
the same arithmetic on the same numbers and yield the same gradients.

Nothing here knows transformers. What a layer has to do is call :meth:`Tape.layer` from its ``forward``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from .coupling import LayerPlan, advance, advance_undoably, enter, fuse, phi, read, retreat
from .lanes import Lane, Session, inline_lane, side_lane
from .replay import Moment
from .retention import Retention

Step = Callable[..., tuple[Tensor, Tensor]]
"""``step(state, *inputs) -> (residual, branch)``: a sub-block without its residual connection.

``state`` is the current state, in the compute dtype but at least fp32 (a conventional layer gets its stock input);
``residual`` is what the stock model would add to ``branch``. All have the same shape. A step must be a deterministic
function of its arguments, of the layer's parameters, and of random numbers from the global generators.
"""

Pair = tuple[Tensor, Tensor]
"""``(s[i-1], s[i])``: two neighbouring states, all that the rest of the chain depends on."""


@dataclass
class Record:
    """What one call of one layer leaves for its backward: everything but activations.

    ``sides`` are the side bits of each step, which undoing it needs; with ``keeps_products``, products are not rebuilt.
    """

    module: nn.Module
    steps: Sequence[Step]
    plan: LayerPlan
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    keeps_products: bool = False
    parameters: tuple[Tensor, ...] = ()
    moments: list[Moment] = field(default_factory=list)
    sides: list[list[Tensor]] = field(default_factory=list)

    def run(self, previous: Tensor, current: Tensor, undoable: bool = False) -> Pair:
        """The layer's forward; if ``undoable``, remembering the ambient state and the side bits of each step."""
        for step in self.steps:
            moment = Moment(current.device, self.keeps_products)
            work = partial(self._phi, step, read(current, self.dtype), self.inputs)
            if undoable:
                following, sides = advance_undoably(moment.record(work), previous, self.plan)
                self.moments.append(moment)
                self.sides.append(sides)
            else:
                following = advance(moment.run(work), previous, self.plan)
            previous, current = current, following
        return previous, current

    def rebuild(self, index: int, current: Tensor, following: Tensor, wants_gradient: bool) -> "Rebuilt":
        """Step ``index`` once more, from ``s[i]`` and ``s[i+1]``: its local graph and ``s[i-1]``."""
        state = read(current, self.dtype).detach().requires_grad_(wants_gradient)
        inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in self.inputs)
        parameters = tuple(named_parameters_of(self.module).values())
        work: Callable[[], Tensor] = partial(self._phi, self.steps[index], state, inputs)
        if any(p._backward_hooks for p in parameters):
            parameters, work = _aliased(self.module, work)
        with torch.enable_grad():
            value = self.moments[index].replay(work)
        with torch.no_grad():
            previous = retreat(value, following, self.plan, self.sides[index])
        # The graph alone is kept: what its last operation yields has served.
        graph = get_gradient_edge(value) if value.requires_grad else None
        return Rebuilt((state, *inputs, *parameters), graph, value.dtype, previous)

    def kept(self) -> list[list[Tensor]]:
        """What each step keeps until it is undone: its side bits, and results of products."""
        return [
            [*sides, *(moment.products.results if moment.products else ())]
            for sides, moment in zip(self.sides, self.moments, strict=True)
        ]

    def forget(self, index: int) -> None:
        """Free what step ``index``, which is undone, needed for that."""
        self.sides[index] = []
        self.moments[index].products = None

    def resident(self) -> bool:
        """Whether the module holds the parameters it held in the forward pass, rather than a shard of them."""
        now = tuple(named_parameters_of(self.module).values())
        return len(now) == len(self.parameters) and all(
            a is b and a.untyped_storage().nbytes() > 0 for a, b in zip(now, self.parameters, strict=True)
        )

    def _phi(self, step: Step, state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return phi(*step(state, *inputs), self.plan.beta)


@dataclass
class Rebuilt:
    """A step's local graph, from ``sources`` (state, inputs, parameters) to Phi, of ``dtype``; and s[i-1]."""

    sources: tuple[Tensor, ...]
    graph: GradientEdge | None
    dtype: torch.dtype
    previous: Tensor

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """``J_Phi^T grad``: one gradient per source, ``None`` where there is none. Frees the graph."""
        if self.graph is None:
            return [None] * len(self.sources)
        wanted = [t for t in self.sources if t.requires_grad]
        found = iter(torch.autograd.grad([self.graph], wanted, [grad.to(self.dtype)], allow_unused=True))
        return [next(found) if t.requires_grad else None for t in self.sources]


class Tape:
    """One forward pass through a chain of layers, and the states rebuilt from it in the backward pass.

    A tape belongs to one forward pass: two forwards before a backward, nested or interleaved models and evaluation in
    between each have their own. It is kept alive by the autograd graph and by nothing else.

    Args:
        engine: one of :data:`ENGINES`.
        plans: the coupling of every layer, from :func:`coupling.plan_layers`.
        retention: how many of the last layers keep their graphs, and how many below those their products; by default none.
    """

    dtype: torch.dtype
    """The compute dtype: that of the embeddings."""

    def __init__(self, engine: "Engine", plans: Sequence[LayerPlan], retention: Retention | None = None):
        self.engine = engine
        self.plans = plans
        self.retention = retention or Retention()
        self.graphs_from = self.products_from = len(plans)
        self.records: dict[int, Record] = {}
        self.pairs: dict[int, Pair] = {}
        self.ahead: dict[int, Any] = {}

    def start(self, embeddings: Tensor) -> Pair:
        """The first pair, ``s[-1] = s[0] = embeddings``; their dtype becomes the compute dtype."""
        self.dtype = embeddings.dtype
        graphs, products = self.retention.plan(embeddings, self.plans)
        self.graphs_from = len(self.plans) - graphs
        self.products_from = self.graphs_from - products
        return embeddings, embeddings

    @torch.compiler.disable  # a compiled forward and an eager recomputation would differ in bits
    def layer(
        self,
        index: int,
        module: nn.Module,
        steps: Sequence[Step],
        previous: Tensor,
        current: Tensor,
        inputs: tuple[Tensor, ...] = (),
    ) -> Pair:
        """Apply layer ``index`` to a pair of states and return the next pair, of the same shape.

        To be called from ``module.forward``, so that what wraps modules (FSDP2, hooks) is in place.

        Args:
            module: owner of the parameters that ``steps`` use.
            steps: two or more.
            inputs: tensors that steps read besides the state and may need a gradient; passed to every step.
        """
        plan = self.plans[index]
        if not plan.reversible:
            return _conventional(steps, current.to(self.dtype), inputs)
        if plan.opens:
            previous, current = enter(previous, plan), enter(current, plan)
        elif current.dtype != (expected := torch.promote_types(plan.state_dtype, self.dtype)):
            raise RuntimeError(
                f"layer {index} got its states in {current.dtype}, the layer below returned {expected}: something casts "
                "inputs of layers, and the states could not be rebuilt. With FSDP2 set cast_forward_inputs=False in the "
                "MixedPrecisionPolicy."
            )
        record = Record(module, steps, plan, self.dtype, inputs)
        return self.engine.layer(self, index, record, previous, current)

    def rebuilt(self, index: int, pair: Pair) -> None:
        """Take the inputs of layer ``index``, rebuilt in its backward: the outputs of the layer below."""
        if not self.plans[index].opens:
            self.pairs[index - 1] = pair

    def look_ahead(self, index: int, session: Session) -> None:
        """Begin to rebuild the last step of layer ``index`` before its own backward is called.

        Only where its states and parameters already are: under FSDP2 and ZeRO-3 the parameters come with the layer's
        own backward, and a model may be spread over devices.
        """
        record, pair = self.records[index], self.pairs[index]
        if record.resident() and record.moments[-1].device == pair[0].device:
            self.ahead[index] = session.start(partial(record.rebuild, len(record.steps) - 1, *pair, True))

    def finish(self, previous: Tensor, current: Tensor, after: int = -1) -> Tensor:
        """The hidden state that the pair after layer ``after`` stands for, in the compute dtype."""
        return fuse(previous, current, self.plans[after].beta).to(self.dtype)


def _conventional(steps: Sequence[Step], current: Tensor, inputs: tuple[Tensor, ...]) -> Pair:
    """A stock layer: the residual is added back, activations are stored by autograd."""
    previous = current
    for step in steps:
        residual, branch = step(current, *inputs)
        previous, current = current, residual + branch
    return previous, current


class Engine(Protocol):
    """How one reversible layer is run, and with it how it is differentiated."""

    def layer(self, tape: Tape, index: int, record: Record, previous: Tensor, current: Tensor) -> Pair: ...


class Autograd:
    """Store every activation and let autograd do the rest: the reference for the other two.

    Prefer it when memory is no concern, and where the others cannot work: higher-order gradients, hidden states or
    attention maps as outputs, activation checkpointing.
    """

    def layer(self, tape: Tape, index: int, record: Record, previous: Tensor, current: Tensor) -> Pair:
        return record.run(previous, current)


class Reprop:
    """Store one pair of states per segment and rebuild the rest, step by step, on the caller's thread and stream.

    Least memory: one step's graph is alive at a time, and ``m`` bits per element and step at ``beta = 2**-m``. Costs one more
    forward per step, like activation checkpointing. Cannot do higher-order gradients.

    Gomez et al. 2017, arXiv 1707.04585, algorithm 1.
    """

    lane: Callable[[torch.device], Lane] = staticmethod(inline_lane)

    def layer(self, tape: Tape, index: int, record: Record, previous: Tensor, current: Tensor) -> Pair:
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
    if name not in ENGINES:
        raise ValueError(f"backward_engine={name!r} is unknown: use one of {', '.join(map(repr, ENGINES))}.")
    return ENGINES[name]


def named_parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` as they are now, by name, each once.

    The replicas that ``nn.DataParallel`` makes have no registered parameters; theirs are kept under another name.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, submodule in module.named_modules():
        for name, parameter in getattr(submodule, "_former_parameters", submodule._parameters).items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{prefix}.{name}" if prefix else name, parameter))
    return dict(found.values())


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


def _aliased(module: nn.Module, work: Callable[[], Tensor]) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
    """``work`` with aliases in place of the parameters of ``module``.

    A tensor hook on a parameter runs for every gradient computed with respect to it, so also for the local one that an
    engine takes on its way; the hook must see the parameter's gradient once.
    """
    aliases = {n: p.detach().requires_grad_(p.requires_grad) for n, p in named_parameters_of(module).items()}

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return work()

    call = {f"module.{name}": alias for name, alias in aliases.items()}
    return tuple(aliases.values()), lambda: functional_call(Call(), call, ())
