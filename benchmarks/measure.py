"""Cases that run in child processes, which report to their parent.

A process of its own gives every case the same start: no memory that another case left behind, and an error, or the
kernel killing it for want of memory, ends that case alone.
"""

import argparse
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

from hf_pareprop.tools.records import save
from hf_pareprop.tools.timing import OUT_OF_MEMORY

Job = dict[str, Any]

EVENT = "benchmark-event "


ROOT = Path(__file__).parent.parent


def run_child(
    module: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run ``python -m module --child JOB`` and return the events that it emitted, and its error if it did not end well."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=ROOT,
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


def add_study_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """What every study can be told; ``out`` is where its results lie."""
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted up from 42")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time, one thread each")
    parser.add_argument("--out", type=Path, default=out, help="directory of the results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)


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
