"""Random numbers in CUDA graphs: at every replay a rebuild has to draw what the forward pass of that replay drew.

While a graph is captured, generators do not tell how far they are, so a step cannot be rewound as outside of one. But a
generator's numbers follow from a seed and an offset, and from the start of a training step every reversible step draws
at the same distance. A :class:`Schedule` learns these distances from an ordinary training step. In the capture every
step that draws gets a generator of its own for its rebuild, and before each replay that is set to the distance of its
step from where the global generator is.
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
    """Whether what is launched on ``device`` goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def schedule() -> "Schedule | None":
    """The one that is learned or followed in this context."""
    return _schedule.get()


class Schedule:
    """Where in a training step the random numbers of its reversible steps lie.

    Args:
        generator: the global one of the device: ``torch.cuda.default_generators[index]``.

    Attributes:
        kept: what the ordinary forward pass kept instead of having it rebuilt, and so the captured one.
    """

    kept: Any = None

    def __init__(self, generator: torch.Generator):
        self._generator = generator
        self._distances: list[int | None] = []  # of each reversible step from the start, None if it draws nothing
        self._replicas: list[torch.Generator | None] = []
        self._next = 0
        self._start = 0

    @contextmanager
    def learning(self) -> Iterator[None]:
        """In an ordinary forward pass."""
        self._distances.clear()
        _, self._start = seed_and_offset(self._generator.get_state())
        with self._current():
            yield

    def note(self, before: Tensor, drew: bool) -> None:
        """The next reversible step began with the global generator in the state ``before``."""
        self._distances.append(seed_and_offset(before)[1] - self._start if drew else None)

    @contextmanager
    def followed(self, graph: Any) -> Iterator[None]:
        """In the same forward pass, captured into ``graph``; to be entered before the capture begins.

        Raises:
            RuntimeError: another number of steps was captured than learned.
        """
        self._next = 0
        self._replicas = [None if d is None else self._generator.clone_state() for d in self._distances]
        if hasattr(graph, "register_generator_state"):  # since torch 2.13 a generator registers when it is drawn from
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
                f"more than {self._next} reversible steps are captured, as many as ran in the ordinary pass before: a "
                "captured forward pass has to run the same layers every time."
            )
        self._next += 1
        return self._replicas[self._next - 1]

    def set_out(self) -> None:
        """Before a replay: every rebuild will draw what its step is about to draw."""
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
    """What the state of a CUDA generator says: two numbers of 64 bits."""
    seed, offset = state.view(torch.int64).tolist()
    return seed, offset


def state_of(seed: int, offset: int) -> Tensor:
    """The inverse of :func:`seed_and_offset`."""
    return torch.tensor([seed, offset]).view(torch.uint8)


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """In a capture: what draws from the global generator of ``device`` draws from ``generator``."""
    default = torch.cuda.default_generators[device.index]
    found = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(found)


class NoDraws(DispatchMode):
    """Refuses operators that draw random numbers: captured without a schedule they would be rebuilt with other ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs):
            raise RuntimeError(
                f"{func} draws random numbers in a CUDA graph, where a rebuild could not draw them again: capture the "
                "training step with hf_pareprop.GraphedStep, or switch dropout off."
            )
        return func(*args, **kwargs)


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers: it can, and its dropout probability, if it has one, is not 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("p", "dropout_p"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return given != 0
    return True
