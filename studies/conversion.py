"""Measure what conversion costs in accuracy: before training, after fine-tuning, and on the way back to a stock model.

    python -m studies.conversion [--parts before main return ...] [--seeds 3] [--jobs 2]

Every case is a process of its own on one thread. Results are written after each case. Cases that the JSON file already holds
do not run again, so an interrupted study goes on. Without arguments it takes two hours on two cores.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

from benchmarks.measure import Job, emit
from benchmarks.options import Parser, write_figure

from .conversion_report import plot, table
from .resumed import RESULTS, study

BETAS = (1.0, 0.5, 0.25, 0.125)
TEXT = ("rotten-tomatoes", "reuters-r8", "20-newsgroups")
ADAPTATION_STEPS = 200
LONGER = 270
ANNEAL = ((0.5, 1 / 4), (0.6, 1 / 8), (0.7, 1 / 16), (0.8, 1 / 32), (0.9, 0.0))
GROW = ((0.0, 1 / 16), (0.1, 1 / 8), (0.2, 1 / 4), (0.3, 1.0))


def before() -> Iterator[Job]:
    """Cases: fidelity before training."""
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
    """Cases: fine-tuning the converted encoder, compared with the stock one."""
    for beta in (None, 1 / 32, 1 / 16, 1 / 8, 1 / 4):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta}


def large(seed: int) -> Iterator[Job]:
    """Cases: the same at the two largest betas."""
    for beta in (1 / 2, 1.0):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta}


def hybrid(seed: int) -> Iterator[Job]:
    """Cases: the same with a conventional last layer."""
    for beta in (1 / 16, 1 / 8):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": [beta] * 5 + [0.0]}


def image(seed: int) -> Iterator[Job]:
    for beta in (None, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
        yield {"task": "fashion-mnist", "seed": seed, "beta": beta}
    for beta in (None, 1 / 32, 1 / 4):
        yield {"task": "fashion-mnist, Swin", "seed": seed, "beta": beta}


def way_back(seed: int) -> Iterator[Job]:
    """Cases: annealing beta over the second half of the training."""
    for beta in (1 / 8, 1 / 4):
        for task in TEXT:
            yield {"task": task, "seed": seed, "beta": beta, "schedule": [s for s in ANNEAL if s[1] < beta]}


def adapted(seed: int) -> Iterator[Job]:
    """Cases: self-distillation before fine-tuning."""
    for task in TEXT:
        yield {"task": task, "seed": seed, "beta": 0.25, "adapted": ADAPTATION_STEPS}


def variants(seed: int) -> Iterator[Job]:
    """Cases on one task: growing beta, and coupling whole layers instead of sub-blocks."""
    task = "rotten-tomatoes"
    yield {"task": task, "seed": seed, "beta": 0.25, "schedule": GROW}
    for beta in (1 / 8, 1 / 4):
        yield {"task": task, "seed": seed, "beta": beta, "granularity": "layer"}


def goal(seed: int) -> Iterator[Job]:
    """Cases on the hardest task, to close the gap: self-distillation, and a longer training."""
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
PARTS = ("before", *SEEDED)

FIELDS = ("model", "task", "seed", "beta", "granularity", "predictor", "schedule", "adapted", "grid_bits", "steps")
"""The fields that identify a case. ``predictor`` occurs in old results only, because that variant was dropped."""


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """The jobs, in an order in which the results at any time are those of a smaller study."""
    if "before" in args.parts:
        yield from before()
    for name, part in SEEDED.items():
        if name in args.parts:
            for seed in args.seeds:
                yield from part(seed)
    if "adapted" in args.parts:
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, RESULTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    if found := study("conversion", parser, arguments, jobs_of, FIELDS, child):
        out, results = found
        print(table(results))
        write_figure(out / "conversion.png", plot(results))


if __name__ == "__main__":
    main()
