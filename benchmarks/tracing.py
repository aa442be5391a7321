"""Read a profiler's trace of a backward pass: when steps were rebuilt, and when gradients were computed.

On a CPU these are times of threads. On CUDA they are times of kernels. A kernel belongs to the rebuild or the gradient
computation in which it was launched, even if it runs later.
"""

import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, record_function

from hf_pareprop.observer import Observer, observing
from hf_pareprop.tools.memory import profiling

REBUILD, GRADIENTS = "pareprop: rebuild", "pareprop: gradients"

Event = dict[str, Any]
Interval = tuple[float, float]

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}
BLOCKS_THE_HOST = re.compile(r"^cu(da)?\w*Synchronize|^cu(da)?Memcpy(?!\w*Async)")


@dataclass(frozen=True)
class Span:
    """Work on a step.

    ``kind`` is :data:`REBUILD` or :data:`GRADIENTS`. Times are in microseconds of the trace. ``lane`` is the thread or the
    stream. ``step`` counts from 0 in the order of the backward pass, so 0 is the last step of the model.
    """

    kind: str
    lane: str
    step: int
    start: float
    end: float


class Annotating(Observer):
    """Marks every rebuild and every gradient computation with a range that the profiler records."""

    def rebuilding(self, position: int, step: int) -> AbstractContextManager[Any]:
        return record_function(REBUILD)

    def differentiating(self, position: int, step: int) -> AbstractContextManager[Any]:
        return record_function(GRADIENTS)


def traced(step: Callable[[], Any], device: torch.device, tensors: bool = False) -> list[Event]:
    """The trace of ``step``, in Chrome's format.

    Args:
        step: a function that runs a forward pass and its backward pass of a reversible model. If it runs the backward pass
            alone, the forward pass must have run ``with observing(Annotating())``.
        tensors: whether to record the shapes of tensors and the allocations, which works for the calling thread alone.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # Without this the profiler sees only the calling thread; with it, it sees no allocations.
    everywhere = None if tensors else _ExperimentalConfig(profile_all_threads=True)
    recorded = profiling(
        activities=activities, record_shapes=tensors, profile_memory=tensors, experimental_config=everywhere
    )
    with observing(Annotating()), recorded as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def spans_of(events: Sequence[Event]) -> list[Span]:
    """The spans of each rebuild and each gradient computation: its kernels if there are any, otherwise the range itself."""
    ranges = _ranges(events)
    kernels = [event for event in events if event.get("cat") in ON_DEVICE]
    if not kernels:
        return ranges
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in CALLS and "correlation" in e["args"]}
    by_thread: dict[str, list[Span]] = defaultdict(list)
    for span in ranges:
        by_thread[span.lane].append(span)
    found = []
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"))
        cause = launch and _around(by_thread[_thread(launch)], launch["ts"])
        if cause:
            lane = f"stream {kernel['args']['stream']}"
            found.append(Span(cause.kind, lane, cause.step, kernel["ts"], kernel["ts"] + kernel["dur"]))
    return sorted(found, key=lambda span: span.start)


def _ranges(events: Sequence[Event]) -> list[Span]:
    """The ranges, sorted by start. Both kinds go through the steps in the same order, so the step follows by counting."""
    found = []
    for kind in (REBUILD, GRADIENTS):
        own = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == kind]
        for step, e in enumerate(sorted(own, key=lambda e: e["ts"])):
            found.append(Span(kind, _thread(e), step, e["ts"], e["ts"] + e["dur"]))
    return sorted(found, key=lambda span: span.start)


def _thread(event: Event) -> str:
    return f"thread {event['tid']}"


def _around(spans: Sequence[Span], moment: float) -> Span | None:
    """The span that contains ``moment``, among the spans of one thread, which do not overlap."""
    index = bisect_right(spans, moment, key=lambda span: span.start) - 1
    return spans[index] if index >= 0 and moment <= spans[index].end else None


def busy(spans: Sequence[Span], kind: str) -> list[Interval]:
    """The intervals in which any work of ``kind`` ran. They are disjoint and in order."""
    merged: list[Interval] = []
    for start, end in sorted((span.start, span.end) for span in spans if span.kind == kind):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def hidden_share(spans: Sequence[Span]) -> float:
    """The fraction of the rebuilding time in which gradients were computed as well. It is 0 for serial reprop.

    Raises:
        ValueError: nothing was rebuilt.
    """
    rebuilding, gradients = busy(spans, REBUILD), busy(spans, GRADIENTS)
    if not rebuilding:
        raise ValueError("the trace has no rebuilding in it: the engine is autograd, or no layer is reversible.")
    both = (min(a[1], b[1]) - max(a[0], b[0]) for a in rebuilding for b in gradients)
    return sum(overlap for overlap in both if overlap > 0) / length(rebuilding)


def host_synchronisations(events: Sequence[Event]) -> list[str]:
    """The calls that made the host wait, between the launches of the first and the last kernel of the rebuilding."""
    ranges = _ranges(events)
    if not ranges:
        return []
    first, last = ranges[0].start, max(span.end for span in ranges)
    calls = (e for e in events if e.get("cat") in CALLS and first <= e["ts"] <= last)
    return [call["name"] for call in calls if BLOCKS_THE_HOST.match(call["name"])]
