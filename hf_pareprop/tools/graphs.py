"""Capture a training step in one CUDA graph, for batches of one shape."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cuda_rng import Schedule, offset_of
from ..findings import Check, collected
from .mask_decisions import MaskDecisions

WARM_UPS = 3
"""The number of ordinary passes before the capture. In these, libraries choose kernels and memory budgets are measured."""

Batch = Mapping[str, Tensor]


class Capture:
    """A CUDA graph of what a function launches, typically a forward and a backward pass.

    The function is rehearsed as an ordinary one at least once, which shows where it draws random numbers and which attention
    masks transformers leaves out. Then it is captured, and then replayed as often as you like. Replays also repeat the checks
    that layers were rebuilt right: a failed one raises an error in a later replay.

    Args:
        work: takes a batch on the device, and returns a loss.
        names: the names of the tensors in a batch.
        device: a CUDA device with an index.

    Attributes:
        rehearsals: how often the function was rehearsed.
    """

    def __init__(self, work: Callable[[Batch], Tensor], names: Iterable[str], device: torch.device):
        self._work, self._device = work, device
        self._generator = torch.cuda.default_generators[device.index]
        self._schedule, self._masks = Schedule(self._generator), MaskDecisions(names)
        self._graph = torch.cuda.CUDAGraph()
        self._batch: Batch = {}
        self._checks: list[Check] = []
        self._drawn = 0
        self.rehearsals = 0
        self._loss: Tensor | None = None

    def rehearse(self, batch: Batch) -> Tensor:
        """Run ``work`` on ``batch`` as it is, and learn from it."""
        before = offset_of(self._generator)
        with self._schedule.learning(), self._masks.learned():
            loss = self._work(batch)
        self._drawn = offset_of(self._generator) - before
        self.rehearsals += 1
        return loss

    def record(self, batch: Batch, pool: Any = None) -> None:
        """Capture ``work``. Nothing runs, and no random numbers are drawn.

        Args:
            batch: tensors on the device, of the shapes and dtypes of all later batches.
            pool: the memory pool of another graph, which never runs at the same time; default: a pool of its own.

        Raises:
            RuntimeError: ``work`` does what a graph cannot repeat: it reads tensors on the host, or draws random numbers there.
        """
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        found, stream = self._generator.get_state(), torch.cuda.current_stream(self._device)
        try:
            with (
                no_draws_on_the_host(),
                collected() as self._checks,
                self._schedule.followed(self._graph),
                self._masks.followed(),
                # Other threads may call CUDA meanwhile, as the one does that pins batches for a DataLoader.
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
            ):
                loss = self._work(self._batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured in a CUDA graph: {error} A captured step must not read tensors on the "
                "host (`.item()`, a condition on a tensor, a metric, a debugger). Take ordinary steps, as transformers.Trainer does."
            ) from error
        finally:
            torch.cuda.set_stream(stream)  # a failed capture may leave its own stream behind
            self._generator.set_state(found)
        self._loss = loss.detach()

    @property
    def recorded(self) -> bool:
        """Whether the function was captured."""
        return self._loss is not None

    @property
    def pool(self) -> Any:
        """The memory pool of the graph."""
        return self._graph.pool()

    def replay(self, batch: Batch) -> Tensor:
        """Run ``work`` on ``batch``. Returns the loss, which the next replay overwrites.

        Raises:
            ValueError: the batch has other names, shapes or dtypes than the captured batch.
            RuntimeError: nothing was captured; an earlier replay rebuilt a layer wrongly; or the graph draws other random
                numbers than the rehearsal drew, so that gradients would be wrong.
        """
        if self._loss is None:
            raise RuntimeError("nothing was captured: call record() first.")
        check_like(batch, self._batch)
        for check in self._checks:
            check.settle()
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        self._schedule.set_out()
        before = offset_of(self._generator)
        self._graph.replay()
        if (drawn := offset_of(self._generator) - before) != self._drawn:
            raise RuntimeError(
                f"the captured step drew {drawn} random numbers and the ordinary step before it {self._drawn}: it ran other "
                "kernels. Take ordinary steps, and please report this."
            )
        for check in self._checks:
            check.expect()
        return self._loss


@contextmanager
def no_draws_on_the_host() -> Iterator[None]:
    """
    Raises:
        RuntimeError: at the end, if random numbers were drawn on the host. A graph would repeat what was decided by them.
    """

    def states() -> list[Any]:
        of_numpy: Any = numpy.random.get_state(legacy=True)
        return [torch.get_rng_state().tolist(), random.getstate(), [*of_numpy[1], *of_numpy[2:]]]

    found = states()
    yield
    if states() != found:
        raise RuntimeError(
            "it draws random numbers on the host, as LayerDrop does, and a graph would repeat one draw."
        )


class GraphedStep:
    """A training step that is captured once in a CUDA graph and then launched as a whole.

    It consists of the forward pass, the backward pass and, if an optimizer is given, the optimizer's step. It is faster than
    an ordinary step if the host launches kernels more slowly than the device runs them: with small batches, narrow models,
    and the two lanes of ``pareprop``. Losses, gradients and weights are those of ordinary steps, also with dropout: the
    random number generators advance in the same way and obey ``torch.manual_seed``. It works with every engine and with stock
    models.

    It does not work for batches of other shapes, for losses that the host reads within a step (gradient scaling), and for
    models spread over several devices. With a padding mask some versions of transformers read the mask on the host, which is
    an error during a capture. Other versions give attention the mask of every batch that brings one; an ordinary step leaves
    out a mask that hides nothing, and so may round otherwise.

    Args:
        model: a model on CUDA, in training mode.
        batch: tensors, with labels, of the shapes and dtypes of all later batches. The values do not matter.
        optimizer: an optimizer with ``capturable=True`` that has made one step, so that its state exists. Without an
            optimizer, gradients are left in ``.grad``.
        autocast: the dtype to compute in; ``None`` for that of the weights.

    Raises:
        ValueError: the model is not on CUDA, the optimizer is not capturable or has no state, or the model returns no loss.
        RuntimeError: the step does what a graph cannot repeat, such as reading tensors on the host.

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
        batch: Batch,
        optimizer: torch.optim.Optimizer | None = None,
        autocast: torch.dtype | None = None,
    ):
        if model.device.type != "cuda":
            raise ValueError(f"the model is on {model.device}: CUDA graphs need it on a CUDA device.")
        if optimizer is not None:
            check_capturable(optimizer)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        # The function also keeps the optimizer alive, because the graph writes to its state.
        self._capture = Capture(partial(_forward_backward, model, optimizer, autocast), batch, model.device)
        generator = torch.cuda.default_generators[model.device.index]
        found = generator.get_state()
        with _on_a_side_stream(model.device):
            for _ in range(WARM_UPS):
                model.zero_grad(set_to_none=True)
                self._capture.rehearse(batch)
        generator.set_state(found)
        model.zero_grad(set_to_none=True)  # so that the graph creates gradients, instead of adding to them
        self._capture.record(batch)
        self._gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def __call__(self, **batch: Tensor) -> Tensor:
        """Run one training step.

        Returns:
            The loss, a scalar on the device. The next step overwrites it.

        Raises:
            ValueError: the batch has other names, shapes or dtypes than the captured batch.
            RuntimeError: an earlier step rebuilt a layer wrongly. Its gradients are NaN then.
        """
        for parameter, gradient in self._gradients:  # zero_grad() may have removed them
            parameter.grad = gradient
        return self._capture.replay(batch)


def _forward_backward(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, autocast: torch.dtype | None, batch: Batch
) -> Tensor:
    with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
        outputs = model(**batch)
    if outputs.get("loss") is None:
        raise ValueError(f"{type(model).__name__} yields no loss for {', '.join(batch)}: add labels.")
    loss: Tensor = outputs.loss
    loss.backward()
    if optimizer is not None and torch.cuda.is_current_stream_capturing():
        optimizer.step()
    return loss


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if a captured step of ``optimizer`` would fail, or would reset its state at every replay."""
    name = type(optimizer).__name__
    if any(not group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(f"{name} has capturable=False: a CUDA graph needs {name}(..., capturable=True).")
    if not optimizer.state:
        raise ValueError(
            f"{name} has no state yet, and a graph would create it again at every replay: take one ordinary step before."
        )


def check_like(batch: Mapping[str, Tensor], captured: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the two batches differ in names, shapes or dtypes."""
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
