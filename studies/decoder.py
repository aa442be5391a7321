"""Measure what conversion costs a decoder in perplexity, for several betas, before training and after a short LoRA run.

    python -m studies.decoder [--parts before lora] [--seeds 3] [--jobs 2]

The decoder is SmolLM2-135M. Every case is a process of its own on one thread. Results are written after each case. Cases that
the JSON file already holds do not run again, so an interrupted study goes on.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

from benchmarks.measure import Job, emit
from benchmarks.options import Parser
from hf_pareprop.tools.records import markdown

from .resumed import RESULTS, study

BETAS = {"layer": (128, 32, 16, 64, 256), "sublayer": (32, 16, 8)}
"""The values of 1 / beta, by what is coupled. The default for converted weights comes first."""

STEPS, BATCH, LENGTH, RANK, LEARNING_RATE = 12, 2, 128, 8, 1e-3
"""The settings of the LoRA run."""

TEST_ROWS = 8

PARTS = ("before", "lora")
FIELDS = ("steps", "inverse_beta", "seed")
"""The fields that identify a case."""


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """The jobs, in an order in which the results at any time are those of a smaller study."""
    runs: list[int | None] = [None] if "before" in args.parts else []
    if "lora" in args.parts:
        runs += args.seeds
    for seed in runs:
        yield {"steps": None, "inverse_beta": None, "seed": seed}
        for steps, betas in BETAS.items():
            for inverse in betas:
                yield {"steps": steps, "inverse_beta": inverse, "seed": seed}


def child(job: Job) -> None:
    import assets
    import torch
    from language import packed, perplexity, spread, with_lora
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed
    from transformers.utils import logging

    import hf_pareprop as hp

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    began = time.perf_counter()
    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    documentation = assets.python_documentation()
    if job["steps"] is not None:
        model = hp.to_reversible(model, steps=job["steps"], beta=1 / job["inverse_beta"])
    found = {}
    if job["seed"] is None:
        texts = (assets.long_reviews()["test"]["text"], documentation["test"]["text"])
        rows = [row for each in texts for row in spread(packed(each, tokenizer, 256), 5)["input_ids"]]
        found["perplexity"] = perplexity(model, rows)
    else:
        test = spread(packed(documentation["test"]["text"], tokenizer, LENGTH), TEST_ROWS)["input_ids"][:]
        train = packed(documentation["train"]["text"], tokenizer, LENGTH)
        set_seed(job["seed"])
        trained = with_lora(model, RANK).train()
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], LEARNING_RATE)
        batches = iter(DataLoader(train, BATCH, shuffle=True, collate_fn=default_data_collator))
        losses = []
        for _ in range(STEPS):
            loss = trained(**next(batches)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found |= {"losses": losses, "perplexity": perplexity(trained, test)}
        if job["steps"] is not None:
            found["as_stock"] = perplexity(hp.to_stock(trained.merge_and_unload()), test)
    emit(**found, seconds=round(time.perf_counter() - began, 1))


def table(results: Sequence[Job]) -> str:
    """A table with a line for each coupling: bits kept, and perplexity before and after training, averaged over seeds."""
    head = "coupled|beta|bits kept per element and layer|perplexity before|after LoRA|as a stock model|seeds"
    lines = [head.split("|")]
    ways = sorted({(r["steps"] or "", r["inverse_beta"] or 0) for r in results})
    for steps, inverse in ways:
        rows = [r for r in results if (r["steps"] or "", r["inverse_beta"] or 0) == (steps, inverse)]
        trained = [r for r in rows if r["seed"] is not None]
        per_step = inverse.bit_length() - 1
        shown = [
            {"": "nothing: the stock model", "layer": "layers", "sublayer": "sub-blocks"}[steps],
            f"1/{inverse}" if inverse > 1 else str(inverse),
            str(per_step * (2 if steps == "sublayer" else 1)) if steps else "",
            _mean([r["perplexity"] for r in rows if r["seed"] is None]),
            _mean([r["perplexity"] for r in trained]),
            _mean([r["as_stock"] for r in trained if "as_stock" in r]),
            str(len(trained)),
        ]
        lines.append(shown)
    return "\n".join(markdown(lines))


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, RESULTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    if found := study("decoder", parser, arguments, jobs_of, FIELDS, child):
        print(table(found[1]))


if __name__ == "__main__":
    main()
