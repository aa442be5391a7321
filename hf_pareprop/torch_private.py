"""Every private interface of PyTorch that the package uses, each with what happens where it is missing.

This code is frozen into checkpoints, which have to load with versions of PyTorch that are not written yet.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
except ImportError:  # then nothing is intercepted: results that were kept are computed again, with the same bits

    class DispatchMode:  # type: ignore[no-redef]
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            pass


try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:
    FakeTensor = None  # type: ignore[assignment, misc]

__all__ = ["DispatchMode"]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no data; assumed of none where PyTorch does not say."""
    return FakeTensor is not None and isinstance(tensor, FakeTensor)


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way; assumed not where PyTorch does not say."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active())


def transforming() -> bool:
    """Whether operations are transformed or traced rather than run: by ``torch.func`` or ``torch.jit.trace``."""
    return torch.jit.is_tracing() or in_functorch()


def keeps_graph() -> bool:
    """Within a backward pass, whether a second one may follow; where PyTorch does not say, it may."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(keeps()) if keeps else True


def backward_pass() -> int:
    """A number of the backward pass under way; where PyTorch does not say, they all have the same."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task() if task else 0


def let_streams_differ() -> None:
    """Have PyTorch not warn where gradients come from another stream than a parameter's first use: lanes mean it."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)  # since 2.10
    if warn:
        warn(False)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; tensors of the inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, in the same order."""
    return (
        a.device == b.device
        and a.dtype == b.dtype
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
    )


def storage_key(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others that are alive."""
    return tensor.untyped_storage()._cdata


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether ``tensor.register_hook`` was called on a tensor."""
    return bool(getattr(tensor, "_backward_hooks", None))


def gradient_is_consumed(parameter: Tensor) -> bool:
    """Whether hooks take the gradient of a parameter away as soon as it exists."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def local_part(parameter: Tensor) -> Tensor:
    """Of a DTensor, the shard of this process."""
    return getattr(parameter, "_local_tensor", parameter)


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of a module itself; the replicas of ``nn.DataParallel`` keep theirs under another name."""
    return getattr(module, "_former_parameters", module._parameters)


def forward_hooks(module: nn.Module | None = None) -> Iterator[Any]:
    """The hooks that see the inputs or outputs of a module, or of all modules."""
    if module is None:
        every = torch.nn.modules.module
        yield from getattr(every, "_global_forward_hooks", {}).values()
        yield from getattr(every, "_global_forward_pre_hooks", {}).values()
    else:
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()


def sdp_priority() -> list[int] | None:
    """In which order PyTorch tries the kernels of attention; ``None`` where it does not say."""
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return list(order()) if order else None


def set_sdp_priority(order: list[int] | None) -> None:
    if order is not None:
        torch._C._set_sdp_priority_order(order)


def matmul_precision() -> str | None:
    """How fp32 products are computed; ``None`` where it was set through two interfaces, which PyTorch then refuses to read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def generators(device: torch.device) -> list[Any]:
    """The global random number generators that a computation on ``device`` may draw from, each with two C methods.

    ``get_state()`` and ``set_state(state)``; where a device hides its generator, the functions of its module.
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
