"""Compare several ways to train a model on this machine: time, memory, and the largest batch."""

import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ..lanes import side_lane
from ..memory_probe import free_memory
from .accounting import Accounting, predict
from .contenders import STOCK, Batch, Contender, Subject, Twins
from .memory import peak_bytes
from .records import number, size_in_words
from .timing import OUT_OF_MEMORY, error_of, release, time_interleaved


@dataclass
class Row:
    """What was measured for a contender at a batch size. ``None`` means not measured.

    Attributes:
        ms: every sample of the time of a training step, in milliseconds.
        peak_bytes: bytes allocated at the peak, with weights and optimizer.
        reserved_bytes: the same with the reserve of the allocator; CUDA only.
        predicted: the bytes at the peak by purpose, as the accounting predicts them.
        activation_bytes: the predicted bytes that are kept of the forward pass, at the moment when they are most.
        error: why there is no time, or no peak.
    """

    contender: Contender
    batch_size: int
    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    predicted: dict[str, int] | None = None
    activation_bytes: int | None = None
    error: str | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Samples per second in the slowest and in the fastest step; 0 if nothing was measured."""
        if not self.ms:
            return 0.0, 0.0
        return 1e3 * self.batch_size / max(self.ms), 1e3 * self.batch_size / min(self.ms)

    @property
    def samples_per_second(self) -> float | None:
        return 1e3 * self.batch_size / statistics.median(self.ms) if self.ms else None

    @property
    def rate(self) -> str:
        """Samples per second for a table, and in brackets those in the slowest and in the fastest step."""
        slowest, fastest = self.range
        return f"{number(self.samples_per_second, '.2f')} [{slowest:.2f}-{fastest:.2f}]"

    @property
    def predicted_bytes(self) -> int | None:
        return sum(self.predicted.values()) if self.predicted else None

    @property
    def needed_bytes(self) -> int | None:
        """Bytes at the peak: measured, or else predicted."""
        return self.peak_bytes if self.peak_bytes is not None else self.predicted_bytes

    def as_dict(self) -> dict[str, Any]:
        """The row as a dictionary for JSON."""
        return {**asdict(self), "contender": self.contender.as_dict()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Row":
        """The inverse of :meth:`as_dict`."""
        return cls(**{**found, "contender": Contender.from_dict(found["contender"])})


def resized(batch: Batch, size: int, device: torch.device | str | None = None) -> dict[str, Any]:
    """A batch of ``size`` rows: those of ``batch``, repeated in turn, and moved to ``device`` if it is given."""
    moved = {name: tensor.to(device or tensor.device) for name, tensor in batch.items()}
    return {name: tensor[torch.arange(size, device=tensor.device) % len(tensor)] for name, tensor in moved.items()}


class Comparison:
    """A model to train, one batch to repeat, and the ways to train it.

    Args:
        subject: the model to train.
        batch: a batch of any size, with labels. Its rows are repeated for larger batches.
        device: the device to train on.
        bf16: whether to compute in bf16 autocast.
        cap: the bytes that training may take. On CUDA the process cannot allocate more. Default: the device's memory.

    Raises:
        ValueError: ``cap`` does not even hold the weights and the optimizer's state.
    """

    def __init__(self, subject: Subject, batch: Batch, device: torch.device, bf16: bool, cap: int | None = None):
        self._subject, self._device, self._bf16 = subject, device, bf16
        self._template = batch
        self._predictions: dict[tuple[Contender, int], Accounting] = {}
        self.cap = memory_of(device) if cap is None else cap
        least = self.predict(STOCK, 1)
        if least.parameters + least.optimizer > self.cap:
            raise ValueError(
                f"a memory cap of {size_in_words(self.cap)} is below the weights and the optimizer's state of the model, "
                f"{size_in_words(least.parameters + least.optimizer)}: raise the cap, or take a smaller model."
            )
        self._twins = Twins(subject, device)

    def predict(self, contender: Contender, size: int) -> Accounting:
        if (contender, size) not in self._predictions:
            batch = resized(self._template, size, "meta")
            self._predictions[contender, size] = predict(self._subject, contender, batch, self._device, self._bf16)
        return self._predictions[contender, size]

    def measure(
        self,
        sizes: Mapping[Contender, int],
        rounds: int,
        say: Callable[[str], None],
        warm_ups: int = 1,
        seconds: float = float("inf"),
        accounting: bool = True,
    ) -> list[Row]:
        """Measure each contender at its batch size: first the times, in rounds over all contenders, then the peaks.

        After ``seconds`` no further round of timing begins. With ``accounting`` the memory is also predicted.

        A contender that runs out of memory, or would do so on a CPU, gets a row with that error.
        """
        rows = {contender: Row(contender, size) for contender, size in sizes.items()}
        steps: dict[Contender, Callable[[], Callable[[], None]]] = {}
        for contender, row in rows.items():
            if accounting and contender.predictable:
                bytes_ = self.predict(contender, row.batch_size)
                row.predicted, row.activation_bytes = bytes_.parts(), bytes_.activations
            if self._device.type == "cpu" and (row.predicted_bytes or 0) > self.cap:
                row.error = OUT_OF_MEMORY  # on a CPU there would be no error: the system kills the process
                continue
            steps[contender] = partial(self.step, contender, row.batch_size)

        def report(method: Contender, ms: float | None = None, error: str | None = None) -> None:
            row = rows[method]
            row.error = error
            if ms is not None:
                row.ms.append(ms)
            say(f"{method.name}, batch {row.batch_size}: {error if ms is None else f'{ms:.0f} ms'}")

        # A CUDA graph keeps its memory, so each is timed in one go. Other work of the host does not slow it down.
        graphs = {contender: steps.pop(contender) for contender in [*steps] if contender.graphed}
        with capped(self._device, self.cap):
            for group in (steps, *({contender: step} for contender, step in graphs.items())):
                time_interleaved(group, rounds, warm_ups, self._device, report, seconds)
                for contender in group:
                    if rows[contender].error is None:
                        self._twins.forget_graph()
                        self._measure_peak(contender, rows[contender])
                self._twins.forget_graph()
        return list(rows.values())

    def step(self, contender: Contender, size: int) -> Callable[[], None]:
        batch = resized(self._template, size, self._device)
        return partial(self._twins.step, contender, batch, self._bf16)

    def _measure_peak(self, contender: Contender, row: Row) -> None:
        step = self.step(contender, row.batch_size)
        if self._device.type == "cuda":
            release(self._device)
            try:
                row.peak_bytes = torch.cuda.memory_allocated(self._device) + peak_bytes(step, self._device)
            except Exception as error:
                row.error = error_of(error)
            row.reserved_bytes = torch.cuda.max_memory_reserved(self._device)
        elif not (contender.engine == "pareprop" and side_lane(self._device).overlaps):  # the profiler sees one thread
            inputs = sum(t.nbytes for t in resized(self._template, row.batch_size).values())
            row.peak_bytes = self._twins.static_bytes() + inputs + peak_bytes(step, self._device)

    def predicted_limit(self, contender: Contender, cap: int, at_most: int | None = None) -> int:
        """The largest batch that is predicted to need at most ``cap`` bytes; not more than ``at_most``."""

        def needed(size: int) -> int:
            return self.predict(contender, size).total

        return at_most if at_most is not None and needed(at_most) <= cap else largest(needed, cap)

    def most_retained(self, contender: Contender, size: int) -> int:
        """The number of layers whose graphs a reversible contender is predicted to keep within the cap, at a batch size."""
        depth = sum(self._subject.config.stage_depths)
        return bisect_right(
            range(1, depth + 1), self.cap, key=lambda k: self.predict(contender.retaining(k), size).total
        )

    def largest_batch(self, contender: Contender, cap: int) -> int | None:
        """The largest batch that stays below ``cap``. On a CPU it is predicted; on CUDA the prediction is then tried out.

        ``None`` on a CPU, if the memory of the contender cannot be predicted.
        """
        if not contender.predictable and self._device.type == "cpu":
            return None
        guess = self.predicted_limit(contender if contender.predictable else STOCK, cap)
        if self._device.type == "cpu":
            return guess
        with capped(self._device, cap):
            size = max(1, guess)
            while size and not self._fits(contender, size):
                size = int(size * 0.95)
            while size >= guess and self._fits(contender, larger := max(size + 1, int(size * 1.03))):
                size = larger
        return size

    def _fits(self, contender: Contender, size: int) -> bool:
        release(self._device)
        try:
            self.step(contender, size)()
            torch.cuda.synchronize(self._device)
        except Exception as error:
            if error_of(error) != OUT_OF_MEMORY:
                raise
            return False
        finally:
            release(self._device)
        return True


def largest(needed: Callable[[int], int], cap: int) -> int:
    """The largest batch size that needs at most ``cap`` bytes; 0 if there is none.

    Args:
        needed: a function from a batch size to bytes. It should grow about linearly: the next guess is where a straight line
            meets the cap.
        cap: the bytes.
    """
    low, high = 0, 1
    while needed(high) <= cap:
        ahead = high + int((cap - needed(high)) * (high - low) / (needed(high) - needed(low))) + 1 if low else 8
        low, high = high, ahead
    while low and high - low > 1:
        slope = (needed(high) - needed(low)) / (high - low)
        guess = min(max(low + 1, low + int((cap - needed(low)) / slope)), high - 1)
        low, high = (guess, high) if needed(guess) <= cap else (low, guess)
    return low


@contextmanager
def capped(device: torch.device, cap: int) -> Iterator[None]:
    """On CUDA, limit this process to ``cap`` bytes of the device. Elsewhere the caller has to stay below the cap."""

    def hold_to(fraction: float) -> None:
        if device.type == "cuda":
            release(device)
            torch.cuda.set_per_process_memory_fraction(fraction, device)

    hold_to(min(1.0, cap / memory_of(device)))
    try:
        yield
    finally:
        hold_to(1.0)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has, or that the host can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory(device)[0]
