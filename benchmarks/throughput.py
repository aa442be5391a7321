"""Everything a user could train with, side by side: throughput, memory, and the largest batch.

    python -m benchmarks.throughput [--device cuda] [--sizes vit-b roberta-large-deep ...] [--precisions fp32 bf16]

The work comes in parts of some minutes, each in a process of its own. Results are written after each part, and parts
that the JSON file already holds are not run again; what was interrupted goes on.
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

from hf_pareprop.plan import CONVERTED_BETA, plan_layers
from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.compare import Comparison, resized
from hf_pareprop.tools.contenders import STOCK_CONTENDERS, Contender, reversible_contenders, with_free_budget
from hf_pareprop.tools.records import cores, cpu_model, device_name, save, slug, software
from hf_pareprop.tools.timing import OUT_OF_MEMORY

from .measure import be_killed_first, emit, run_child
from .options import choose_device, positive
from .sizes import SIZES, sample, subject
from .throughput_report import plot_memory, plot_throughput, table

Job = dict[str, Any]

STEP = 4
"""From one batch size to the next."""

DEPTH_BATCH = 64
"""Large enough for activations to matter beside the weights, as where memory is short."""

DEFAULTS = {
    "cpu": {"sizes": ["vit-s", "vit-s-deep"], "max_batch": 16, "length": 128, "rounds": 5},
    "cuda": {"sizes": list(SIZES), "max_batch": None, "length": 512, "rounds": 10},
}
WARM_UPS = {"cpu": 1, "cuda": 3}


# In a child


def child(job: Job) -> None:
    be_killed_first()
    logging.basicConfig(level=logging.INFO)  # tracebacks of ways to train that fail
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if job["device"] == "cuda" else torch.device(job["device"])
    began = time.perf_counter()
    found = {"speed": measure_speed, "limits": find_limits, "depths": predict_depths}[job["kind"]](job, device)
    machine = {"cpu": cpu_model(), "cores": cores(), "threads": torch.get_num_threads()}
    seconds = round(time.perf_counter() - began, 1)
    emit(**found, about={"device_name": device_name(device), **machine, **software()}, seconds=seconds)


def contenders_of(job: Job) -> tuple[Contender, ...]:
    stock = (way for way in STOCK_CONTENDERS if not (way.offload and job["device"] == "cpu"))  # where it does nothing
    ways = (*stock, *with_free_budget(reversible_contenders(job["betas"])))
    return tuple(way for way in ways if not any(text in way.name for text in job["without"]))


def comparison_of(job: Job, device: torch.device) -> Comparison:
    return Comparison(subject(job["size"]), sample(job["size"], job["length"]), device, job["precision"] == "bf16")


def measure_speed(job: Job, device: torch.device) -> dict[str, Any]:
    """Time and peak memory of a step of every contender at one batch size."""
    comparison = comparison_of(job, device)
    sizes = dict.fromkeys(contenders_of(job), job["batch_size"])
    rows = comparison.measure(
        sizes, job["rounds"], lambda line: None, WARM_UPS[device.type], accounting=not job["unpredicted"]
    )
    return {"rows": [row.as_dict() for row in rows]}


def find_limits(job: Job, device: torch.device) -> dict[str, Any]:
    """The largest batch of every contender under each cap; predicted on a CPU, tried out on CUDA."""
    comparison = comparison_of(job, device)
    caps = [cap for cap in job["caps"] if device.type == "cpu" or cap * 2**30 <= comparison.cap]
    return {
        "limits": {c.name: {cap: comparison.largest_batch(c, cap * 2**30) for cap in caps} for c in contenders_of(job)}
    }


def predict_depths(job: Job, device: torch.device) -> dict[str, Any]:
    """The accounting of every contender over the number of layers."""
    batch = resized({n: t.to("meta") for n, t in sample(job["size"], job["length"]).items()}, job["batch_size"])
    bf16 = job["precision"] == "bf16"
    found: dict[str, dict[int, dict[str, int]]] = {}
    for contender in contenders_of(job):
        if contender.predictable:
            found[contender.name] = {
                depth: predict(subject(job["size"], depth), contender, batch, device, bf16).parts()
                for depth in job["layers"]
            }
    return {"depths": found}


# In the parent


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """Every part; of batch sizes, the next larger one while there is a contender that the last one fitted."""
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
            if args.caps:
                yield {"kind": "limits", **part, "caps": args.caps}
        if args.depths and not size.endswith("-deep"):
            yield {
                "kind": "depths",
                "size": size,
                "precision": args.precisions[0],
                **common,
                "batch_size": DEPTH_BATCH,
                "layers": args.depths,
            }


def key(part: Job) -> str:
    fields = ("kind", "size", "precision", "batch_size", "device", "threads", "betas", "length", "caps", "layers")
    return json.dumps([*(part.get(field) for field in fields), part.get("without", [])])


def lost(job: Job, error: str) -> dict[str, Any]:
    """What is found of a part whose process was killed for want of memory."""
    if job["kind"] != "speed" or error != OUT_OF_MEMORY:
        raise RuntimeError(f"{job} failed: {error}")
    size = job["batch_size"]
    return {"rows": [{"contender": c.name, "batch_size": size, "ms": [], "error": error} for c in contenders_of(job)]}


def run(args: argparse.Namespace, path: Path) -> list[Job]:
    parts: list[Job] = json.loads(path.read_text())["parts"] if path.exists() else []
    done = {key(part): part for part in parts}
    for job in jobs_of(args):
        name = " ".join(str(job[field]) for field in ("kind", "size", "precision", "batch_size") if field in job)
        if key(job) in done:
            job.update(done[key(job)])
            print(f"{name}: was done before", flush=True)
            continue
        print(f"{name} ... ", end="", flush=True)
        events, error = run_child("benchmarks.throughput", job)
        job.update(events[-1] if events else lost(job, error or "its process said nothing"))
        parts.append(job)
        whole = json.dumps({"benchmark": "throughput", "parts": parts}, indent=1) + "\n"
        save(path, lambda file, whole=whole: file.write_text(whole))
        print(f"{job.get('seconds', 0):.0f} s", flush=True)
    return parts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if present")
    parser.add_argument("--sizes", nargs="+", help=f"of {', '.join(SIZES)}; default: all on CUDA, vit-s on a CPU")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    betas = f"couplings; default: 1 {CONVERTED_BETA:g}, those from scratch and of converted models"
    parser.add_argument("--betas", nargs="+", type=float, default=[1.0, CONVERTED_BETA], help=betas)
    parser.add_argument("--caps", nargs="*", type=positive, default=[16, 24, 80], help="GB; default: 16 24 80")
    parser.add_argument(
        "--depths", nargs="*", type=positive, default=[6, 12, 24, 48], help="for memory; default: 6 12 24 48"
    )
    parser.add_argument(
        "--max-batch", type=positive, help="where the ladder of batch sizes ends; default: 16 on a CPU"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=positive, help="these, instead of a ladder of them")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        help="leave out contenders whose names hold one of these texts, e.g. compile",
    )
    parser.add_argument(
        "--unpredicted", action="store_true", help="measure only: the accounting takes seconds per contender"
    )
    parser.add_argument("--length", type=positive, help="tokens of a text; default: 128 on a CPU, 512 on CUDA")
    parser.add_argument("--rounds", type=positive, help="samples of each time; default: 5 on a CPU, 10 on CUDA")
    parser.add_argument("--threads", type=positive, help="PyTorch's threads on a CPU; default: PyTorch's choice")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="directory of the results; default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        choose_device(args)
    except ValueError as error:
        parser.error(str(error))
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


def name_of(device: torch.device) -> str:
    """Of the result files: results of different machines are not mixed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return "throughput-" + slug(name)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    name = name_of(torch.device(args.device))
    try:
        parts = run(args, args.out / f"{name}.json")
    except RuntimeError as error:
        print(f"throughput.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(parts)}")
    for figure, what in ((plot_throughput(parts), "speed"), (plot_memory(parts), "memory")):
        if figure is not None:
            save(args.out / f"{name}-{what}.png", lambda path, f=figure: f.savefig(path, format="png", dpi=110))
    print(f"\nwritten: {name}.json, {name}-speed.png and {name}-memory.png in {args.out}")
    errors = [row["error"] for part in parts for row in part.get("rows", ()) if row["error"]]
    return int(any(error != OUT_OF_MEMORY for error in errors))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
