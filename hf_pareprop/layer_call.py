"""One call of one layer: what the layer held and what it read, so that its steps can run again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .compiled_steps import compiled_phi_of_step, phi_of_step
from .memory_probe import SavedBytes
from .onlookers import watch
from .plan import LayerPlan
from .replay import Conditions
from .torch_private import (
    FLAT_PARAMETER,
    local_part,
    own_parameters,
    owner_of,
    version_of,
    views_of_flat_parameter,
)

StepFunction = Callable[..., tuple[Tensor, Tensor] | Tensor]
"""A step: ``step(state, *inputs) -> (residual, branch)`` for a sub-block, or ``-> after`` for a whole layer.

A sub-block leaves out its residual connection. ``state`` is the current state, in the compute dtype but at least fp32 (a
conventional layer gets its stock input). ``residual`` is what the stock model would add to ``branch``. ``after`` is the
hidden state that the stock layer returns. All have the same shape. A step must be a deterministic function of its arguments,
of the layer's parameters, and of random numbers from the global generators.
"""

AUTOGRAD = "call model.set_backward_engine('autograd') before the forward pass, which stores activations."


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
                if local_part(tensor) is tensor:
                    self._places.append((own, name, tensor))

    def is_there(self) -> bool:
        """Whether the modules still hold these very tensors. Within ``torch.func.functional_call`` they do not.

        Shards are left out: FSDP2 on parts of a layer puts the whole parameters in their place whenever a part runs.
        """
        return all(place.get(name) is tensor for place, name, tensor in self._places)


def named_parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ``module`` holds now, by name, each once."""
    return Contents(module).parameters


class LayerCall:
    """A call of a layer: everything that its steps need to run again, except states.

    Args:
        module: the layer.
        steps: the steps of the layer.
        plan: the coupling of the layer.
        dtype: the compute dtype.
        inputs: what the steps read besides the state; tensors among them may need a gradient.
        position: which layer it is, in the order of calls.
        device: the device of the layer.

    Attributes:
        held: what the layer holds in the forward pass.
        names: the names of its parameters, by their ``id``.
        has_onlookers: whether there are forward hooks of others inside the layer.
        saves_linears: whether results of linear layers are kept, so that a rebuild does not compute them again.
        compiles: whether steps run as compiled code.
        meter: counts what autograd would save, while the layer runs.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: Sequence[StepFunction],
        plan: LayerPlan,
        dtype: torch.dtype,
        inputs: tuple[Any, ...],
        position: int,
        device: torch.device,
    ):
        self.module, self.steps, self.plan, self.dtype = module, steps, plan, dtype
        self.inputs, self.position, self.device = inputs, position, device
        self.held = Contents(module)
        self.saves_linears = self.compiles = False
        self.meter: SavedBytes | None = None

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the layer computes from besides the state."""
        return (*(t for t in self.inputs if isinstance(t, Tensor)), *self.held.parameters.values())

    def phi(self, number: int, state: Tensor, *inputs: Any) -> Tensor:
        """``Phi`` of a step; of a layer that changes the shape of the hidden state, what the layer returns."""
        if self.plan.transition:
            return run_steps(self.steps, state, *inputs)
        if not self.compiles:
            return phi_of_step(self.steps[number], state, inputs, self.plan.beta)
        # PyTorch compiles other code for a parameter than for a tensor, and a rebuild gets tensors.
        inputs = tuple(value.clone() if isinstance(value, nn.Parameter) else value for value in inputs)
        return compiled_phi_of_step()(self.steps[number], state, inputs, self.plan.beta)

    # What follows is for layers that run again.

    def can_run_again(self) -> bool:
        """Whether the layer's parameters are there. ZeRO-3 brings those of each module inside it when that module runs."""
        return all(p.numel() for p in self.held.parameters.values())

    def begin(self, norm: nn.Module | None = None) -> None:
        """Note the conditions under which the layer runs, before it does.

        Args:
            norm: a module of another layer that this one runs.
        """
        # FSDP1's parameters are views of one tensor, and others in each pass.
        self.names = {id(p): name for name, p in self.held.parameters.items() if owner_of(p) == id(p)}
        # Hooks on the layer itself are outside of its steps.
        self.has_onlookers = watch([*self.held.modules[1:], *([] if norm is None else norm.modules())])
        self.conditions = Conditions(self.held.modules, self.device)
        self._buffer_versions = [version_of(buffer) for buffer in self.held.buffers.values()]

    def end(self) -> None:
        """Note what the layer read, after it has run.

        Raises:
            RuntimeError: the layer has changed its buffers.
        """
        self.conditions.note_flags()
        for (name, buffer), version in zip(self.held.buffers.items(), self._buffer_versions, strict=True):
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"{type(self.module).__name__} changes its buffer {name} in its forward pass, so it cannot be run again in "
                    f"the backward pass: {AUTOGRAD}"
                )
        # Without their graph, which would keep this call alive, and which this call would keep alive.
        self.inputs = tuple(map(_leaf, self.inputs))
        self._needs = {name: parameter.requires_grad for name, parameter in self.held.parameters.items()}
        self._modifications = [version_of(tensor) for tensor in self._read()]

    def _read(self) -> tuple[Tensor, ...]:
        return (*self.sources, *self.held.buffers.values())

    def check_unmodified(self) -> None:
        """
        Raises:
            RuntimeError: a parameter, a buffer or an input was modified in place after the forward pass.
        """
        if [version_of(tensor) for tensor in self._read()] != self._modifications:
            names = [*["an input"] * (len(self._modifications) - len(self.held.parameters) - len(self.held.buffers))]
            names += [*self.held.parameters, *self.held.buffers]
            name = next(
                n for n, t, v in zip(names, self._read(), self._modifications, strict=True) if version_of(t) != v
            )
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{name} of {type(self.module).__name__}, which is rebuilt in the backward pass. Modify it after that pass, as an "
                "optimizer does."
            )

    def again(self, work: Callable[..., Tensor]) -> tuple[Callable[[Tensor], Tensor], dict[int, str]]:
        """``work`` with the inputs and the parameters of the forward pass, and the names of these parameters.

        If the module now holds other parameters, or they need a gradient where they did not, it runs with aliases of those of
        the forward pass.
        """
        inputs, parameters = self.inputs, self.held.parameters
        if self.held.is_there() and all(p.requires_grad == self._needs[n] for n, p in parameters.items()):
            return lambda state: work(state, *inputs), self.names
        whole = {name: p for name, p in parameters.items() if local_part(p) is p}
        aliases = {name: p.detach().requires_grad_(self._needs[name]) for name, p in whole.items()}
        given = {f"module.{name}": tensor for name, tensor in {**aliases, **self.held.buffers}.items()}
        call = _Call(self.module, work)
        return lambda state: functional_call(call, given, (state, *inputs)), {
            id(aliases[name]): name for name in self.names.values() if name in aliases
        }

    def can_run_ahead(self) -> bool:
        """Whether the layer can run again before its own backward pass begins.

        PyTorch's flags are shared by all threads, so none may have to be changed. The module has to hold the whole parameters
        of the forward pass: under FSDP2 and ZeRO-3 they arrive with the layer's own backward pass.
        """
        parameters = self.held.parameters.values()
        there = self.held.is_there() and all(
            local_part(p) is p and p.untyped_storage().nbytes() > 0 for p in parameters
        )
        return there and self.conditions.hold()


def run_steps(steps: Sequence[StepFunction], hidden: Tensor, *inputs: Any) -> Tensor:
    """Run steps as the stock layer, with residual connections."""
    for step in steps:
        found = step(hidden, *inputs)
        hidden = found if isinstance(found, Tensor) else found[0] + found[1]
    return hidden


class _Call(nn.Module):
    """``work`` as the forward of a module around ``module``, so that ``functional_call`` can replace its parameters."""

    def __init__(self, module: nn.Module, work: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        self.work = work

    def forward(self, *args: Any) -> Tensor:
        return self.work(*args)


def _leaf(value: Any) -> Any:
    """A tensor without its autograd history; any other value unchanged."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
