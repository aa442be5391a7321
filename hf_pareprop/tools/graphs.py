"""A training step as one CUDA graph, for batches of one shape."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cuda_rng import Schedule

WARM_UPS = 3
"""Ordinary passes before the capture, in which libraries choose kernels and budgets of memory are found."""


class GraphedStep:
    """Forward, backward and, if an optimizer is given, its step, captured once and launched as a whole.

    It pays where the host launches kernels more slowly than the device runs them: small batches, narrow models, and
    the two lanes of ``pareprop``. Losses, gradients and weights are those of the same steps run one by one, with dropout
    too: the generators advance alike and obey ``torch.manual_seed``. Works with every engine and with stock models.

    Cannot do: batches of other shapes, losses that the host looks at within a step (gradient scaling), models spread
    over devices. A padding mask makes some versions of transformers look at it on the host, which a capture refuses.

    Args:
        model: on CUDA, in training mode.
        batch: tensors, with labels, of the shapes and dtypes of all batches to come; of any content.
        optimizer: with ``capturable=True``, and with the state that its first step makes. Without one, gradients are
            left in ``.grad``.
        autocast: the dtype to compute in; ``None`` for that of the weights.

    Raises:
        ValueError: the model is not on CUDA, the optimizer is not capturable or has no state, or there is no loss.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), capturable=True, fused=True)
        >>> model(**batch).loss.backward()  # one ordinary step, which makes the optimizer's state
        >>> optimizer.step()
        >>> step = GraphedStep(model, batch, optimizer, autocast=torch.bfloat16)
        >>> loss = step(**next_batch)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        autocast: torch.dtype | None = None,
    ):
        if model.device.type != "cuda":
            raise ValueError(f"the model is on {model.device}: CUDA graphs need it on a CUDA device.")
        if optimizer is not None:
            check_capturable(optimizer)
        self._model, self._autocast = model, autocast
        self._optimizer = optimizer  # whose state the graph writes to
        self._batch = {name: tensor.to(model.device, copy=True) for name, tensor in batch.items()}
        generator = torch.cuda.default_generators[model.device.index]
        self._schedule = Schedule(generator)
        self._graph = torch.cuda.CUDAGraph()
        found = generator.get_state()
        with _on_a_side_stream(model.device):
            for _ in range(WARM_UPS):
                model.zero_grad(set_to_none=True)
                with self._schedule.learning():
                    loss = self._forward()
                loss.backward()
        model.zero_grad(set_to_none=True)  # so that the graph makes gradients, and does not add to them
        del loss
        with self._schedule.followed(self._graph), torch.cuda.graph(self._graph):
            loss = self._forward()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        generator.set_state(found)
        self._loss = loss.detach()
        self._gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def __call__(self, **batch: Tensor) -> Tensor:
        """One training step.

        Returns:
            The loss, a scalar on the device, which the next step overwrites.

        Raises:
            ValueError: the batch has other names, shapes or dtypes than that of the capture.
        """
        check_like(batch, self._batch)
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        for parameter, gradient in self._gradients:  # which zero_grad() may have taken away
            parameter.grad = gradient
        self._schedule.set_out()
        self._graph.replay()
        return self._loss

    def _forward(self) -> Tensor:
        with torch.autocast("cuda", self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            outputs = self._model(**self._batch)
        if outputs.get("loss") is None:
            raise ValueError(f"{type(self._model).__name__} yields no loss for {', '.join(self._batch)}: add labels.")
        return outputs.loss


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        ValueError: a captured step of ``optimizer`` would fail, or begin anew at every replay.
    """
    name = type(optimizer).__name__
    if any(not group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(f"{name} has capturable=False: a CUDA graph needs {name}(..., capturable=True).")
    if not optimizer.state:
        raise ValueError(
            f"{name} has no state yet, and a graph would make it anew at every replay: take one ordinary step before."
        )


def check_like(batch: Mapping[str, Tensor], captured: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: the two have other names, shapes or dtypes.
    """
    found, wanted = (
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (batch, captured)
    )
    if found != wanted:
        raise ValueError(
            f"the batch is {found}, but the graph was captured for {wanted}: drop the last incomplete batch, pad to one "
            "shape, or make a GraphedStep for every shape."
        )


@contextmanager
def _on_a_side_stream(device: torch.device) -> Iterator[None]:
    caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        yield
    caller.wait_stream(stream)
