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

from .coupling import advance, checksum, decode, phi, retreat, straight_through
from .memory_probe import SavedBytes
from .plan import LayerPlan
from .replay import Conditions, StepContext, uncached_autocast
from .torch_private import has_gradient_hooks, own_parameters, version_of

Step = Callable[..., tuple[Tensor, Tensor]]
"""``step(state, *inputs) -> (residual, branch)``: a sub-block without its residual connection.

``state`` is the current state, in the compute dtype but at least fp32 (a conventional layer gets its stock input);
``residual`` is what the stock model would add to ``branch``. All have the same shape. A step must be a deterministic
function of its arguments, of the layer's parameters, and of random numbers from the global generators.
"""

Pair = tuple[Tensor, Tensor]
"""``(s[i-1], s[i])``: two neighbouring states, all that the rest of the chain depends on; int32."""

AUTOGRAD = "call model.set_backward_engine('autograd') before the forward pass, which stores activations."


class State(NamedTuple):
    """A state in the forward pass.

    Attributes:
        bits: int32, in units of the grid.
        value: decoded, with its autograd graph; ``None`` where its gradient travels beside the hidden state.
        needs_gradient: whether anything that it was computed from does.
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
        modules: the module itself, and those inside it.
        parameters: by name, each once.
        buffers: the same.
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
        for kind, own in ((self.parameters, own_parameters(module)), (self.buffers, module._buffers)):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in self._seen:
                    self._seen.add(id(tensor))
                    kind[prefix + name] = tensor
                    self._places.append((own, name, tensor))
        for name, inner in module._modules.items():
            if inner is not None:
                self._add(inner, f"{prefix}{name}.")

    def is_there(self) -> bool:
        """Whether the modules still hold these very tensors: not so within ``torch.func.functional_call``."""
        return all(place.get(name) is tensor for place, name, tensor in self._places)


def named_parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` as they are now, by name, each once."""
    return Contents(module).parameters


@dataclass
class LayerCall:
    """A call of a layer: all that its backward pass needs but states.

    Attributes:
        module: the layer.
        inputs: what its steps read besides the state; tensors among them may need a gradient.
        held: what the layer held in the forward pass.
        device: of the layer.
        saves_linears: whether results of linear layers are kept and not computed again.
        opens: whether its first two states are one and the same, as where a segment opens.
        follows: whether the layer below is rebuilt too and continues with the pair that this one rebuilds.
    """

    module: nn.Module
    steps: Sequence[Step]
    plan: LayerPlan
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    held: Contents
    device: torch.device
    saves_linears: bool = False
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

    def run(self, previous: State, current: State) -> tuple[State, State, Tensor]:
        """The layer's forward, stored by autograd: the next two states, and the peak of all."""
        grid_bits, peaks = self.plan.grid_bits, []
        # Two uses of a state within the chain are added up before those of others, as where the layer is rebuilt.
        current = State.of(current.bits, _node(value_of(current)))
        for step in self.steps:
            with uncached_autocast(self.device):
                value = self._phi(step, _node(value_of(current)), self.inputs)
            bits, _, peak = advance(value.detach(), previous.bits, self.plan)
            terms = (1.0, value), (self.plan.beta, value_of(previous))
            previous, current = current, State.of(bits, straight_through(bits, grid_bits, self.dtype, *terms))
            peaks.append(peak)
        return previous, current, _highest(peaks)

    def run_undoably(
        self, previous: State, current: State, meter: SavedBytes | None = None
    ) -> tuple[State, State, Tensor]:
        """The layer's forward without a graph: the next two states, and the peak of all.

        Args:
            meter: counts what autograd would save.

        Raises:
            RuntimeError: a step depends on what its rebuilding would not give a gradient to, or changes its buffers.
        """
        peaks = []
        with self._recording(meter):
            if not self.opens:
                self._checksum = checksum(*self._witnesses(previous.bits, current.bits, current.needs_gradient))
            for step in self.steps:
                state = _leaf(current.value) if current.value is not None else self._read(current.bits)
                value = self._record(partial(self._phi, step), state.requires_grad_(current.needs_gradient))
                needs_gradient = value.requires_grad or previous.needs_gradient
                with torch.no_grad():
                    bits, sides, peak = advance(value.detach(), previous.bits, self.plan, keep=True)
                del value, state
                self._sides.append(sides)
                peaks.append(peak)
                previous, current = current._replace(value=None), State(bits, None, needs_gradient)
        return previous, current, _highest(peaks)

    def rebuild(self, index: int, current: Tensor, following: Tensor) -> "RebuiltStep":
        """Step ``index`` once more, from ``s[i]`` and ``s[i+1]``: its local graph and ``s[i-1]``."""
        value, sources = self._replay(index, partial(self._phi, self.steps[index]), self._read(current))
        with torch.no_grad():
            previous = retreat(value, following, self.plan, self._sides[index])
        # The graph alone is kept: what its last operation yields has served.
        return RebuiltStep(sources, graph_of(value), value.dtype, previous)

    @contextmanager
    def _recording(self, meter: SavedBytes | None) -> Iterator[None]:
        """The forward pass of the layer: its inputs become leaves, its conditions are noted, its buffers must not change."""
        versions = [version_of(buffer) for buffer in self.held.buffers.values()]
        self.inputs = tuple(_leaf(t) for t in self.inputs)
        self._conditions = Conditions(self.held.modules, self.device)
        self._meter = meter
        yield
        self._meter = None
        for (name, buffer), version in zip(self.held.buffers.items(), versions, strict=True):
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"{type(self.module).__name__} changes its buffer {name} in its forward pass, so it cannot be run again in "
                    f"the backward pass: {AUTOGRAD}"
                )

    def _record(self, work: Callable[..., Tensor], state: Tensor) -> Tensor:
        """``work(state, inputs)``, remembering all that it needs to run again.

        It does have a graph while it runs, the one that it has when it is rebuilt: PyTorch chooses kernels by what requires
        a gradient, and the graph says what the step depends on.
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
        """What :meth:`_record` returned, once more, with its graph; and the leaves of that: state, inputs, parameters."""
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
        """What is kept until the steps are undone: side bits, and results of linear layers."""
        linears = (context.linears.results for context in self._contexts if context.linears)
        return [tensor for tensors in (*self._sides, *linears) for tensor in tensors]

    def forget(self, index: int) -> None:
        """Free what step ``index``, which is undone, needed for that."""
        self._sides[index] = []
        self._contexts[index].linears = None

    def is_right(self, previous: Tensor, current: Tensor) -> Tensor:
        """Whether a rebuilt pair is the one that the layer began on: a 0-d bool."""
        if self._checksum is None:
            right = (previous == current).all()
        else:
            right = checksum(*self._witnesses(previous, current, self._state_needs[0])) == self._checksum
        linears, self._linears_right = self._linears_right, []
        return torch.stack([right, *linears]).all() if linears else right

    @staticmethod
    def _witnesses(previous: Tensor, current: Tensor, goes_on: bool) -> tuple[Tensor, ...]:
        """The states of a pair that a checksum is of.

        The one rebuilt last depends on the other. Where the backward pass goes on below, errors of the other that this one
        does not show become errors of what is rebuilt next.
        """
        return (previous,) if goes_on else (previous, current)

    def check_gradients(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """
        Args:
            gradients: of a step, one for its state and one for each of :attr:`sources`.

        Raises:
            RuntimeError: the step depends on something in the forward pass and not in the backward pass, or the other way.
        """
        promised = self._promised[step]
        for i, gradient in enumerate(gradients):
            if (gradient is not None) == (i in promised):
                continue
            if gradient is None and i > 0 and not self.sources[i - 1].requires_grad:
                continue  # frozen since: autograd leaves it without a gradient, too
            inputs = len(self.sources) - len(self.held.parameters)
            name = ["its state", *["an input"] * inputs, *self.held.parameters][i]
            raise RuntimeError(
                f"{type(self.module).__name__} used {name} in {'the forward' if i in promised else 'the backward'} pass alone, so "
                "its gradients would be wrong: an adapter was switched, a module replaced, parameters were moved or a flag was "
                f"changed in between. Keep them, or {AUTOGRAD}"
            )

    def conditions_hold(self) -> bool:
        """Whether a rebuild runs as the forward pass did without anything being set for it."""
        return self._contexts[0].conditions.hold()

    def is_resident(self) -> bool:
        """Whether the module has the parameters of the forward pass at hand, rather than shards of them."""
        return self.held.is_there() and all(p.untyped_storage().nbytes() > 0 for p in self.held.parameters.values())

    def _read(self, bits: Tensor) -> Tensor:
        return decode(bits, self.plan.grid_bits, self.dtype)

    def _phi(self, step: Step, state: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        return phi(*step(state, *inputs), self.plan.beta)

    def _note_sources(self, value: Tensor, state: Tensor) -> None:
        """Read off the graph of ``value`` which sources it depends on."""
        sources = (state, *self.sources)
        found, stranger = dependencies(value, sources)
        if stranger is not None:
            raise RuntimeError(
                f"{type(self.module).__name__} uses {stranger}, which requires a gradient and is neither a parameter of the "
                "layer nor an input of its steps, so rebuilding the layer would lose its gradient. FSDP1 and the hooks of some "
                f"offloaders hide parameters like this: use FSDP2, or {AUTOGRAD}"
            )
        self._promised.append(found)

    def _with_aliases(self, work: Callable[[], Tensor]) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        """``work`` with aliases of the forward pass's parameters, and its buffers, in place of those of the module.

        A tensor hook on a parameter runs for every gradient computed with respect to it, so also for the local one that
        an engine takes on its way; the hook must see the parameter's gradient once.
        """
        aliases = {name: _leaf(parameter) for name, parameter in self.held.parameters.items()}
        call = _Call(self.module, work)
        given = {f"module.{name}": tensor for name, tensor in {**aliases, **self.held.buffers}.items()}
        return tuple(aliases.values()), lambda: functional_call(call, given, ())


class _Call(nn.Module):
    """``work`` as the forward of a module around ``module``, so that its parameters can be replaced meanwhile."""

    def __init__(self, module: nn.Module, work: Callable[[], Tensor]):
        super().__init__()
        self.module = module
        self.work = work

    def forward(self) -> Tensor:
        return self.work()


@dataclass
class RebuiltStep:
    """A step's local graph, from ``sources`` (state, inputs, parameters) to Phi, of ``dtype``; and s[i-1].

    Of a layer that changes the shape of the hidden state: its graph, and what it computed.
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
    """Which of ``sources`` a result was computed from, by its autograd graph, and what else that requires a gradient."""
    leaves = {id(t): i for i, t in enumerate(sources) if t.requires_grad and t.grad_fn is None}
    inner = {(t.grad_fn, t.output_nr): i for i, t in enumerate(sources) if t.grad_fn is not None}
    found: set[int] = set()
    if result.grad_fn is None:  # nothing was computed
        return ({leaves[id(result)]} if id(result) in leaves else found), None
    edges: list[tuple[Any, int]] = [(result.grad_fn, 0)]
    seen: set[Any] = set()
    while edges:
        edge = edges.pop()
        if edge in inner:
            found.add(inner[edge])
            continue
        node = edge[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is None:
            edges.extend(node.next_functions)
        elif id(leaf) in leaves:
            found.add(leaves[id(leaf)])
        else:
            return found, f"a tensor of shape {tuple(leaf.shape)}"
    return found, None


def graph_of(value: Tensor) -> GradientEdge | None:
    """The autograd graph that ends in ``value``, without ``value``."""
    return get_gradient_edge(value) if value.requires_grad else None


def _node(value: Tensor) -> Tensor:
    """``value`` behind an autograd node of its own, where its gradient is summed up."""
    return value.view_as(value)


def _leaf(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _highest(peaks: Sequence[Tensor]) -> Tensor:
    highest = peaks[0]
    for peak in peaks[1:]:
        highest = torch.maximum(highest, peak)
    return highest


def _drop(tensor: Tensor) -> None:
    """Saves nothing: the graph is there to be read and thrown away."""


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
        RuntimeError: the backward pass under way is to be differentiated in turn, or can have no graphs.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"a backward pass within torch.inference_mode() cannot rebuild layers: leave that mode before it, or {AUTOGRAD}"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True needs activations that the engines 'reprop' and 'pareprop' do not store: " + AUTOGRAD
        )
