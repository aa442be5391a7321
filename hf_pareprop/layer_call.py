"""One call of one layer: how its steps run in the forward pass, and how they run again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.func import functional_call

from .compiled_steps import compiled_phi_of_step, phi_of_step
from .coupling import advance, checksum, decode, retreat, straight_through
from .memory_probe import SavedBytes
from .plan import LayerPlan
from .replay import Conditions, StepContext, uncached_autocast
from .torch_private import FLAT_PARAMETER, has_gradient_hooks, own_parameters, version_of, views_of_flat_parameter

Step = Callable[..., tuple[Tensor, Tensor] | Tensor]
"""A step: ``step(state, *inputs) -> (residual, branch)`` for a sub-block, or ``-> after`` for a whole layer.

A sub-block leaves out its residual connection. ``state`` is the current state, in the compute dtype but at least fp32 (a
conventional layer gets its stock input). ``residual`` is what the stock model would add to ``branch``. ``after`` is the
hidden state that the stock layer returns. All have the same shape. A step must be a deterministic function of its arguments,
of the layer's parameters, and of random numbers from the global generators.
"""

Pair = tuple[Tensor, Tensor]
"""``(s[i-1], s[i])``: two neighbouring states, int32. The rest of the chain depends on nothing else."""

AUTOGRAD = "call model.set_backward_engine('autograd') before the forward pass, which stores activations."


class State(NamedTuple):
    """A state in the forward pass.

    Attributes:
        bits: int32, in units of the grid.
        value: the state decoded, with its autograd graph; ``None`` where its gradient travels beside the hidden state.
        needs_gradient: whether anything that the state was computed from needs a gradient.
    """

    bits: Tensor
    value: Tensor | None
    needs_gradient: bool

    @classmethod
    def of(cls, bits: Tensor, value: Tensor) -> "State":
        return cls(bits, value, value.requires_grad)


def value_of(state: State) -> Tensor:
    """The value of a state that has one."""
    assert state.value is not None
    return state.value


class Contents:
    """What a module holds now.

    Attributes:
        modules: the module itself, and the modules inside it.
        parameters: its parameters by name, each once.
        buffers: its buffers by name, each once.
    """

    def __init__(self, module: nn.Module):
        self.modules: list[nn.Module] = []
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []
        self._seen: set[int] = set()
        self._add(module, "")
        del self._seen

    def _add(self, module: nn.Module, prefix: str) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self.modules.append(module)
        self._note(self.parameters, own_parameters(module), prefix)
        if views := views_of_flat_parameter(module):
            self._note(self.parameters, views, prefix)
        self._note(self.buffers, module._buffers, prefix)
        for name, inner in module._modules.items():
            if inner is not None:
                self._add(inner, f"{prefix}{name}.")

    def _note(self, kind: dict[str, Tensor], own: dict[str, Any], prefix: str) -> None:
        for name, tensor in own.items():
            if tensor is not None and name != FLAT_PARAMETER and id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                kind[prefix + name] = tensor
                self._places.append((own, name, tensor))

    def is_there(self) -> bool:
        """Whether the modules still hold these very tensors. Within ``torch.func.functional_call`` they do not."""
        return all(place.get(name) is tensor for place, name, tensor in self._places)


def named_parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ``module`` holds now, by name, each once."""
    return Contents(module).parameters


@dataclass
class LayerCall:
    """A call of a layer: everything that its backward pass needs, except states.

    Attributes:
        module: the layer.
        inputs: what its steps read besides the state; tensors among them may need a gradient.
        held: what the layer held in the forward pass.
        device: the device of the layer.
        saves_linears: whether results of linear layers are kept, so that a rebuild does not compute them again.
        compiles: whether steps run as compiled code.
        opens: whether the layer opens a segment, so that its first two states are the same state.
        follows: whether the layer below is rebuilt as well, and continues with the pair that this one rebuilds.
    """

    module: nn.Module
    steps: Sequence[Step]
    plan: LayerPlan
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    held: Contents
    device: torch.device
    saves_linears: bool = False
    compiles: bool = False
    opens: bool = False
    follows: bool = False
    _contexts: list[StepContext] = field(default_factory=list)
    _sides: list[list[Tensor]] = field(default_factory=list)
    _state_needs: list[bool] = field(default_factory=list)
    _promised: list[set[int]] = field(default_factory=list)
    _conditions: Any = None
    _meter: SavedBytes | None = None
    _checksum: Tensor | None = None
    _linears_right: list[Tensor] = field(default_factory=list)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the layer computes from besides the states, in the order of :attr:`RebuiltStep.sources`."""
        return (*(t for t in self.inputs if isinstance(t, Tensor)), *self.held.parameters.values())

    def run(self, previous: State, current: State, peak: Tensor) -> tuple[State, State, Tensor]:
        """Run the layer's forward, stored by autograd. Returns the next two states, and ``peak`` raised to their peaks."""
        grid_bits = self.plan.grid_bits
        # The gradients of both uses of a state within the chain are added up first, before gradients from elsewhere. A
        # rebuilt layer adds them in the same order.
        current = State.of(current.bits, _node(value_of(current)))
        for step in self.steps:
            with uncached_autocast(self.device):
                value = self._phi(step, _node(value_of(current)), self.inputs)
            bits, _, peak = advance(value.detach(), previous.bits, self.plan, peak)
            terms = (1.0, value), (self.plan.beta, value_of(previous))
            previous, current = current, State.of(bits, straight_through(bits, grid_bits, self.dtype, *terms))
        return previous, current, peak

    def run_undoably(
        self, previous: State, current: State, peak: Tensor, meter: SavedBytes | None = None
    ) -> tuple[State, State, Tensor]:
        """Run the layer's forward without a graph, so that it can be undone later. Returns the same as :meth:`run`.

        Args:
            meter: counts what autograd would save.

        Raises:
            RuntimeError: a step uses a tensor that would get no gradient when the step is rebuilt, or changes its buffers.
        """
        with self._recording(meter):
            if not self.opens:
                self._checksum = checksum(*self._witnesses(previous.bits, current.bits, current.needs_gradient))
            for step in self.steps:
                state = _leaf(current.value) if current.value is not None else self._read(current.bits)
                value = self._record(partial(self._phi, step), state.requires_grad_(current.needs_gradient))
                needs_gradient = value.requires_grad or previous.needs_gradient
                with torch.no_grad():
                    bits, sides, peak = advance(value.detach(), previous.bits, self.plan, peak, keep=True)
                del value, state
                self._sides.append(sides)
                previous, current = current._replace(value=None), State(bits, None, needs_gradient)
        return previous, current, peak

    def rebuild(self, index: int, current: Tensor, following: Tensor) -> "RebuiltStep":
        """Run step ``index`` again, from ``s[i]`` and ``s[i+1]``. Returns its local graph and ``s[i-1]``."""
        value, sources = self._replay(index, partial(self._phi, self.steps[index]), self._read(current))
        with torch.no_grad():
            previous = retreat(value, following, self.plan, self._sides[index])
        # Only the graph is kept. The value of Phi has done its work, and its memory can be freed.
        return RebuiltStep(sources, graph_of(value), value.dtype, previous)

    @contextmanager
    def _recording(self, meter: SavedBytes | None) -> Iterator[None]:
        """Wrap the layer's forward pass: its inputs become leaves, its conditions are noted, its buffers must not change."""
        versions = [version_of(buffer) for buffer in self.held.buffers.values()]
        self.inputs = tuple(_leaf(t) for t in self.inputs)
        self._conditions = Conditions(self.held.modules, self.device)
        self._meter = meter
        yield
        self._meter = None
        self._conditions.note_flags()
        for (name, buffer), version in zip(self.held.buffers.items(), versions, strict=True):
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"{type(self.module).__name__} changes its buffer {name} in its forward pass, so it cannot be run again in "
                    f"the backward pass: {AUTOGRAD}"
                )

    def _record(self, work: Callable[..., Tensor], state: Tensor) -> Tensor:
        """Return ``work(state, inputs)``, and remember everything that is needed to run it again.

        While it runs it has the same graph as when it is rebuilt, for two reasons: PyTorch chooses kernels by what requires
        a gradient, and the graph tells what the step depends on.
        """
        self._state_needs.append(state.requires_grad)
        if state.requires_grad:
            state.register_hook(_refuse_gradient)
        context = StepContext(self._conditions, self.saves_linears)
        self._contexts.append(context)
        pack = _drop if self._meter is None else self._meter.hold
        with torch.enable_grad(), saved_tensors_hooks(pack, _refuse_use):
            value = context.record(partial(work, state, self.inputs))
            self._note_sources(value, state)
        if self._meter is not None:
            self._meter.let_go()
        return value

    def _replay(self, index: int, work: Callable[..., Tensor], state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute again what :meth:`_record` returned, with its graph. Also returns the leaves: state, inputs, parameters."""
        state.requires_grad_(self._state_needs[index])
        inputs = tuple(_leaf(t) for t in self.inputs)
        parameters = tuple(self.held.parameters.values())
        run: Callable[[], Tensor] = partial(work, state, inputs)
        if not self.held.is_there() or any(map(has_gradient_hooks, parameters)):
            parameters, run = self._with_aliases(run)
        context = self._contexts[index]
        with torch.enable_grad():
            value = context.replay(run)
        if context.linears is not None:
            self._linears_right += context.linears.right
        return value, (state, *(t for t in inputs if isinstance(t, Tensor)), *parameters)

    def kept(self) -> list[Tensor]:
        """The tensors that are kept until the steps are undone: side bits, and results of linear layers."""
        linears = (context.linears.results for context in self._contexts if context.linears)
        return [tensor for tensors in (*self._sides, *linears) for tensor in tensors]

    def forget(self, index: int) -> None:
        """Free what was kept to undo step ``index``, which has been undone."""
        self._sides[index] = []
        self._contexts[index].linears = None

    def is_right(self, previous: Tensor, current: Tensor) -> Tensor:
        """Whether a rebuilt pair is the pair that the layer began with, as a 0-d bool."""
        if self._checksum is None:
            right = (previous == current).all()
        else:
            right = checksum(*self._witnesses(previous, current, self._state_needs[0])) == self._checksum
        linears, self._linears_right = self._linears_right, []
        return torch.stack([right, *linears]).all() if linears else right

    @staticmethod
    def _witnesses(previous: Tensor, current: Tensor, goes_on: bool) -> tuple[Tensor, ...]:
        """The states of a pair that the checksum covers.

        ``previous`` was rebuilt last, and depends on ``current``. An error in ``current`` may not show in ``previous``. If the
        backward pass goes on to the layer below, such an error shows there, so ``previous`` is enough.
        """
        return (previous,) if goes_on else (previous, current)

    def check_gradients(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """
        Args:
            gradients: the gradients of a step, one for its state and one for each of :attr:`sources`.

        Raises:
            RuntimeError: the step used something in the forward pass and not in the backward pass, or the other way round.
        """
        promised = self._promised[step]
        for i, gradient in enumerate(gradients):
            if (gradient is not None) == (i in promised):
                continue
            if gradient is None and i > 0 and not self.sources[i - 1].requires_grad:
                continue  # it was frozen after the forward pass; autograd leaves it without a gradient as well
            inputs = len(self.sources) - len(self.held.parameters)
            name = ["its state", *["an input"] * inputs, *self.held.parameters][i]
            raise RuntimeError(
                f"{type(self.module).__name__} used {name} in {'the forward' if i in promised else 'the backward'} pass alone, "
                "so its gradients would be wrong: between the passes an adapter was switched, a module was replaced, parameters "
                f"were moved or a flag was changed. Leave them as they are until the backward pass is over, or {AUTOGRAD}"
            )

    def conditions_hold(self) -> bool:
        """Whether a rebuild would run as the forward pass did, without changing any flag or mode first."""
        return self._contexts[0].conditions.hold()

    def is_resident(self) -> bool:
        """Whether the module now holds the whole parameters of the forward pass, and not shards of them."""
        return self.held.is_there() and all(p.untyped_storage().nbytes() > 0 for p in self.held.parameters.values())

    def _read(self, bits: Tensor) -> Tensor:
        return decode(bits, self.plan.grid_bits, self.dtype)

    def _phi(self, step: Step, state: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        run = compiled_phi_of_step() if self.compiles else phi_of_step
        return run(step, state, inputs, self.plan.beta)

    def _note_sources(self, value: Tensor, state: Tensor) -> None:
        """Note which sources ``value`` depends on, according to its graph."""
        sources = (state, *self.sources)
        found, stranger = dependencies(value, sources)
        if stranger is not None:
            raise RuntimeError(
                f"{type(self.module).__name__} uses {stranger}, which requires a gradient and is neither a parameter of the "
                "layer nor an input of its steps, so rebuilding the layer would lose its gradient. FSDP1 and the hooks of some "
                f"offloaders hide parameters like this: use FSDP2, or whole layers as steps (steps='layer'), or {AUTOGRAD}"
            )
        self._promised.append(found)

    def _with_aliases(self, work: Callable[[], Tensor]) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        """``work`` with other tensors in the module: aliases of the forward pass's parameters, and its buffers.

        A tensor hook on a parameter runs for every gradient with respect to that parameter. An engine computes such a
        gradient for each step, but the hook must see the parameter's gradient once. Aliases have no hooks.
        """
        aliases = {name: _leaf(parameter) for name, parameter in self.held.parameters.items()}
        call = _Call(self.module, work)
        given = {f"module.{name}": tensor for name, tensor in {**aliases, **self.held.buffers}.items()}
        return tuple(aliases.values()), lambda: functional_call(call, given, ())


class _Call(nn.Module):
    """``work`` as the forward of a module around ``module``, so that ``functional_call`` can replace its parameters."""

    def __init__(self, module: nn.Module, work: Callable[[], Tensor]):
        super().__init__()
        self.module = module
        self.work = work

    def forward(self) -> Tensor:
        return self.work()


@dataclass
class RebuiltStep:
    """What rebuilding one step yields.

    Attributes:
        sources: the leaves of the step's local graph: state, inputs, parameters.
        graph: the local graph, from the sources to ``Phi``.
        dtype: the dtype of ``Phi``.
        previous: ``s[i-1]``; for a layer that changes the shape of the hidden state, what the layer computed.
    """

    sources: tuple[Tensor, ...]
    graph: GradientEdge | None
    dtype: torch.dtype
    previous: Tensor

    def gradients(self, grad: Tensor | None) -> list[Tensor | None]:
        """``J_Phi^T grad``: one gradient per source, ``None`` where there is none. Frees the graph."""
        wanted = [t for t in self.sources if t.requires_grad]
        if grad is None or self.graph is None or not wanted:
            return [None] * len(self.sources)
        found = iter(torch.autograd.grad([self.graph], wanted, [grad.to(self.dtype)], allow_unused=True))
        return [next(found) if t.requires_grad else None for t in self.sources]


def dependencies(result: Tensor, sources: Sequence[Tensor]) -> tuple[set[int], str | None]:
    """What the autograd graph of ``result`` depends on.

    Returns:
        The indices of the ``sources`` in the graph; and a description of another leaf that requires a gradient, or ``None``.
    """
    leaves = {id(t): i for i, t in enumerate(sources) if t.requires_grad and t.grad_fn is None}
    inner = {(t.grad_fn, t.output_nr): i for i, t in enumerate(sources) if t.grad_fn is not None}
    found: set[int] = set()
    if result.grad_fn is None:  # nothing was computed
        return ({leaves[id(result)]} if id(result) in leaves else found), None
    edges: list[tuple[Any, int]] = [(result.grad_fn, 0)]
    seen: set[Any] = {None}
    for edge in edges:  # the list grows while the loop runs
        if inner and edge in inner:
            found.add(inner[edge])
            continue
        node = edge[0]
        if node in seen:
            continue
        seen.add(node)
        if below := node.next_functions:
            edges.extend(below)
        elif (leaf := getattr(node, "variable", None)) is None:  # a node without inputs that is not a leaf
            continue
        elif id(leaf) in leaves:
            found.add(leaves[id(leaf)])
        else:
            return found, f"a tensor of shape {tuple(leaf.shape)}"
    return found, None


def graph_of(value: Tensor) -> GradientEdge | None:
    """The autograd graph that ends in ``value``, without a reference to ``value`` itself."""
    return get_gradient_edge(value) if value.requires_grad else None


def _node(value: Tensor) -> Tensor:
    """``value`` behind an autograd node of its own, in which the gradients of all its uses are summed."""
    return value.view_as(value)


def _leaf(value: Any) -> Any:
    """A tensor without its autograd history; any other value unchanged."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _drop(tensor: Tensor) -> None:
    """Save nothing. The graph is only read for its structure and then thrown away."""


def _refuse_use(nothing: None) -> Tensor:
    raise RuntimeError(
        "an activation inside a reversible layer is used outside of it, for example in an auxiliary loss, but the layer does "
        f"not store its activations: take it with a forward hook, so that the layer stores them, or {AUTOGRAD}"
    )


def _refuse_gradient(grad: Tensor) -> None:
    _refuse_use(None)


def check_backward_mode() -> None:
    """
    Raises:
        RuntimeError: the current backward pass is to be differentiated itself, or runs in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"a backward pass within torch.inference_mode() cannot rebuild layers: leave that mode before it, or {AUTOGRAD}"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True needs activations that the engines 'reprop' and 'pareprop' do not store: " + AUTOGRAD
        )
