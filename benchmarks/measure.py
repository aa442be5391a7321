"""Time and peak memory of a step on the CPU or on CUDA, in child processes that report to their parent.

A process of its own gives every case the same start: no memory that another case left behind, and an error, or the
kernel killing it for want of memory, ends that case alone.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from hf_pareprop.tools.records import save
from hf_pareprop.tools.timing import OUT_OF_MEMORY, Step

Job = dict[str, Any]

EVENT = "benchmark-event "

# glibc keeps freed blocks for later; a resident set then says little about what is in use.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

STATUS = Path("/proc/self/status")


def run_child(
    script: Path, job: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run ``script --child JOB`` and return the events that it emitted, and its error if it did not end well."""
    process = subprocess.run(
        [sys.executable, str(script), "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    lines = process.stdout.splitlines()
    events = [json.loads(line.removeprefix(EVENT)) for line in lines if line.startswith(EVENT)]
    if any(event.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY for event in events) or process.returncode > 0:
        sys.stderr.write(process.stderr)
    return events, _how_it_ended(process.returncode, process.stderr)


def _how_it_ended(returncode: int, stderr: str) -> str | None:
    if returncode == 0:
        return None
    if returncode == -signal.SIGKILL:  # what the kernel does to the process that takes the last memory
        return OUT_OF_MEMORY
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return (stderr.strip().splitlines() or [f"exit status {returncode}"])[-1]


def study(
    path: Path,
    jobs: Iterable[Job],
    key: Callable[[Job], str],
    run: Callable[[Job], Job],
    say: Callable[[Job, int, int], str],
    about: Mapping[str, Any],
    workers: int,
) -> list[Job]:
    """Run the jobs whose results the JSON file ``path`` does not hold, some at a time, and write it after each.

    Args:
        key: tells a job, or its result, from the others.
        run: a job with what it found.
        say: of a result, how many are done and how many were to do: a line to print.
        about: what the file says besides the results.

    Returns:
        All results that the file holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results: list[Job] = json.loads(path.read_text())["results"] if path.exists() else []
    done, lock = {key(result) for result in results}, Lock()
    todo = [job for job in jobs if key(job) not in done]

    def work(job: Job) -> None:
        result = run(job)
        with lock:
            results.append(result)
            whole = json.dumps({**about, "results": results}, indent=1) + "\n"
            save(path, lambda file: file.write_text(whole))
            print(say(result, len(results), len(todo)), flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, todo):
            pass
    return results


def emit(**event: Any) -> None:
    """Report an event to the parent, from a child; at once, so that it outlives the child."""
    print(EVENT + json.dumps(event), flush=True)


def be_killed_first() -> None:
    """Have the kernel, when memory runs out, kill this process rather than its parent or a stranger."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def peak_memory(step: Step, device: torch.device) -> dict[str, int]:
    """What ``step`` needs at its peak on top of what is allocated before it, in bytes.

    To be called after a warm-up step, so that gradients, workspaces and thread stacks are not counted. On CUDA
    ``peak_bytes`` counts tensors; ``reserved_bytes`` is what the caching allocator took from the device for them.
    """
    gc.collect()
    return _peak_on_cuda(step, device) if device.type == "cuda" else _peak_on_cpu(step)


def _peak_on_cuda(step: Step, device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved,
    }


def _peak_on_cpu(step: Step) -> dict[str, int]:
    with suppress(OSError):  # not permitted everywhere
        Path("/proc/self/clear_refs").write_text("5")
    resident, before = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    step()
    after = _status_bytes("VmHWM")
    # A mark that could not be reset and did not move tells of some earlier moment, not of the step.
    if after == before and before - resident > 2**20:
        raise RuntimeError(
            "the step stayed below the memory peak of building the model, which this kernel does not let us reset: "
            "use a larger --batch-size or --length"
        )
    return {"peak_bytes": after - resident}


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
