"""All private interfaces of PyTorch that the package uses. Each has a fallback for versions that lack it.

This code is saved with checkpoints, and they have to load with future versions of PyTorch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
except ImportError:  # without it nothing is intercepted: kept results are computed again, with the same bits

    class DispatchMode:  # type: ignore[no-redef]
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            pass


try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:
    FakeTensor = None  # type: ignore[assignment, misc]

try:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as leave_transforms
except ImportError:
    leave_transforms = None  # type: ignore[assignment]

__all__ = ["DispatchMode"]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no data. If PyTorch does not say, no tensor is taken to be fake."""
    return FakeTensor is not None and isinstance(tensor, FakeTensor)


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is active. If PyTorch does not say, the answer is no."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active())


def transforming() -> bool:
    """Whether ``torch.func`` transforms operations, or ``torch.jit.trace`` traces them, instead of just running them."""
    return torch.jit.is_tracing() or in_functorch()


def keeps_graph() -> bool:
    """Whether the current backward pass keeps the graph for a second one. If PyTorch does not say, the answer is yes."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(keeps()) if keeps else True


NO_PASS = -1
"""The number of no backward pass. Somebody may look at what a node saved outside of one."""


def backward_pass() -> int:
    """A number that identifies the current backward pass; :data:`NO_PASS` if there is none, or if PyTorch does not say."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task() if task and hasattr(torch.autograd.Variable, "_execution_engine") else NO_PASS


def at_end_of_backward(work: Callable[[], None]) -> None:
    """Have ``work`` called once when the current backward pass ends, also if it ends by an exception."""
    torch.autograd.Variable._execution_engine.queue_callback(_Once(work))  # type: ignore[attr-defined]


class _Once:
    """PyTorch calls this at the end of a backward pass. If the pass fails, it throws this away without a call."""

    _work: Callable[[], None] | None = None

    def __init__(self, work: Callable[[], None]):
        self._work = work

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()

    __del__ = __call__


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave the transforms of ``torch.func``, and the ``vmap`` of ``is_grads_batched=True``, for what is not batched.

    Raises:
        RuntimeError: this version of PyTorch has no function for it.
    """
    if in_functorch() and leave_transforms is None:
        raise RuntimeError(
            "this version of PyTorch cannot rebuild layers within torch.vmap: compute the gradients one after the other, or call "
            "model.set_backward_engine('autograd') before the forward pass."
        )
    deeper: Callable[[], int] | None = getattr(torch._C, "_vmapmode_increment_nesting", None)
    if deeper is None:  # within is_grads_batched=True, PyTorch then refuses to draw random numbers
        level = 0
    else:
        level = deeper() - 1
        torch._C._vmapmode_decrement_nesting()
    for _ in range(level):
        torch._C._vmapmode_decrement_nesting()
    try:
        with leave_transforms() if leave_transforms is not None and in_functorch() else nullcontext():
            yield
    finally:
        for _ in range(level):
            torch._C._vmapmode_increment_nesting()


def compile_for_each_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with two guarantees: every shape gets its own code, and sums have a fixed order.

    After ``variants`` compiled variants of the function, PyTorch gives up and runs it uncompiled.
    """

    def backend(graph: Any, inputs: Any) -> Any:
        mode = torch.get_deterministic_debug_mode()
        # Otherwise atomic additions would sum the gradients of tables, in another order each time. The setting holds only here,
        # so the code for the backward pass has to be generated here as well, and not when it first runs.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        finally:
            torch.set_deterministic_debug_mode(mode)

    variants = 64  # enough for a Swin: two kinds of step, with shifted windows or without, in four stages
    compiled: Any = torch.compile
    try:
        return compiled(function, dynamic=False, backend=backend, recompile_limit=variants)
    except TypeError:  # before PyTorch 2.13 the limit can only be set for all functions
        import torch._dynamo.config as config

        config.recompile_limit = max(config.recompile_limit, variants)
        return compiled(function, dynamic=False, backend=backend)


def free_workspaces() -> None:
    """Make cuBLAS free its workspaces, if PyTorch has a function for that."""
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if free:
        free()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; 0 for tensors of the inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, in the same order."""
    return (
        a.device == b.device
        and a.dtype == b.dtype
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
    )


def owner_of(tensor: Tensor) -> int:
    """The ``id`` of the tensor that a tensor is a view of, or of the tensor itself."""
    base = tensor._base
    return id(tensor if base is None else base)


def storage_key(tensor: Tensor) -> int:
    """A number that identifies the memory of a tensor among all tensors that are alive."""
    return tensor.untyped_storage()._cdata


def local_part(parameter: Tensor) -> Tensor:
    """The shard of a DTensor in this process; any other tensor unchanged."""
    return getattr(parameter, "_local_tensor", parameter)


def in_data_parallel_forward() -> bool:
    """Whether ``DistributedDataParallel`` runs this forward pass. If PyTorch does not say, the answer is no."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    active = getattr(wrapper, "_get_active_ddp_module", None)
    return bool(active and active() is not None)


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of a module, without those of its children. Replicas of ``nn.DataParallel`` store them elsewhere."""
    return vars(module).get("_former_parameters", module._parameters)


def hook_tables(modules: Iterable[nn.Module]) -> Iterator[dict[int, Any]]:
    """The tables of hooks that see the inputs or outputs of these modules. Those of all modules come first."""
    every = torch.nn.modules.module
    tables = (getattr(every, "_global_forward_hooks", {}), getattr(every, "_global_forward_pre_hooks", {}))
    yield from filter(None, tables)
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            yield module._forward_hooks
            yield module._forward_pre_hooks


FLAT_PARAMETER = "_flat_param"
"""FSDP1's name for the one parameter that holds all parameters of a module. The module computes with views of it."""


def views_of_flat_parameter(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that FSDP1 may have put in place of the module's own parameters, as plain attributes, by name."""
    if "_is_fsdp_managed_module" not in vars(module):
        return {}
    return {name: view for name, view in vars(module).items() if isinstance(view, Tensor)}


def sdp_priority() -> list[int] | None:
    """The order in which PyTorch tries its attention kernels; ``None`` if it does not say."""
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return list(order()) if order else None


def set_sdp_priority(order: list[int] | None) -> None:
    if order is not None:
        torch._C._set_sdp_priority_order(order)


def matmul_precision() -> str | None:
    """The precision of fp32 products. ``None`` if it was set through two interfaces: PyTorch then refuses to tell it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def generators(device: torch.device) -> list[Any]:
    """The global random number generators that a computation on ``device`` may use.

    Each has ``get_state()`` and ``set_state(state)``. If a device gives no access to its generator, these call functions of
    the device's module in PyTorch.
    """
    found: list[Any] = [torch.default_generator]
    if device.type in ("cpu", "meta"):
        return found
    module: Any = torch.get_device_module(device)
    defaults = getattr(module, "default_generators", ())
    if device.type == "mps":
        found.append(_OfModule(module))
    elif defaults and device.index is not None and device.index < len(defaults):
        found.append(defaults[device.index])
    else:
        found.append(_OfModule(module, device))
    return found


class _OfModule:
    def __init__(self, module: Any, *device: torch.device):
        self._module, self._device = module, device

    def get_state(self) -> Tensor:
        return self._module.get_rng_state(*self._device)

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, *self._device)


def has_hooks_after_accumulation(parameter: Tensor) -> bool:
    """Whether a function runs as soon as the gradient of ``parameter`` was accumulated. Many take the gradient away."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def store(tensor: Tensor) -> tuple[Tensor, int]:
    """A pack hook that keeps a tensor saved. Its counterpart is :func:`stored`."""
    # Not the tensor itself: a node that saves its own result would keep itself alive.
    return tensor.detach(), version_of(tensor)


def stored(found: tuple[Tensor, int]) -> Tensor:
    """An unpack hook that checks the tensor's version, as PyTorch does where there are no hooks.

    Raises:
        RuntimeError: the tensor was modified in place after it had been saved.
    """
    tensor, version = found
    if version_of(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
            f"{tuple(tensor.shape)}. Return a new tensor instead."
        )
    return tensor
