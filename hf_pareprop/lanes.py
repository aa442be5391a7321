"""Lanes: the place where a rebuild runs while gradients are computed. A CUDA stream, a worker thread, or the caller itself.

``lane.job(work)`` prepares a rebuild, ``job.begin()`` begins it, and ``job.result()`` returns what it yields. A job is asked
for its result, or abandoned, before its backward pass ends.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Protocol

import torch


class Job(Protocol):
    """A rebuild."""

    def begin(self) -> None:
        """Begin the work. It comes after what the caller has done before."""

    def result(self) -> Any:
        """What the work returned, for use by the caller. Raises what the work raised. Call it once."""

    def abandon(self) -> None:
        """Return when the work does not run any more. Work that has not begun is left out."""


class Lane(Protocol):
    """A place where rebuilds run.

    Attributes:
        overlaps: whether work begins before its result is asked for.
    """

    overlaps: bool

    def job(self, work: Callable[[], Any]) -> Job:
        """Work that has not begun."""


class InlineLane:
    """Work runs when its result is asked for, so only one step's activations are alive at a time.

    It serves ``reprop``, and devices that have no lane of their own.
    """

    overlaps = False

    def job(self, work: Callable[[], Any]) -> Job:
        return InlineJob(work)


class InlineJob:
    def __init__(self, work: Callable[[], Any]):
        self._work: Callable[[], Any] | None = work

    def begin(self) -> None:
        pass

    def result(self) -> Any:
        work, self._work = self._work, None  # so that what the work reads can be freed when it is done
        assert work is not None, "the result of a job is asked for once"
        return work()

    def abandon(self) -> None:
        self._work = None


class ThreadLane:
    """One persistent worker thread. It is for the CPU, where it helps if some cores are idle.

    While a rebuild replays dropout it replaces the state of the global random number generator, and no other code may see
    that state, even after an exception or a ``KeyboardInterrupt``. So an abandoned job is waited for. Python raises a
    ``KeyboardInterrupt`` between any two bytecodes of the main thread, and ``concurrent.futures`` can break when that
    happens. So the two threads communicate here through single calls into C alone.
    """

    overlaps = True

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_ThreadJob] = SimpleQueue()
        threading.Thread(target=self._run, name="pareprop", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._jobs.get().run()

    def job(self, work: Callable[[], Any]) -> Job:
        return _ThreadJob(self._jobs, work)


class _ThreadJob:
    """Work for the worker thread, and its outcome."""

    def __init__(self, jobs: "SimpleQueue[_ThreadJob]", work: Callable[[], Any]):
        self._jobs = jobs
        self._work: Callable[[], Any] | None = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()
        self._finished = self._cancelled = False

    def begin(self) -> None:
        self._jobs.put(self)

    def run(self) -> None:
        """Do the work, on the worker thread. A second call does nothing."""
        if self._finished:
            return
        work, self._work = self._work, None  # so that what the work reads can be freed when it is done
        try:
            if work is not None and not self._cancelled:
                self._value = work()
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        del work
        self._finished = True
        self._done.release()

    def _wait(self) -> None:
        while not self._finished:
            self._done.acquire(timeout=1)

    def result(self) -> Any:
        try:
            self._wait()
        except BaseException:
            self.abandon()
            raise
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def abandon(self) -> None:
        """Wait until the work does not run any more, even if interrupted."""
        interrupt = None
        while True:
            try:
                self._cancelled = True
                self._jobs.put(self)  # an interrupt may have come before begin() had put it
                self._wait()
                break
            except KeyboardInterrupt as caught:
                interrupt = caught
        self._value = None
        if interrupt is not None:
            raise interrupt


class StreamLane:
    """A CUDA stream beside that of the caller. Streams wait for events; the host never waits.

    What a rebuild allocates belongs to the side stream and is read on the caller's stream, where autograd computes gradients.
    The allocator gives freed memory back to the side stream, which could overwrite it while the caller's stream still reads.
    But every job begins only when the caller's stream has come to this point, so whatever was freed before is no longer read.
    (With ``record_stream`` memory would not be reused until the host sees an event.) For that each stream of a caller has a
    side stream of its own. What a job reads from the caller's memory is held until the caller's stream waits for the job.
    """

    overlaps = True

    def __init__(self, device: torch.device):
        self._device = device
        self._sides: dict[int, torch.cuda.Stream] = {}

    def job(self, work: Callable[[], Any]) -> Job:
        caller = torch.cuda.current_stream(self._device)
        if caller.cuda_stream not in self._sides:
            self._sides[caller.cuda_stream] = torch.cuda.Stream(self._device)
        return _StreamJob(caller, self._sides[caller.cuda_stream], work)


class _StreamJob:
    def __init__(self, caller: "torch.cuda.Stream", side: "torch.cuda.Stream", work: Callable[[], Any]):
        self._caller, self._side, self._work = caller, side, work
        self._value: Any = None
        self._done: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._side.wait_stream(self._caller)  # in the capture of a CUDA graph this adds the side stream to it
        with torch.cuda.stream(self._side):
            try:
                self._value = self._work()
            finally:
                self._done = self._side.record_event()

    def result(self) -> Any:
        value = self._value
        self.abandon()
        return value

    def abandon(self) -> None:
        if self._done is not None:
            self._caller.wait_event(self._done)
        self._value = None
        self._work = _nothing  # what the work reads may be freed now


def _nothing() -> None:
    pass


_INLINE = InlineLane()
_lanes: dict[torch.device, Lane] = {}
_lock = threading.Lock()
_replacement: ContextVar[Callable[[torch.device], Lane] | None] = ContextVar("lane", default=None)


@contextmanager
def replaced(lane_of: Callable[[torch.device], Lane] | None) -> Iterator[None]:
    """In this context, ``pareprop`` uses the lane that ``lane_of`` gives for a device; with ``None``, its own lane."""
    token = _replacement.set(lane_of)
    try:
        yield
    finally:
        _replacement.reset(token)


def inline_lane(device: torch.device) -> Lane:
    """The lane without overlap."""
    return _INLINE


def side_lane(device: torch.device) -> Lane:
    """The lane of ``device``: side streams on CUDA, a worker thread on the CPU, inline elsewhere.

    On a CPU the lane is inline if PyTorch's own threads use more than half of the cores: a worker would compete with them.
    (Measured on 2 cores: 0.80 to 0.92 times the speed of ``reprop`` with 2 threads, 1.15 to 1.33 times with one.)
    """
    if (lane_of := _replacement.get()) is not None:
        return lane_of(device)
    if device.type == "cpu" and 2 * torch.get_num_threads() > cores():
        return _INLINE
    with _lock:
        if device not in _lanes:
            kinds: dict[str, Callable[[], Lane]] = {"cuda": lambda: StreamLane(device), "cpu": ThreadLane}
            _lanes[device] = kinds.get(device.type, InlineLane)()
        return _lanes[device]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked child inherits this table, but not the worker's thread, and would wait for it forever.
    os.register_at_fork(after_in_child=_lanes.clear)
