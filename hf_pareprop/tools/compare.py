"""Several ways to train a model, side by side on this machine: time, memory, and how large a batch may be."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ..lanes import side_lane
from ..memory_probe import free_memory
from .accounting import Accounting, predict
from .contenders import STOCK, Batch, Contender, Subject, Twins
from .memory import peak_bytes
from .records import size_in_words
from .timing import OUT_OF_MEMORY, error_of, release, time_interleaved


@dataclass
class Row:
    """What was measured of a contender at a batch size; ``None`` where nothing was.

    Attributes:
        ms: every sample of the time of a training step.
        peak_bytes: allocated at the peak, weights and optimizer included.
        reserved_bytes: the same with the allocator's reserve; CUDA only.
        predicted: the accounting's bytes by what they are for.
        activation_bytes: by the accounting, what is kept of the forward pass at the moment when that is most.
        error: why there is no time, or no peak.
    """

    contender: str
    batch_size: int
    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    predicted: dict[str, int] | None = None
    activation_bytes: int | None = None
    error: str | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Samples per second in the slowest and in the fastest step; 0 where nothing was measured."""
        if not self.ms:
            return 0.0, 0.0
        return 1e3 * self.batch_size / max(self.ms), 1e3 * self.batch_size / min(self.ms)

    @property
    def samples_per_second(self) -> float | None:
        return 1e3 * self.batch_size / statistics.median(self.ms) if self.ms else None

    @property
    def predicted_bytes(self) -> int | None:
        return sum(self.predicted.values()) if self.predicted else None

    @property
    def needed_bytes(self) -> int | None:
        """At the peak, measured or else predicted."""
        return self.peak_bytes if self.peak_bytes is not None else self.predicted_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resized(batch: Batch, size: int) -> dict[str, Any]:
    """The rows of ``batch``, in turn, until there are ``size``."""
    return {name: tensor[torch.arange(size, device=tensor.device) % len(tensor)] for name, tensor in batch.items()}


class Comparison:
    """A model to train, one batch to repeat, and the ways to train it.

    Args:
        batch: of any size, with labels; its rows are repeated for larger batches.
        bf16: whether to compute in bf16 autocast.
        cap: bytes that training may take; on CUDA the process is held to them. Default: the device's memory.

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
            batch = resized({name: t.to("meta") for name, t in self._template.items()}, size)
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
        """Each contender at its batch size: times in rounds over all of them, then peaks one by one.

        After so many ``seconds`` no further round of timing begins. Without ``accounting`` nothing is predicted beside it.

        What runs out of memory, or would on a CPU, is a row with that error.
        """
        rows = {contender: Row(contender.name, size) for contender, size in sizes.items()}
        steps: dict[str, Callable[[], Callable[[], None]]] = {}
        for contender, row in rows.items():
            if accounting and contender.predictable:
                bytes_ = self.predict(contender, row.batch_size)
                row.predicted, row.activation_bytes = bytes_.parts(), bytes_.activations
            if self._device.type == "cpu" and (row.predicted_bytes or 0) > self.cap:
                row.error = OUT_OF_MEMORY  # a process is not told of it on a CPU but killed
                continue
            steps[contender.name] = partial(self.step, contender, row.batch_size)
        by_name = {row.contender: row for row in rows.values()}

        def report(method: str, ms: float | None = None, error: str | None = None) -> None:
            row = by_name[method]
            row.error = error
            if ms is not None:
                row.ms.append(ms)
                say(f"{method}, batch {row.batch_size}: {ms:.0f} ms")
            else:
                say(f"{method}, batch {row.batch_size}: {error}")

        with capped(self._device, self.cap):
            time_interleaved(steps, rounds, warm_ups, self._device, report, seconds)
            for contender, row in rows.items():
                if row.error is None:
                    self._measure_peak(contender, row)
        return list(rows.values())

    def step(self, contender: Contender, size: int) -> Callable[[], None]:
        batch = {name: t.to(self._device) for name, t in resized(self._template, size).items()}
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
        """The largest batch that stays below ``cap`` by prediction, or ``at_most``."""

        def needed(size: int) -> int:
            return self.predict(contender, size).total

        return at_most if at_most is not None and needed(at_most) <= cap else largest(needed, cap)

    def most_retained(self, contender: Contender, size: int) -> int:
        """How many layers' graphs a reversible contender can keep within the cap by prediction, at a batch size."""
        low, high = 0, sum(self._subject.config.stage_depths)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.predict(contender.retaining(middle), size).total <= self.cap
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def largest_batch(self, contender: Contender, cap: int) -> int | None:
        """The largest batch that stays below ``cap``: predicted on a CPU, from there on tried out on CUDA.

        ``None`` on a CPU for what is not predictable.
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
    """The largest batch size that needs at most ``cap``, 0 if there is none.

    Args:
        needed: from a batch size to bytes; grows about linearly, as the next guess is where a straight line would meet
            the cap.
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


class capped:
    """On CUDA, hold this process to ``cap`` bytes of the device; elsewhere the caller has to."""

    def __init__(self, device: torch.device, cap: int):
        self._device, self._cap = device, cap

    def __enter__(self) -> None:
        self._set(min(1.0, self._cap / memory_of(self._device)))

    def __exit__(self, *exception: Any) -> None:
        self._set(1.0)

    def _set(self, fraction: float) -> None:
        if self._device.type == "cuda":
            release(self._device)
            torch.cuda.set_per_process_memory_fraction(fraction, self._device)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has, or that the host can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory(device)[0]
