"""Measure how long steps take, with several methods in turn."""

import gc
import logging
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from ..torch_private import free_workspaces

logger = logging.getLogger("hf_pareprop")

Step = Callable[[], None]
Method = TypeVar("Method", bound=Hashable)

OUT_OF_MEMORY = "out of memory"
"""The error of a case that needs too much memory. It is a result of the measurement; every other error is a failure."""


def milliseconds(step: Step, device: torch.device) -> float:
    """How long ``step`` takes in milliseconds, until its last kernel has ended."""
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
    prepare: Mapping[Method, Callable[[], Step]],
    rounds: int,
    warm_ups: int,
    device: torch.device,
    report: Callable[..., None],
    seconds: float = float("inf"),
) -> None:
    """Time several methods in rounds, one step of each per round, and report every sample as ``method`` and ``ms``.

    So if the machine is slow for a while, it affects all methods alike. The order rotates, so that no method always follows
    the same one. A method that raises an error is reported with its ``error``, and is left out after that.

    Args:
        prepare: for each method, a function that prepares everything (untimed) and returns the step to time.
        rounds: the number of samples of each method.
        warm_ups: the number of rounds before those, which are not reported.
        device: the device that the steps run on.
        report: called with keyword arguments, once per sample.
        seconds: after this time since the first round no further round begins. At least one round runs.
    """
    methods = list(prepare)
    lost: set[Method] = set()
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
    """The first line of an error's message (CUDA's messages go on with advice). Logs the traceback at level INFO."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts):
        return OUT_OF_MEMORY
    logger.info("", exc_info=error)
    return traceback.format_exception_only(error)[-1].splitlines()[0]


def release(device: torch.device) -> None:
    """Free the memory that a failed step left allocated."""
    gc.collect()
    if device.type == "cuda":
        free_workspaces()
        torch.cuda.empty_cache()
