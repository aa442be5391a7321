"""Run cases in child processes, which report to their parent.

In a process of its own every case has the same start: no other case has left memory allocated. And if a case fails, or the
kernel kills it because memory runs out, only that case ends.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_pareprop.tools.timing import OUT_OF_MEMORY

Job = dict[str, Any]

EVENT = "benchmark-event "
ROOT = Path(__file__).parent.parent


def run_child(
    module: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run ``python -m module --child JOB``. Returns the events that it emitted, and its error if it failed.

    If this process is ended, so is the child. It would slow down whatever is measured next.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # An exception makes subprocess.run() end the child.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
    if returncode == -signal.SIGKILL:  # the kernel kills a process like this when memory runs out
        return OUT_OF_MEMORY
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    return (stderr.strip().splitlines() or [f"exit status {returncode}"])[-1]


def emit(**event: Any) -> None:
    """Report an event from a child to its parent, without a buffer, so that it is not lost if the child is killed."""
    print(EVENT + json.dumps(event), flush=True)


def be_killed_first() -> None:
    """Ask the kernel to kill this process first when memory runs out, and not its parent or another process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
