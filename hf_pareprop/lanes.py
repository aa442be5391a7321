"""Lanes: the place where a rebuild runs while gradients are computed. A CUDA stream, a worker thread, or the caller itself.

The backward of one layer opens a *session* on the lane of its device. In the session ``start(work)`` begins a rebuild and
returns a *job*. ``job.result()`` returns what the rebuild yields. The gradients of the rebuilt step are computed inside the
context ``job.here()``.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from .torch_private import let_streams_differ


class Job(Protocol):
    """A rebuild that was started."""

    def result(self) -> Any:
        """What the work returned, for use inside :meth:`here`. Raises what the work raised. Call it once."""

    def here(self) -> AbstractContextManager[None]:
        """A context in which the gradients of the result are computed, after those of the job before."""


class Session(Protocol):
    """The backward of one layer on one lane."""

    def start(self, work: Callable[[], Any]) -> Job:
        """Begin ``work``. It runs after everything that was started before it."""


class Lane(Protocol):
    """A place where rebuilds run.

    Attributes:
        overlaps: whether work begins before its result is asked for.
    """

    overlaps: bool

    def session(self) -> AbstractContextManager[Session]:
        """A context for the backward of one layer.

        Work on the lane comes after what the caller has done before. After the context, what the caller does comes after
        the gradients.
        """


class InlineLane:
    """Work runs when its result is asked for, so only one step's graph is alive at a time.

    It serves ``reprop``, and devices that have no lane of their own.
    """

    overlaps = False

    def session(self) -> AbstractContextManager[Session]:
        return nullcontext(self)

    def start(self, work: Callable[[], Any]) -> Job:
        return _InlineJob(work)


class _InlineJob:
    def __init__(self, work: Callable[[], Any]):
        self._work: Callable[[], Any] | None = work

    def result(self) -> Any:
        work, self._work = self._work, None  # so that what the work reads can be freed when it is done
        assert work is not None, "the result of a job is asked for once"
        return work()

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()


class ThreadLane:
    """One persistent worker thread. It is for the CPU, where it helps if some cores are idle.

    A session ends only when its work is done. While a rebuild replays dropout it replaces the state of the global random
    number generator, and no other code may see that state, even after an exception or a ``KeyboardInterrupt``. Python raises
    a ``KeyboardInterrupt`` between any two bytecodes of the main thread, and ``concurrent.futures`` can break when that
    happens. So the two threads communicate here through single calls into C alone.
    """

    overlaps = True

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        threading.Thread(target=self._run, name="pareprop", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._tasks.get().run()

    @contextmanager
    def session(self) -> Iterator[Session]:
        session = _ThreadSession(self._tasks)
        try:
            yield session
        except BaseException:
            session.cancelled = True
            raise
        finally:
            try:
                session.close()
            finally:
                session.close()  # again, in case an interrupt came before the first call began


class _ThreadSession:
    def __init__(self, tasks: "SimpleQueue[_Task]"):
        self._tasks = tasks
        self._begun: list[_Task] = []
        self.cancelled = False

    def start(self, work: Callable[[], Any]) -> Job:
        task = _Task(work)
        self._begun = [*(t for t in self._begun if not t.finished), task]  # listed before it can run
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Wait until no work runs any more, even if interrupted. After an exception, work that has not begun is cancelled."""
        interrupt = None
        while True:
            try:
                for task in self._begun if self.cancelled else ():
                    task.cancelled = True
                    self._tasks.put(task)  # again, in case an interrupt came before the first put
                for task in self._begun:
                    task.wait()
                break
            except KeyboardInterrupt as caught:
                interrupt, self.cancelled = caught, True
        if interrupt is not None:
            raise interrupt


class _Task:
    """Work for the worker thread, and its outcome."""

    def __init__(self, work: Callable[[], Any]):
        self._work: Callable[[], Any] | None = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()
        self.finished = self.cancelled = False

    def run(self) -> None:
        """Do the work, on the worker thread. A second call does nothing."""
        if self.finished:
            return
        work, self._work = self._work, None  # so that what the work reads can be freed when it is done
        try:
            if work is not None and not self.cancelled:
                self._value = work()
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        del work
        self.finished = True
        self._done.release()

    def wait(self) -> None:
        while not self.finished:
            self._done.acquire(timeout=1)

    def result(self) -> Any:
        self.wait()
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()


class StreamLane:
    """Two persistent CUDA streams, used in turn. The streams wait for events; the host never waits.

    Autograd runs the backward of a node on the stream of its forward. So the rebuild of a step and its gradients share a
    stream, and neighbouring steps are on different streams and overlap.

    The allocator returns a freed block of memory to the stream that allocated it. New work on that stream could overwrite
    the block while the other stream still reads it. Therefore a job, with every tensor that it made or read, is held until
    its own stream has been told to wait for the next job, on the other stream. (With ``record_stream`` nothing would have to
    be held, but the block would not be reused until the host sees the event.)
    """

    overlaps = True

    def __init__(self, device: torch.device):
        let_streams_differ()
        self._device = device
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        self._turn = 0
        self._held: deque[_StreamJob] = deque(maxlen=2)
        self.gradients: torch.cuda.Event | None = None

    @contextmanager
    def session(self) -> Iterator[Session]:
        caller = torch.cuda.current_stream(self._device)
        first, second = self._streams
        for stream in self._streams:  # first, because in the capture of a CUDA graph this adds both streams to it
            stream.wait_stream(caller)
        first.wait_stream(second)
        second.wait_stream(first)
        self.gradients = None
        try:
            yield self
        finally:
            if self.gradients is not None:
                caller.wait_event(self.gradients)
            # At the start of the next session the streams wait for each other, so nothing has to be held any longer.
            self._held.clear()

    def start(self, work: Callable[[], Any]) -> Job:
        self._turn = 1 - self._turn
        stream = self._streams[self._turn]
        if self._held:
            stream.wait_event(self._held[-1].done)
        with torch.cuda.stream(stream):
            job = _StreamJob(self, stream, work)
        self._held.append(job)
        return job


class _StreamJob:
    def __init__(self, lane: StreamLane, stream: "torch.cuda.Stream", work: Callable[[], Any]):
        self._lane = lane
        self._stream = stream
        self._reads = work  # this keeps the tensors alive that the enqueued kernels read
        self._value = work()
        self.done = stream.record_event()

    def result(self) -> Any:
        return self._value

    @contextmanager
    def here(self) -> Iterator[None]:
        if self._lane.gradients is not None:
            self._stream.wait_event(self._lane.gradients)
        with torch.cuda.stream(self._stream):
            yield
        self._lane.gradients = self._stream.record_event()


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
