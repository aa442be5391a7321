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
from hf_pareprop.tools.records import markdown, save

METHODS = ("plain", "checkpointing", "reprop", "pareprop")
STOCK = ("plain", "checkpointing")
WARM_UP_STEPS = 3
BESIDE_STEPS = 5
"""The number of steps of plain training and of checkpointing that are measured to compare with the reversible run."""


@dataclass
class RunArguments:
    """Arguments of the examples in addition to those of `TrainingArguments`."""

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
            MemoryBudget(self.memory_budget)  # raises an error for a wrong budget before anything is loaded


class Meter(TrainerCallback):
    """Measures the time per step and the peak memory of a run."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.resident = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:  # what is there before the first step (weights, libraries) does not count
            self.resident, _ = now_and_at_the_peak(args.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self._began)

    def on_train_end(self, args, state, control, **kwargs):
        _, peak = now_and_at_the_peak(args.device)
        self.peak_mb = (peak - self.resident) / 2**20

    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.times[WARM_UP_STEPS:] or self.times)


class SayWhatIsKept(TrainerCallback):
    """Prints what `MemoryBudget` keeps, as soon as that is known."""

    told = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.told and state.is_world_process_zero and (said := memory_in_words(model)) is not None:
            print(said, flush=True)
            self.told = True


def check_columns(data: DatasetDict, kind: str, *columns: str) -> None:
    """Check that `data` has the splits `train` and `test` with the columns that `--{kind}_column` and `--label_column` name.

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
    """Run the stock `Trainer` once. Saves the model, its card and `results.json` in `arguments.output_dir`.

    If there are several processes, only the main process writes files and measures the other methods.

    Args:
        build: a function that makes the model for a method.
        data: the splits `train` and `test`.
        run: the method and the other options of the run.
        arguments: the arguments of `Trainer`.
        description: `dataset` and `base_model` for the model card.
    """
    set_seed(arguments.seed)
    model = build(run.method)
    kind = type(model)  # FSDP2 gives a model another class
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
    measured = run.beside and run.method not in STOCK
    batch = next(iter(trainer.get_train_dataloader())) if measured else {}  # drawn by all processes together
    if is_main(arguments):
        if run.method not in STOCK:
            card = training_card(trainer.model, accuracy=accuracy, training=arguments, **description)
            card.save(Path(arguments.output_dir) / "README.md")
        if measured:
            subject = Subject(kind, trainer.model.config)
            result["beside"] = [
                row.as_dict() | {"largest": size} for row, size in beside(subject, batch, run, arguments)
            ]
        write_json(Path(arguments.output_dir) / "results.json", [result], arguments)
    return result


def is_main(arguments: TrainingArguments) -> bool:
    """Whether this is the main process, which prints and writes files."""
    return arguments.process_index == 0


def beside(subject: Subject, batch: dict, run: RunArguments, arguments: TrainingArguments) -> list[tuple[Row, int]]:
    """Compare the reversible run with plain training and checkpointing: a few steps of each on one batch of training data.

    Returns:
        The measurements of each, and the largest batch that fits into the memory of plain training.
    """
    batch = {name: value for name, value in batch.items() if value is not None}
    size, device = arguments.per_device_train_batch_size, arguments.device
    budget = None if run.method != "pareprop" or run.memory_budget == "none" else run.memory_budget
    ours = Contender(run.method, subject.config.beta, budget)
    comparison = Comparison(subject, batch, device, arguments.bf16)
    ways = (PLAIN, CHECKPOINTED, ours)
    rows = comparison.measure(dict.fromkeys(ways, size), BESIDE_STEPS, lambda line: None)
    cap = comparison.predict(PLAIN, size).total
    return [(row, comparison.predicted_limit(way, cap)) for row, way in zip(rows, ways, strict=True)]


def table_beside(result: dict) -> str:
    """A table with a line each for plain training, checkpointing and the run itself, and a sentence about the memory saved."""
    rows = result["beside"]
    size = rows[0]["batch_size"]
    largest = f"largest batch in the memory of plain training at {size}"
    lines = [["", "activations (MB)", "step (ms)", "accuracy (%)", largest]]
    for row in rows:
        activations, step = row["activation_bytes"] / 2**20, statistics.median(row["ms"]) if row["ms"] else None
        score = f"{100 * result['accuracy']:.1f}" if row is rows[-1] else "not trained"
        shown = row["error"] or f"{step:.0f}"
        name = f"reversible ({result['method']})" if row is rows[-1] else row["contender"]["name"]
        lines.append([name, f"{activations:.1f}", shown, score, str(row["largest"])])
    plain, ours = (row["activation_bytes"] / 2**20 for row in (rows[0], rows[-1]))
    return "\n".join([*markdown(lines), "", f"Activations take {ours:.1f} MB instead of {plain:.1f} MB."])


def main(script: str, run: RunArguments, arguments: TrainingArguments, once: Callable[[], dict]) -> None:
    """Do the runs and print the table. A single run is done here; several runs get a process each.

    Raises:
        ValueError: several runs are asked for, but several processes are running already.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    output = Path(arguments.output_dir)
    if not run.compare and run.seeds == 1:
        results = [once()]
    elif arguments.world_size > 1:
        raise ValueError(
            f"--compare and --seeds start a process for every run, and {arguments.world_size} processes are running already: give "
            "them without torchrun or accelerate launch."
        )
    else:
        results = []
        for seed in range(arguments.seed, arguments.seed + run.seeds):
            for method in METHODS if run.compare else (run.method,):
                print(f"--- {method}, seed {seed}", flush=True)
                results.append(_child(script, method, seed, output / f"{method}-{seed}"))
        write_json(output / "results.json", results, arguments)
    if not is_main(arguments):
        return
    print(table_beside(results[0]) if "beside" in results[0] else table(results))
    print(f"\nMeasured on {device_name()}{_in_processes(arguments)}; written to {output / 'results.json'}.")
    trained = output if len(results) == 1 else output / f"{results[-1]['method']}-{results[-1]['seed']}"
    if results[-1]["method"] not in STOCK:
        head = json.loads((trained / "config.json").read_text())["architectures"][0].partition("For")[2]
        print(f"Load it anywhere with AutoModelFor{head}.from_pretrained({str(trained)!r}, trust_remote_code=True).")


def _child(script: str, method: str, seed: int, output: Path) -> dict:
    """Do one run in a process of its own, so that its peak memory can be measured."""
    given = [*sys.argv[1:], "--compare", "False", "--beside", "False"]  # the last value of an option is used
    once = ["--seeds", "1", "--method", method, "--seed", str(seed), "--output_dir", str(output)]
    result = subprocess.run([sys.executable, script, *given, *once], stdout=subprocess.DEVNULL)
    if result.returncode:
        raise SystemExit(f"{method} with seed {seed} failed; see the error above.")
    return json.loads((output / "results.json").read_text())["results"][0]


def table(results: Sequence[dict]) -> str:
    """A table with the medians over seeds of step time and memory, and the mean and the range of the accuracy."""
    lines = [["method", "step (ms)", "peak memory (MB)", "accuracy (%)"]]
    for method in dict.fromkeys(r["method"] for r in results):
        rows = [r for r in results if r["method"] == method]
        scores = [100 * r["accuracy"] for r in rows]
        score = f"{statistics.mean(scores):.1f}"
        if len(rows) > 1:
            by_seed = ", ".join(f"{r['seed']}: {s:.1f}" for r, s in zip(rows, scores, strict=True))
            score += f" [{min(scores):.1f}, {max(scores):.1f}] (seed {by_seed})"
        step, peak = (statistics.median(r[k] for r in rows) for k in ("step_ms", "peak_mb"))
        lines.append([method, f"{step:.0f}", f"{peak:.0f}", score])
    return "\n".join(markdown(lines))


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def _in_processes(arguments: TrainingArguments) -> str:
    processes, kind = arguments.world_size, arguments.distributed_state.distributed_type.value
    return f", in {processes} processes ({kind})" if processes > 1 else ""


def write_json(path: Path, results: Sequence[dict], arguments: TrainingArguments) -> None:
    """Write results together with the machine, the versions and the arguments."""
    about = {
        "device": device_name(),
        "processes": arguments.world_size,
        "distributed_type": arguments.distributed_state.distributed_type.value,
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
    save(path, lambda file: file.write_text(json.dumps(about, indent=2) + "\n"))
