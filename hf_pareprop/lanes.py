"""Where a rebuild runs while gradients are computed: a side stream, a worker thread, or right here.

One layer's backward opens a *session* on its device's lane. In it, ``start(work)`` begins a rebuild and returns a job;
``job.result()`` hands its outcome over, and under ``job.here()`` the gradients of the rebuilt step are computed.
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
    """A rebuild under way."""

    def result(self) -> Any:
        """What the work returned, for use under :meth:`here`; raises what the work raised. To be asked for once."""

    def here(self) -> AbstractContextManager[None]:
        """Where gradients of the result are computed, after those computed under the last job's ``here``."""


class Session(Protocol):
    """One layer's backward, on one lane."""

    def start(self, work: Callable[[], Any]) -> Job:
        """Begin ``work`` after everything started before it."""


class Lane(Protocol):
    """A place for rebuilds.

    ``overlaps`` says whether work begins before its result is asked for.
    """

    overlaps: bool

    def session(self) -> AbstractContextManager[Session]:
        """Order the lane after what the caller did so far, and, on leaving, the caller after the gradients."""


class InlineLane:
    """Work runs when its result is asked for, so one step's graph is alive at a time.

    For ``reprop``, and for devices that have no lane of their own.
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
        work, self._work = self._work, None  # what the work read may be freed when it is done
        assert work is not None, "the result of a job is asked for once"
        return work()

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()


class ThreadLane:
    """One persistent worker thread: for the CPU, where it pays if cores are idle.

    A session ends only when its work is done: a rebuild swaps the state of the global random number generator while
    it replays dropout, which nobody else may see, least of all after an exception or a ``KeyboardInterrupt``. The latter
    comes between any two bytecodes of the main thread, and ``concurrent.futures`` does not survive that. So what the two
    threads share here are single calls into C.
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
                session.close()  # again, in case an interrupt came before the first one began


class _ThreadSession:
    def __init__(self, tasks: "SimpleQueue[_Task]"):
        self._tasks = tasks
        self._begun: list[_Task] = []
        self.cancelled = False

    def start(self, work: Callable[[], Any]) -> Job:
        task = _Task(work)
        self._begun = [*(t for t in self._begun if not t.finished), task]  # noted before it can run
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Wait until nothing runs any more, whatever interrupts that; what has not begun is cancelled after an exception."""
        interrupt = None
        while True:
            try:
                for task in self._begun if self.cancelled else ():
                    task.cancelled = True
                    self._tasks.put(task)  # once more, in case an interrupt came before it was put there
                for task in self._begun:
                    task.wait()
                break
            except KeyboardInterrupt as caught:
                interrupt, self.cancelled = caught, True
        if interrupt is not None:
            raise interrupt


class _Task:
    """Work for the worker thread, and what became of it."""

    def __init__(self, work: Callable[[], Any]):
        self._work: Callable[[], Any] | None = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()
        self.finished = self.cancelled = False

    def run(self) -> None:
        """On the worker; a second time does nothing."""
        if self.finished:
            return
        work, self._work = self._work, None  # what the work read may be freed when it is done
        try:
            if work is not None and not self.cancelled:
                self._value = work()
        except BaseException as error:  # for whoever asks for the result
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
    """Two persistent CUDA streams used in turn; streams wait for events, the host never does.

    Autograd runs a node's backward on the stream of its forward, so a step's rebuild and its gradients share a stream
    and neighbouring steps, on different ones, overlap.

    The allocator gives a freed block back to the stream that made it, where new work could overwrite it while the other
    stream still reads it. So a job, and with it every tensor it made or read, is held until its own stream has been told
    to wait for the next job, on the other stream. (``record_stream`` would need no holding, but the block would stay
    taken until the host sees the event.)
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
        for stream in self._streams:  # first of all, so that in the capture of a CUDA graph both belong to it
            stream.wait_stream(caller)
        first.wait_stream(second)
        second.wait_stream(first)
        self.gradients = None
        try:
            yield self
        finally:
            if self.gradients is not None:
                caller.wait_event(self.gradients)
            # The next session begins by making the streams wait for each other, so nothing has to be held until then.
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
        self._reads = work  # the closure keeps alive what the enqueued kernels read
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
    """In this context, have ``pareprop`` run on the lane that ``lane_of`` gives for a device; ``None``: on its own."""
    token = _replacement.set(lane_of)
    try:
        yield
    finally:
        _replacement.reset(token)


def inline_lane(device: torch.device) -> Lane:
    """The lane that overlaps nothing."""
    return _INLINE


def side_lane(device: torch.device) -> Lane:
    """The lane of ``device``: side streams on CUDA, a worker thread on the CPU, inline elsewhere.

    Inline too on a CPU whose cores are all taken by PyTorch's own threads: there the worker's threads would only get in
    their way (measured on 2 cores: 0.80 to 0.92 times the speed of ``reprop`` with 2 threads, 1.15 to 1.33 with one).
    """
    if (lane_of := _replacement.get()) is not None:
        return lane_of(device)
    if device.type == "cpu" and 2 * torch.get_num_threads() > _cores():
        return _INLINE
    with _lock:
        if device not in _lanes:
            kinds: dict[str, Callable[[], Lane]] = {"cuda": lambda: StreamLane(device), "cpu": ThreadLane}
            _lanes[device] = kinds.get(device.type, InlineLane)()
        return _lanes[device]


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked child inherits the worker's bookkeeping without its thread, and would wait for it for ever.
    os.register_at_fork(after_in_child=_lanes.clear)
