"""What conversion costs in accuracy: before training, after fine-tuning, and on the way back to a stock model.

    python -m studies.conversion [--parts before main return ...] [--seeds 3] [--jobs 2]

Every case is a process of its own on one thread. Results are written after each case, and cases that the JSON file
already holds are not run again; what was interrupted goes on. Without arguments: two hours on two cores.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measure import Job, add_study_options, emit, run_child, study
from hf_pareprop.tools.records import cpu_model, save, software

from .conversion_report import plot, table

BETAS = (1.0, 0.5, 0.25, 0.125)
TEXT = ("rotten-tomatoes", "reuters-r8", "20-newsgroups")
ADAPTATION_STEPS = 200
LONGER = 270
ANNEAL = ((0.5, 1 / 4), (0.6, 1 / 8), (0.7, 1 / 16), (0.8, 1 / 32), (0.9, 0.0))
GROW = ((0.0, 1 / 16), (0.1, 1 / 8), (0.2, 1 / 4), (0.3, 1.0))


def before() -> Iterator[Job]:
    """Fidelity before training."""
    for model in ("english-encoder", "antibody-roberta", "fashion-vit"):
        for beta in (*BETAS, 1 / 16, 1 / 32):
            yield {"model": model, "beta": beta}
            if model == "english-encoder":
                yield {"model": model, "beta": beta, "granularity": "layer"}
    for grid_bits in (4, 6, 8, 12):
        yield {"model": "english-encoder", "beta": 1 / 16, "grid_bits": grid_bits}
    for beta in (1 / 4, 1 / 8, 1 / 16):
        yield {"model": "english-encoder", "beta": [beta] * 5 + [0.0]}
    for kept in (1, 2, 3):
        yield {"model": "english-encoder", "beta": [0.0] * kept + [0.5] * (6 - kept)}
        yield {"model": "english-encoder", "beta": [0.5] * (6 - kept) + [0.0] * kept}


def main_part(seed: int) -> Iterator[Job]:
    """Fine-tuning the converted encoder, against the stock one."""
    for beta in (None, 1 / 32, 1 / 16, 1 / 8, 1 / 4):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta}


def large(seed: int) -> Iterator[Job]:
    """The same at the two largest betas."""
    for beta in (1 / 2, 1.0):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta}


def hybrid(seed: int) -> Iterator[Job]:
    """The same with the last layer conventional."""
    for beta in (1 / 16, 1 / 8):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": [beta] * 5 + [0.0]}


def image(seed: int) -> Iterator[Job]:
    for beta in (None, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
        yield {"task": "fashion-mnist", "seed": seed, "beta": beta}
    for beta in (None, 1 / 32, 1 / 4):
        yield {"task": "fashion-mnist, Swin", "seed": seed, "beta": beta}


def way_back(seed: int) -> Iterator[Job]:
    """Annealing beta over the second half of the training."""
    for beta in (1 / 8, 1 / 4):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta, "schedule": [s for s in ANNEAL if s[1] < beta]}


def adapted(seed: int) -> Iterator[Job]:
    """Self-distillation before fine-tuning."""
    for task in TEXT:
        yield {"task": task, "seed": seed, "beta": 0.25, "adapted": ADAPTATION_STEPS}


def variants(seed: int) -> Iterator[Job]:
    """Growing beta, and layers instead of sub-blocks; on one task."""
    task = "rotten-tomatoes"
    yield {"task": task, "seed": seed, "beta": 0.25, "schedule": GROW}
    for beta in (1 / 8, 1 / 4):
        yield {"task": task, "seed": seed, "beta": beta, "granularity": "layer"}


def goal(seed: int) -> Iterator[Job]:
    """What else could close the gap on the hardest task: self-distillation, a longer training."""
    task = "20-newsgroups"
    yield {"task": task, "seed": seed, "beta": 1 / 16, "adapted": ADAPTATION_STEPS}
    for beta in (None, 1 / 16, 1 / 8):
        yield {"task": task, "seed": seed, "beta": beta, "steps": LONGER}


SEEDED = {
    "main": main_part,
    "hybrid": hybrid,
    "return": way_back,
    "adapted": adapted,
    "image": image,
    "large": large,
    "variants": variants,
    "goal": goal,
}


def jobs_of(parts: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """In an order in which whatever has been done so far is a smaller study."""
    if "before" in parts:
        yield from before()
    for name, part in SEEDED.items():
        if name in parts:
            for seed in seeds:
                yield from part(seed)
    if "adapted" in parts:
        yield {"model": "english-encoder", "beta": 0.25, "adapted": ADAPTATION_STEPS}


def child(job: Job) -> None:
    import torch
    from transformers.utils import logging

    from .conversion_cases import fidelity, finetune

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = finetune(job) if "task" in job else fidelity(job)
    emit(**found, seconds=round(time.perf_counter() - began, 1))


def run(job: Job) -> Job:
    """One case in a process of its own: the job with what it found."""
    # One thread a case, so that cases do not disturb each other.
    events, error = run_child("studies.conversion", job, {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    if error or not events:
        raise SystemExit(f"{job} failed: {error or 'its process said nothing'}")
    return {**job, **events[-1]}


def key(job: Job) -> str:
    """What tells a case from the others; ``predictor`` from results that were measured before that variant was dropped."""
    fields = ("model", "task", "seed", "beta", "granularity", "predictor", "schedule", "adapted", "grid_bits", "steps")
    return json.dumps([job.get(field) for field in fields])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("before", *SEEDED), default=["before", *SEEDED])
    add_study_options(parser, Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.child:
        return child(args.child)
    results = study(
        args.out / "conversion.json",
        jobs_of(args.parts, range(42, 42 + args.seeds)),
        key,
        run,
        lambda result, done, todo: f"{done} cases done, {todo} were to do: {json.dumps(result)}",
        {"device": f"{cpu_model()}, one thread per case", **software()},
        args.jobs,
    )
    print(table(results))
    save(args.out / "conversion.png", lambda file: plot(results).savefig(file, dpi=110, format="png"))


if __name__ == "__main__":
    main()
