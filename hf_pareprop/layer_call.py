"""One call of one layer: how its steps run, and how they are run again from their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from .coupling import advance, advance_undoably, phi, read, retreat
from .plan import LayerPlan
from .replay import StepContext

Step = Callable[..., tuple[Tensor, Tensor]]
"""``step(state, *inputs) -> (residual, branch)``: a sub-block without its residual connection.

``state`` is the current state, in the compute dtype but at least fp32 (a conventional layer gets its stock input);
``residual`` is what the stock model would add to ``branch``. All have the same shape. A step must be a deterministic
function of its arguments, of the layer's parameters, and of random numbers from the global generators.
"""

Pair = tuple[Tensor, Tensor]
"""``(s[i-1], s[i])``: two neighbouring states, all that the rest of the chain depends on."""


@dataclass
class LayerCall:
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
    contexts: list[StepContext] = field(default_factory=list)
    sides: list[list[Tensor]] = field(default_factory=list)

    def run(self, previous: Tensor, current: Tensor, undoable: bool = False) -> Pair:
        """The layer's forward; if ``undoable``, remembering the ambient state and the side bits of each step."""
        for step in self.steps:
            context = StepContext(current.device, self.keeps_products)
            work = partial(self._phi, step, read(current, self.dtype), self.inputs)
            if undoable:
                following, sides = advance_undoably(context.record(work), previous, self.plan)
                self.contexts.append(context)
                self.sides.append(sides)
            else:
                following = advance(context.run(work), previous, self.plan)
            previous, current = current, following
        return previous, current

    def rebuild(self, index: int, current: Tensor, following: Tensor, wants_gradient: bool) -> "RebuiltStep":
        """Step ``index`` once more, from ``s[i]`` and ``s[i+1]``: its local graph and ``s[i-1]``."""
        state = read(current, self.dtype).detach().requires_grad_(wants_gradient)
        inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in self.inputs)
        parameters = tuple(named_parameters_of(self.module).values())
        work: Callable[[], Tensor] = partial(self._phi, self.steps[index], state, inputs)
        if any(p._backward_hooks for p in parameters):
            parameters, work = _aliased(self.module, work)
        with torch.enable_grad():
            value = self.contexts[index].replay(work)
        with torch.no_grad():
            previous = retreat(value, following, self.plan, self.sides[index])
        # The graph alone is kept: what its last operation yields has served.
        graph = get_gradient_edge(value) if value.requires_grad else None
        return RebuiltStep((state, *inputs, *parameters), graph, value.dtype, previous)

    def kept(self) -> list[list[Tensor]]:
        """What each step keeps until it is undone: its side bits, and results of products."""
        return [
            [*sides, *(context.products.results if context.products else ())]
            for sides, context in zip(self.sides, self.contexts, strict=True)
        ]

    def forget(self, index: int) -> None:
        """Free what step ``index``, which is undone, needed for that."""
        self.sides[index] = []
        self.contexts[index].products = None

    def resident(self) -> bool:
        """Whether the module holds the parameters it held in the forward pass, rather than a shard of them."""
        now = tuple(named_parameters_of(self.module).values())
        return len(now) == len(self.parameters) and all(
            a is b and a.untyped_storage().nbytes() > 0 for a, b in zip(now, self.parameters, strict=True)
        )

    def _phi(self, step: Step, state: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return phi(*step(state, *inputs), self.plan.beta)


@dataclass
class RebuiltStep:
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
