"""How long steps take, measured side by side."""

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

logger = logging.getLogger("hf_pareprop")

Step = Callable[[], None]

OUT_OF_MEMORY = "out of memory"
"""The error of a case that needs more memory than there is: a finding, where every other error is a failure."""


def milliseconds(step: Step, device: torch.device) -> float:
    """How long ``step`` takes, until its last kernel has ended."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def time_interleaved(
    prepare: Mapping[str, Callable[[], Step]],
    rounds: int,
    warm_ups: int,
    device: torch.device,
    report: Callable[..., None],
    seconds: float = float("inf"),
) -> None:
    """Time several methods in rounds, one step of each per round, and report every sample as ``method`` and ``ms``.

    What slows a machine down for a while then slows all methods. The order rotates, so that no method always follows
    the same one. A method that raises is reported with its ``error`` and left out from then on.

    Args:
        prepare: for each method, what makes everything ready (untimed) and returns the step to time.
        rounds: how many samples of each method.
        warm_ups: how many rounds come before, and are not reported.
        report: called with keyword arguments, once per sample.
        seconds: no round begins later than so long after the first one, but for the first.
    """
    methods = list(prepare)
    lost: set[str] = set()
    began = time.perf_counter()
    for round_ in range(-warm_ups, rounds):
        if round_ > 0 and time.perf_counter() - began > seconds:
            break
        first = round_ % len(methods)
        for method in methods[first:] + methods[:first]:
            if method in lost:
                continue
            event = _sample(prepare[method], device)
            if "error" in event:
                lost.add(method)
                release(device)
            if "error" in event or round_ >= 0:
                report(method=method, **event)


def _sample(prepare: Callable[[], Step], device: torch.device) -> dict[str, Any]:
    try:
        return {"ms": milliseconds(prepare(), device)}
    except Exception as error:
        return {"error": error_of(error)}


def error_of(error: Exception) -> str:
    """``error`` in one line, the first of its message, as CUDA's go on with advice; its traceback is logged at level INFO."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts):
        return OUT_OF_MEMORY
    logger.info("", exc_info=error)
    return traceback.format_exception_only(error)[-1].splitlines()[0]


def release(device: torch.device) -> None:
    """Give back what a step left behind that raised."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
