"""What the fine-tuning examples share: a run with the stock Trainer, its measurements, and the comparison of methods."""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
import transformers
from datasets import DatasetDict
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_pareprop
from hf_pareprop import BetaSchedule, MemoryBudget
from hf_pareprop.memory_probe import now_and_at_the_peak
from hf_pareprop.tools.callbacks import memory_in_words
from hf_pareprop.tools.cards import training_card
from hf_pareprop.tools.compare import Comparison, Row
from hf_pareprop.tools.contenders import CHECKPOINTING as CHECKPOINTED
from hf_pareprop.tools.contenders import STOCK as PLAIN
from hf_pareprop.tools.contenders import Contender, Subject

METHODS = ("plain", "checkpointing", "reprop", "pareprop")
STOCK = ("plain", "checkpointing")
CPU = torch.device("cpu")
WARM_UP_STEPS = 3
BESIDE_STEPS = 5
"""Of plain training and of checkpointing beside the reversible run, for the table."""


@dataclass
class RunArguments:
    """Arguments of the examples beside those of `TrainingArguments`."""

    method: str = field(
        default="pareprop",
        metadata={
            "choices": METHODS,
            "help": "plain: the stock model; checkpointing: the stock model with gradient checkpointing; reprop, pareprop: "
            "the reversible model with that engine.",
        },
    )
    compare: bool = field(default=False, metadata={"help": "train by every method, each in a process of its own"})
    beside: bool = field(
        default=True,
        metadata={"help": "after training, take a few steps of plain training and checkpointing to compare"},
    )
    memory_budget: str = field(
        default="gradients",
        metadata={
            "help": "what pareprop keeps and need not rebuild: what takes no more memory (gradients), what fits (auto), an "
            "amount (4GB), a part of the free memory (80%%), the last layers (4 layers), or none",
        },
    )
    seeds: int = field(default=1, metadata={"help": "how many seeds, counted up from --seed"})
    anneal_from: float | None = field(
        default=None,
        metadata={"help": "fraction of the training from which beta goes to 0, so that the result is a stock model"},
    )

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: at least one run is needed.")
        if self.anneal_from is not None and not 0 <= self.anneal_from < 1:
            raise ValueError(f"--anneal_from {self.anneal_from}: a fraction of the training, 0 to 1, is expected.")
        if self.memory_budget != "none":
            MemoryBudget(self.memory_budget)  # says what is wrong with it before anything is loaded


class Meter(TrainerCallback):
    """Time per step and peak memory of a run."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.resident = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.resident, _ = now_and_at_the_peak(CPU)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self._began)

    def on_train_end(self, args, state, control, **kwargs):
        # On a CPU: the process's high-water mark, less what was resident before the first step (weights, libraries).
        peak = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else now_and_at_the_peak(CPU)[1] - self.resident
        )
        self.peak_mb = peak / 2**20

    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.times[WARM_UP_STEPS:] or self.times)


class SayWhatIsKept(TrainerCallback):
    """Prints what `MemoryBudget` found out, as soon as it has."""

    told = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.told and (said := memory_in_words(model)) is not None:
            print(said, flush=True)
            self.told = True


def check_columns(data: DatasetDict, kind: str, *columns: str) -> None:
    """Whether `data` has the splits `train` and `test`, with the columns that `--{kind}_column` and `--label_column` name.

    Raises:
        ValueError: a split or a column is missing.
    """
    for split in ("train", "test"):
        if split not in data:
            raise ValueError(f"the data set has no split {split!r}; it has {', '.join(data)}.")
        for column in columns:
            if column not in data[split].column_names:
                raise ValueError(
                    f"the data set has no column {column!r}; it has {', '.join(data[split].column_names)}. Name its "
                    f"columns with --{kind}_column and --label_column."
                )


def train(
    build: Callable[[str], PreTrainedModel],
    data: DatasetDict,
    run: RunArguments,
    arguments: TrainingArguments,
    description: dict,
    **trainer_arguments,
) -> dict:
    """One run of the stock `Trainer`; saves the model, its card and `results.json` in `arguments.output_dir`.

    Args:
        build: makes the model for a method.
        data: splits `train` and `test`.
        description: `dataset` and `base_model` for the model card.
    """
    set_seed(arguments.seed)
    model = build(run.method)
    if run.method == "checkpointing":
        model.gradient_checkpointing_enable()
    metric = evaluate.load(str(Path(__file__).with_name("accuracy.py")))
    meter = Meter()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
        callbacks=[meter],
        **trainer_arguments,
    )
    if run.method == "pareprop" and run.memory_budget != "none":
        trainer.add_callback(MemoryBudget(run.memory_budget))
        trainer.add_callback(SayWhatIsKept())
    if run.anneal_from is not None and run.method not in STOCK:
        trainer.add_callback(BetaSchedule.anneal(run.anneal_from))
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    result = {
        "method": run.method,
        "seed": arguments.seed,
        "step_ms": meter.step_ms(),
        "peak_mb": meter.peak_mb,
        "accuracy": accuracy,
    }
    if run.method not in STOCK:
        card = training_card(trainer.model, accuracy=accuracy, training=arguments, **description)
        card.save(Path(arguments.output_dir) / "README.md")
        if run.beside:
            result["beside"] = [row.as_dict() | {"largest": size} for row, size in beside(trainer, run)]
    _write_json(Path(arguments.output_dir) / "results.json", [result], arguments)
    return result


def beside(trainer: Trainer, run: RunArguments) -> list[tuple[Row, int]]:
    """The reversible run beside plain training and checkpointing: a few steps of each on one batch of the training data.

    Returns:
        For each what was measured, and the largest batch that it could take in the memory of plain training.
    """
    model, arguments = trainer.model, trainer.args
    batch = {name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if value is not None}
    size, device = arguments.per_device_train_batch_size, model.device
    budget = None if run.method != "pareprop" or run.memory_budget == "none" else run.memory_budget
    ours = Contender(f"reversible ({run.method})", run.method, model.config.beta, budget)
    comparison = Comparison(Subject(type(model), model.config), batch, device, arguments.bf16)
    ways = (PLAIN, CHECKPOINTED, ours)
    rows = comparison.measure(dict.fromkeys(ways, size), BESIDE_STEPS, lambda line: None)
    cap = comparison.predict(PLAIN, size).total
    return [(row, comparison.predicted_limit(way, cap)) for row, way in zip(rows, ways, strict=True)]


def table_beside(result: dict) -> str:
    """What the run saves: a line each for plain training, checkpointing and the run itself, and a sentence."""
    rows = result["beside"]
    size = rows[0]["batch_size"]
    lines = [
        f"| | activations (MB) | step (ms) | accuracy (%) | largest batch in the memory of plain training at {size} |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        activations, step = row["activation_bytes"] / 2**20, statistics.median(row["ms"]) if row["ms"] else None
        score = f"{100 * result['accuracy']:.1f}" if row is rows[-1] else "not trained"
        shown = row["error"] or f"{step:.0f}"
        lines.append(f"| {row['contender']} | {activations:.1f} | {shown} | {score} | {row['largest']} |")
    plain, ours = (row["activation_bytes"] / 2**20 for row in (rows[0], rows[-1]))
    return "\n".join([*lines, "", f"Activations take {ours:.1f} MB instead of {plain:.1f} MB."])


def main(script: str, run: RunArguments, arguments: TrainingArguments, once: Callable[[], dict]) -> None:
    """Run what was asked for and print the table: one method and seed here, several in a process each."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    output = Path(arguments.output_dir)
    if not run.compare and run.seeds == 1:
        results = [once()]
    else:
        results = []
        for seed in range(arguments.seed, arguments.seed + run.seeds):
            for method in METHODS if run.compare else (run.method,):
                print(f"--- {method}, seed {seed}", flush=True)
                results.append(_child(script, method, seed, output / f"{method}-{seed}"))
        _write_json(output / "results.json", results, arguments)
    print(table_beside(results[0]) if "beside" in results[0] else table(results))
    print(f"\nMeasured on {device_name()}; written to {output / 'results.json'}.")
    trained = output if len(results) == 1 else output / f"{results[-1]['method']}-{results[-1]['seed']}"
    if results[-1]["method"] not in STOCK:
        head = json.loads((trained / "config.json").read_text())["architectures"][0].partition("For")[2]
        print(f"Load it anywhere with AutoModelFor{head}.from_pretrained({str(trained)!r}, trust_remote_code=True).")


def _child(script: str, method: str, seed: int, output: Path) -> dict:
    """One run in a process of its own, so that its peak memory is its own."""
    given = [*sys.argv[1:], "--compare", "False", "--beside", "False"]  # the last one counts
    once = ["--seeds", "1", "--method", method, "--seed", str(seed), "--output_dir", str(output)]
    result = subprocess.run([sys.executable, script, *given, *once], stdout=subprocess.DEVNULL)
    if result.returncode:
        raise SystemExit(f"{method} with seed {seed} failed; see the error above.")
    return json.loads((output / "results.json").read_text())["results"][0]


def table(results: Sequence[dict]) -> str:
    """Medians over seeds of step time and memory; mean and range of the accuracy."""
    lines = ["| method | step (ms) | peak memory (MB) | accuracy (%) |", "|---|---|---|---|"]
    for method in dict.fromkeys(r["method"] for r in results):
        rows = [r for r in results if r["method"] == method]
        scores = [100 * r["accuracy"] for r in rows]
        score = f"{statistics.mean(scores):.1f}"
        if len(rows) > 1:
            by_seed = ", ".join(f"{r['seed']}: {s:.1f}" for r, s in zip(rows, scores, strict=True))
            score += f" [{min(scores):.1f}, {max(scores):.1f}] (seed {by_seed})"
        step, peak = (statistics.median(r[k] for r in rows) for k in ("step_ms", "peak_mb"))
        lines.append(f"| {method} | {step:.0f} | {peak:.0f} | {score} |")
    return "\n".join(lines)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def _write_json(path: Path, results: Sequence[dict], arguments: TrainingArguments) -> None:
    about = {
        "device": device_name(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, hf_pareprop)},
        "arguments": {
            "learning_rate": arguments.learning_rate,
            "epochs": arguments.num_train_epochs,
            "max_steps": arguments.max_steps,
            "batch_size": arguments.per_device_train_batch_size,
        },
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(about, indent=2) + "\n")
    temporary.rename(path)
