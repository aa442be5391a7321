"""Compare all ways to train a model: throughput, memory, and the largest batch.

    python -m benchmarks.throughput [--device cuda] [--sizes vit-b roberta-large-deep ...] [--precisions fp32 bf16]

The work is divided into parts of some minutes, each in a process of its own. Results are written after each part. Parts that
the JSON file already holds do not run again, so an interrupted run goes on.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from hf_pareprop.lanes import cores
from hf_pareprop.plan import CONVERTED_BETA, plan_layers
from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.compare import Comparison, Row, resized
from hf_pareprop.tools.contenders import Contender, faster, reversible_contenders, stock_contenders, with_free_budget
from hf_pareprop.tools.records import GB, cpu_model, device_name, slug, software
from hf_pareprop.tools.timing import OUT_OF_MEMORY

from .kept import Kept
from .measure import Job, be_killed_first, emit, run_child
from .options import Parser, positive, write_figure
from .sizes import SIZES, sample, subject
from .throughput_report import plot_memory, plot_throughput, table
from .trainer_steps import measure_trainer

STEP = 4
"""The factor from one batch size to the next."""

DEPTH_BATCH = 64
"""Large enough that activations take much memory compared with the weights, as in cases where memory is short."""

DEFAULTS = {
    "cpu": {"sizes": ["vit-s", "vit-s-deep"], "max_batch": 16, "length": 128, "rounds": 5},
    "cuda": {"sizes": list(SIZES), "max_batch": None, "length": 512, "rounds": 10},
}
WARM_UPS = {"cpu": 1, "cuda": 3}


# In a child


def child(job: Job) -> None:
    be_killed_first()
    logging.basicConfig(level=logging.INFO)  # logs the tracebacks of contenders that fail
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if job["device"] == "cuda" else torch.device(job["device"])
    began = time.perf_counter()
    kinds = {"speed": measure_speed, "trainer": measure_trainer, "limits": find_limits, "depths": predict_depths}
    found = kinds[job["kind"]](job, device)
    machine = {"cpu": cpu_model(), "cores": cores(), "threads": torch.get_num_threads()}
    seconds = round(time.perf_counter() - began, 1)
    emit(**found, about={"device_name": device_name(device), **machine, **software()}, seconds=seconds)


def contenders_of(job: Job) -> tuple[Contender, ...]:
    device, ours = torch.device(job["device"]), reversible_contenders(job["betas"])
    faster_ways = faster([way for way in ours if way.engine != "autograd"], device)
    ways = (*stock_contenders(device), *with_free_budget(ours), *faster_ways)
    return tuple(way for way in ways if not any(text in way.name for text in job["without"]))


def comparison_of(job: Job, device: torch.device) -> Comparison:
    return Comparison(subject(job["size"]), sample(job["size"], job["length"]), device, job["precision"] == "bf16")


def measure_speed(job: Job, device: torch.device) -> dict[str, Any]:
    """Measure the time and the peak memory of a step of every contender at one batch size."""
    comparison = comparison_of(job, device)
    sizes = dict.fromkeys(contenders_of(job), job["batch_size"])
    options = {"warm_ups": WARM_UPS[device.type], "accounting": not job["unpredicted"]}
    return {"rows": [row.as_dict() for row in comparison.measure(sizes, job["rounds"], lambda line: None, **options)]}


def find_limits(job: Job, device: torch.device) -> dict[str, Any]:
    """Find the largest batch of every contender under each cap: by prediction on a CPU, by trying on CUDA."""
    comparison = comparison_of(job, device)
    caps = [cap for cap in job["caps"] if device.type == "cpu" or cap * GB <= comparison.cap]
    found = {c: {cap: comparison.largest_batch(c, cap * GB) for cap in caps} for c in contenders_of(job)}
    return {"found": [{"contender": c.as_dict(), "limits": limits} for c, limits in found.items()]}


def predict_depths(job: Job, device: torch.device) -> dict[str, Any]:
    """Predict the memory of every contender for several numbers of layers."""
    batch = resized(sample(job["size"], job["length"]), job["batch_size"], "meta")
    bf16 = job["precision"] == "bf16"
    found = {
        c: {depth: predict(subject(job["size"], depth), c, batch, device, bf16).parts() for depth in job["layers"]}
        for c in contenders_of(job)
        if c.predictable
    }
    return {"found": [{"contender": c.as_dict(), "depths": depths} for c, depths in found.items()]}


# In the parent


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """Generate the parts. Batch sizes grow as long as the last one fitted some contender."""
    common = {"device": args.device, "threads": args.threads, "betas": args.betas, "length": args.length}
    common |= {"without": args.without, "unpredicted": args.unpredicted}
    for size in args.sizes:
        for precision in args.precisions:
            part = {"size": size, "precision": precision, **common}
            for batch_size in args.batch_sizes or (STEP**i for i in count()):
                if args.max_batch is not None and batch_size > args.max_batch:
                    break
                job = {"kind": "speed", **part, "batch_size": batch_size, "rounds": args.rounds}
                yield job
                if all(row["error"] for row in job.get("rows", ())):
                    break
                if args.trainer:
                    yield {"kind": "trainer", **part, "batch_size": batch_size, "rounds": args.rounds}
            if args.caps:
                yield {"kind": "limits", **part, "caps": args.caps}
        if args.depths and not size.endswith("-deep"):
            part = {"kind": "depths", "size": size, "precision": args.precisions[0], **common}
            yield {**part, "batch_size": DEPTH_BATCH, "layers": args.depths}


NAMING = ("kind", "size", "precision", "batch_size")
FIELDS = (*NAMING, "device", "threads", "betas", "length", "caps", "layers", "without")
"""The fields that identify a part."""


def lost(job: Job, error: str) -> dict[str, Any]:
    """The result of a part whose process was killed because memory ran out."""
    if job["kind"] != "speed" or error != OUT_OF_MEMORY:
        raise RuntimeError(f"{job} failed: {error}")
    return {"rows": [Row(way, job["batch_size"], error=error).as_dict() for way in contenders_of(job)]}


def run(args: argparse.Namespace, path: Path) -> list[Job]:
    kept = Kept(path, "parts", FIELDS, {"benchmark": "throughput"})
    for job in jobs_of(args):
        name = " ".join(str(job[field]) for field in NAMING if field in job)
        if done := kept.find(job):
            job.update(done)
            print(f"{name}: was done before", flush=True)
            continue
        print(f"{name} ... ", end="", flush=True)
        events, error = run_child("benchmarks.throughput", job)
        job.update(events[-1] if events else lost(job, error or "its process said nothing"))
        kept.add(job)
        print(f"{job.get('seconds', 0):.0f} s", flush=True)
    return kept.parts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, device=True)
    parser.add_argument("--sizes", nargs="+", help=f"some of {', '.join(SIZES)}; default: all on CUDA, vit-s on a CPU")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    betas = f"couplings; default: 1 {CONVERTED_BETA:g}, for training from scratch and for converted models"
    parser.add_argument("--betas", nargs="+", type=float, default=[1.0, CONVERTED_BETA], help=betas)
    parser.add_argument(
        "--caps", nargs="*", type=positive, default=[16, 24, 80], help="memory caps in GB; default: 16 24 80"
    )
    parser.add_argument(
        "--depths",
        nargs="*",
        type=positive,
        default=[6, 12, 24, 48],
        help="numbers of layers to predict memory for; default: 6 12 24 48",
    )
    parser.add_argument("--max-batch", type=positive, help="the largest batch size to try; default: 16 on a CPU")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, help="the batch sizes to measure, instead of a growing series"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        help="leave out contenders with one of these texts in their names, such as compile",
    )
    parser.add_argument(
        "--unpredicted", action="store_true", help="do not predict memory, which takes seconds per contender"
    )
    parser.add_argument("--trainer", action="store_true", help="also measure the steps of Trainer and GraphedTrainer")
    parser.add_argument("--length", type=positive, help="tokens of a text; default: 128 on a CPU, 512 on CUDA")
    parser.add_argument(
        "--rounds", type=positive, help="timed steps of each contender; default: 5 on a CPU, 10 on CUDA"
    )
    parser.add_argument("--threads", type=positive, help="PyTorch's threads on a CPU; default: PyTorch's choice")
    args = parser.parsed(arguments)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for size in args.sizes:
        if size not in SIZES:
            parser.error(f"--sizes {size}: unknown; use one or more of {', '.join(SIZES)}.")
    for beta in args.betas:
        try:
            if beta == 0:
                raise ValueError("that is the stock model, which is measured anyway; use 1, 0.5, 0.25, …")
            plan_layers(beta, 1)
        except ValueError as error:
            parser.error(f"--betas {beta:g}: {error}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    name = "throughput-" + slug(device_name(torch.device(args.device), threads=False))
    try:
        parts = run(args, args.out / f"{name}.json")
    except RuntimeError as error:
        print(f"throughput.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(parts)}")
    for figure, what in ((plot_throughput(parts), "speed"), (plot_memory(parts), "memory")):
        if figure is not None:
            write_figure(args.out / f"{name}-{what}.png", figure)
    print(f"\nwritten: {name}.json, {name}-speed.png and {name}-memory.png in {args.out}")
    errors = [row["error"] for part in parts for row in part.get("rows", ()) if row["error"]]
    return int(any(error != OUT_OF_MEMORY for error in errors))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
