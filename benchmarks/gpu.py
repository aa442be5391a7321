"""Run everything that has to be measured on a CUDA GPU, in stages of at most eight minutes, the most important first.

    python -m benchmarks.gpu [--minutes 60] [--stages tests states vit-l ...] [--rehearse]

Every stage writes its own results to the directory of results, and a line to ``gpu.json`` there. Stages that succeeded do not
run again, and a stage that was cut off goes on where it stopped; ``--again`` measures everything again. ``--rehearse`` runs
every command on a CPU, on small inputs, so that nothing runs for the first time on a GPU. No network and no data sets are
needed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from hf_pareprop.tools.records import device_name, software

from .kept import Kept
from .measure import ROOT
from .options import Parser, positive

LIMIT = 480
"""The largest number of seconds of a stage."""

BATCHES = {
    **dict.fromkeys(("vit-l", "vit-b", "swin-b", "swin-l", "swin-t", "mvit-b"), 64),
    **dict.fromkeys(("roberta-large", "roberta-base"), 32),
}
"""The sizes of the models, the most important first."""

DECODERS = ("smollm2-135m", "llama-1b")

EAGER = ["autograd", "torch.compile", "on the CPU"]
COMPILERS = ["autograd", "reprop", "selective", "on the CPU", "CUDA graph"]
"""What each of two runs of a model leaves out. Compiling a whole model takes minutes, so it gets a run of its own."""


@dataclass(frozen=True)
class Stage:
    """A few commands. Each is a module and its arguments."""

    name: str
    commands: Sequence[Sequence[str]]


@dataclass
class Outcome:
    """The outcome of a stage.

    Attributes:
        error: why it failed.
        tests: how many ran, failed and were skipped, if it ran tests.
        tail: the last lines that it printed.
    """

    stage: str
    seconds: float
    error: str | None = None
    tests: dict[str, Any] | None = None
    tail: list[str] = field(default_factory=list)


def stages(rehearse: bool, out: Path) -> list[Stage]:
    """All stages, the most important first."""
    device, place = ["--device", "cpu" if rehearse else "cuda"], ["--out", str(out)]
    tests = ["pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    if rehearse:
        tests.append("tests/engine/test_lanes.py")

    def throughput(size: str, without: Sequence[str], *more: str) -> list[str]:
        what = ["--sizes", size, "--precisions", "bf16", "--depths", "--unpredicted", "--without", *without]
        return ["benchmarks.throughput", *device, *place, *what, *more]

    def speed(size: str, batch: int) -> Stage:
        common = ("--caps", "--batch-sizes", str(batch), "--rounds", "7")
        return Stage(size, [throughput(size, EAGER, "--trainer", *common), throughput(size, COMPILERS, *common)])

    def limit(size: str, cap: int) -> Stage:
        more = ("--caps", str(cap), "--batch-sizes", str(BATCHES[size]))
        return Stage(f"limits-{size}-{cap}gb", [throughput(size, [*EAGER, "compiled", "CUDA graph"], *more)])

    if rehearse:
        little = ("--caps", "--batch-sizes", "1", "--rounds", "1", "--betas", "1", "--threads", "1")
        models = [Stage("vit-s", [throughput("vit-s", [*EAGER, "selective", "budget"], "--trainer", *little)])]
        limits = [
            Stage(
                "limits",
                [throughput("vit-s", [*EAGER, "pareprop", "selective", "compiled"], "--caps", "1", *little[1:])],
            )
        ]
        overlap = ["--size", "vit-s", "--depth", "2", "--rounds", "1"]
        decoders = [
            throughput("smollm2-135m", [*EAGER, "selective", "compiled", "pareprop"], "--length", "32", *little)
        ]
    else:
        models = [speed(size, batch) for size, batch in BATCHES.items()]
        limits = [limit(size, cap) for size in ("vit-l", "swin-b", "roberta-large") for cap in (16, 24, 80)]
        overlap = ["--size", "vit-b", "--depth", "12", "--batch-size", "4", "--autocast", "bf16"]
        long = ("--length", "8192", "--betas", "1", "0.0078125", "--caps", "--batch-sizes", "1", "--rounds", "7")
        decoders = [throughput(size, [*EAGER, "selective"], *long) for size in DECODERS]
    return [
        Stage("tests", [tests]),
        Stage("states", [["benchmarks.states", *device, *place, "--repeats", "1" if rehearse else "21"]]),
        *models,
        Stage("overlap", [["benchmarks.overlap", *device, *place, *overlap]]),
        Stage("decoders", decoders),
        *limits,
    ]


def run(stage: Stage, seconds: float, out: Path) -> Outcome:
    """Run the commands of a stage one after the other, and end them after ``seconds``."""
    began, said, error = time.monotonic(), "", None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for command in stage.commands:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its child processes can be ended with it
        )
        try:
            said += process.communicate(timeout=max(1.0, seconds - (time.monotonic() - began)))[0]
        except BaseException as caught:
            os.killpg(process.pid, signal.SIGKILL)
            said += process.communicate()[0]
            if not isinstance(caught, subprocess.TimeoutExpired):
                raise
            error = f"cut off after {seconds:.0f} s"
            break
        if process.returncode:
            error = f"{' '.join(command[:1])} ended with status {process.returncode}"
            break
    outcome = Outcome(stage.name, round(time.monotonic() - began, 1), error, tail=said.splitlines()[-30:])
    if stage.name == "tests":
        outcome.tests = tests_of(out / "tests.xml")
    return outcome


def tests_of(report: Path) -> dict[str, Any] | None:
    """The numbers in pytest's report; ``None`` if there is no report."""
    if not report.exists():
        return None
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")} | {"failed": failed}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=positive, help="after this time begin no stage, and end the one that runs")
    parser.add_argument("--stages", nargs="+", help="the stages to run; default: all")
    parser.add_argument("--again", action="store_true", help="also run stages that succeeded before")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every command on a CPU with small inputs, to test it"
    )
    args = parser.parsed(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: take a GPU and a CUDA build of PyTorch, or --rehearse.")
    args.out = args.out.resolve()
    known = [stage.name for stage in stages(args.rehearse, args.out)]
    for name in args.stages or ():
        if name not in known:
            parser.error(f"--stages {name}: unknown; use one or more of {', '.join(known)}.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    kept, began = Kept(args.out / "gpu.json", "stages", ["stage"], {"benchmark": "gpu"}), time.monotonic()
    device = "a CPU, in a rehearsal" if args.rehearse else device_name(torch.device("cuda", 0))
    for stage in stages(args.rehearse, args.out):
        left = 60 * args.minutes - (time.monotonic() - began) if args.minutes else float("inf")
        before = kept.find({"stage": stage.name})
        done = before and before["error"] is None and not args.again
        if (args.stages and stage.name not in args.stages) or done or left <= 0:
            continue
        print(f"{stage.name} ... ", end="", flush=True)
        outcome = run(stage, min(LIMIT, left), args.out)
        kept.add({**asdict(outcome), "device": device, **software()})
        print(f"{outcome.seconds:.0f} s{', ' + outcome.error if outcome.error else ''}", flush=True)
        if outcome.error:
            print("\n".join(outcome.tail), file=sys.stderr)
    errors = [part["stage"] for part in kept.parts if part["error"]]
    if errors:
        print(f"did not end well: {', '.join(errors)}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
