"""Random numbers in CUDA graphs: at every replay, a rebuild has to draw the numbers that its forward pass has just drawn.

Outside of a graph, a rebuild sets the generator back to an earlier state. While a graph is captured, a generator does not
tell its state. But its numbers follow from a seed and an offset, and every reversible step draws at the same offset from the
start of the training step. A :class:`Schedule` learns these offsets, called distances, from an ordinary training step. In
the capture every step that draws gets a generator of its own for its rebuild. Before each replay that generator is set to
the offset of the global generator plus the step's distance.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .torch_private import DispatchMode

_schedule: ContextVar["Schedule | None"] = ContextVar("schedule", default=None)


def capturing(device: torch.device) -> bool:
    """Whether kernels launched on ``device`` are captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def schedule() -> "Schedule | None":
    """The schedule that is learned or followed in this context, if there is one."""
    return _schedule.get()


class Schedule:
    """Where the reversible steps of a training step draw their random numbers.

    Args:
        generator: the global generator of the device, ``torch.cuda.default_generators[index]``.

    Attributes:
        kept: what the ordinary forward pass kept instead of rebuilding it. The captured forward pass keeps the same.
    """

    kept: Any = None

    def __init__(self, generator: torch.Generator):
        self._generator = generator
        self._distances: list[int | None] = []  # one for each reversible step, None if the step draws nothing
        self._replicas: list[torch.Generator | None] = []
        self._next = 0
        self._start = 0

    @contextmanager
    def learning(self) -> Iterator[None]:
        """A context for an ordinary forward pass, from which the distances are learned."""
        self._distances.clear()
        _, self._start = seed_and_offset(self._generator.get_state())
        with self._current():
            yield

    def note(self, before: Tensor, drew: bool) -> None:
        """Note the next reversible step.

        Args:
            before: the state of the global generator before the step.
            drew: whether the step drew random numbers.
        """
        self._distances.append(seed_and_offset(before)[1] - self._start if drew else None)

    @contextmanager
    def followed(self, graph: Any) -> Iterator[None]:
        """A context for the same forward pass, captured into ``graph``. Enter it before the capture begins.

        Raises:
            RuntimeError: the number of captured steps is not the number of learned steps.
        """
        self._next = 0
        self._replicas = [None if d is None else self._generator.clone_state() for d in self._distances]
        if hasattr(graph, "register_generator_state"):  # since torch 2.13 a generator registers itself when it is used
            for replica in filter(None, self._replicas):
                graph.register_generator_state(replica)
        with self._current():
            yield
        if self._next != len(self._distances):
            raise RuntimeError(
                f"{self._next} reversible steps were captured, and {len(self._distances)} ran in the ordinary pass before: "
                "a captured forward pass has to run the same layers every time."
            )

    def take(self) -> torch.Generator | None:
        """The generator that the next reversible step has to be rebuilt with; ``None`` if it draws nothing."""
        if self._next == len(self._replicas):
            raise RuntimeError(
                f"more than {self._next} reversible steps are captured, but only {self._next} ran in the ordinary pass before: "
                "a captured forward pass has to run the same layers every time."
            )
        self._next += 1
        return self._replicas[self._next - 1]

    def set_out(self) -> None:
        """Prepare a replay: set the generator of every rebuild to the numbers that its step is about to draw."""
        seed, offset = seed_and_offset(self._generator.get_state())
        for distance, replica in zip(self._distances, self._replicas, strict=True):
            if distance is not None and replica is not None:
                replica.set_state(state_of(seed, offset + distance))

    @contextmanager
    def _current(self) -> Iterator[None]:
        token = _schedule.set(self)
        try:
            yield
        finally:
            _schedule.reset(token)


def seed_and_offset(state: Tensor) -> tuple[int, int]:
    """The seed and the offset in the state of a CUDA generator, two numbers of 64 bits."""
    seed, offset = state.view(torch.int64).tolist()
    return seed, offset


def offset_of(generator: torch.Generator) -> int:
    """How many random numbers a CUDA generator has drawn since it was seeded, rounded up for each kernel."""
    return seed_and_offset(generator.get_state())[1]


def state_of(seed: int, offset: int) -> Tensor:
    """The inverse of :func:`seed_and_offset`."""
    return torch.tensor([seed, offset]).view(torch.uint8)


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """In this context, during a capture, operations draw from ``generator`` instead of the global one of ``device``."""
    default = torch.cuda.default_generators[device.index]
    found = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(found)


class NoDraws(DispatchMode):
    """Refuses operators that draw random numbers. Captured without a schedule, a rebuild would draw other numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs):
            raise RuntimeError(
                f"{func} draws random numbers in a CUDA graph, where a rebuild could not draw them again: capture the "
                "training step with hf_pareprop.GraphedStep, or switch dropout off."
            )
        return func(*args, **kwargs)


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers. An operator that can draw does not if its dropout rate is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("p", "dropout_p"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return given != 0
    return True
