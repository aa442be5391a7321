"""Fine-tune a decoder with LoRA: plain training, gradient checkpointing and reversible training, one after the other.

    python examples/finetune_decoder.py                  # SmolLM2-135M on Python's documentation
    python examples/finetune_decoder.py --data reviews   # on film reviews

All three start from the same weights and the same adapters, and see the same rows. The table shows for each what it keeps for
the backward pass per token and layer, the time of a step, the loss, and the perplexity on other texts before and after
training. For the reversible model it also shows the perplexity of the stock model with the merged adapters. Any stock
checkpoint of a Llama, or of a model with the same names of linear layers, can be used instead.
"""

import copy
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from assets import long_reviews, python_documentation, smollm2
from common import Meter, device_name, write_json
from datasets import Dataset
from language import packed, perplexity, spread, with_lora
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pareprop import to_reversible, to_stock
from hf_pareprop.tools.memory import peak_bytes
from hf_pareprop.tools.records import markdown

METHODS = ("plain training", "gradient checkpointing", "reversible")
DATA = {"documentation": python_documentation, "reviews": long_reviews}
DEPTHS = (2, 4)
"""The numbers of layers of the models on which memory per layer is measured. The memory is the same at any depth."""


@dataclass
class DecoderArguments:
    """Model and data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a stock causal language model; default: SmolLM2-135M"}
    )
    data: str = field(default="documentation", metadata={"choices": tuple(DATA), "help": "texts to train on"})
    steps: str = field(
        default="layer", metadata={"choices": ("layer", "sublayer"), "help": "what the reversible model couples"}
    )
    beta: float | None = field(
        default=None, metadata={"help": "coupling: 1, 0.5, 0.25, ...; default: 1/128, or 1/32 with sub-blocks"}
    )
    rank: int = field(default=8, metadata={"help": "of the adapters"})
    length: int = field(default=128, metadata={"help": "tokens in a row"})
    test_rows: int = field(default=8, metadata={"help": "rows that perplexity is measured on"})


@dataclass
class DecoderTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the default data, two minutes of CPU time."""

    output_dir: str = "runs/decoder"
    max_steps: int = 10
    per_device_train_batch_size: int = 2
    learning_rate: float = 1e-3
    warmup_steps: float = 0.1
    logging_steps: float = 1
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool | None = True


@dataclass
class Found:
    """The results of a method. `bytes_kept` is per token and layer."""

    method: str
    bytes_kept: float
    step_ms: float
    losses: list[float]
    before: float
    after: float
    as_stock: float | None


def prepared(stock: PreTrainedModel, method: str, decoder: DecoderArguments) -> PreTrainedModel:
    """A stock model prepared for training by a method."""
    if method == "gradient checkpointing":
        stock.gradient_checkpointing_enable()
    if method != "reversible":
        return stock
    return to_reversible(stock, steps=decoder.steps, **({} if decoder.beta is None else {"beta": decoder.beta}))


def bytes_kept(config, method: str, decoder: DecoderArguments, batch: int, device: torch.device) -> float:
    """The bytes per token that a layer adds to the peak of a training step, measured with random weights and tokens."""
    peaks = []
    for depth in DEPTHS:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = depth
        if getattr(shallow, "layer_types", None):
            shallow.layer_types = shallow.layer_types[:depth]
        model = prepared(AutoModelForCausalLM.from_config(shallow), method, decoder)
        if method == "reversible" and device.type == "cpu":
            model.set_backward_engine("reprop")  # the profiler does not see the worker thread of pareprop
        model = with_lora(model, decoder.rank).to(device).train()
        ids = torch.randint(config.vocab_size, (batch, decoder.length), device=device)

        def step(model=model, ids=ids) -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        step()  # allocates the gradients
        peaks.append(peak_bytes(step, device))
    return (peaks[1] - peaks[0]) / (DEPTHS[1] - DEPTHS[0]) / (batch * decoder.length)


def run(
    method: str, path: str, train: Dataset, test: Dataset, decoder: DecoderArguments, training: TrainingArguments
) -> Found:
    """Train with a method. Saves the adapters of the reversible model in `training.output_dir`."""
    stock = AutoModelForCausalLM.from_pretrained(path)
    kept = bytes_kept(stock.config, method, decoder, training.per_device_train_batch_size, training.device)
    base = prepared(stock, method, decoder).to(training.device)
    before = perplexity(base, test["input_ids"][:])
    set_seed(training.seed)
    model = with_lora(base, decoder.rank)
    meter = Meter()
    trainer = Trainer(model, training, train_dataset=train, callbacks=[meter])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    after = perplexity(model, test["input_ids"][:])
    as_stock = None
    if method == "reversible":
        model.save_pretrained(training.output_dir)
        as_stock = perplexity(to_stock(model.merge_and_unload()), test["input_ids"][:])
    return Found(method, kept, meter.step_ms(), losses, before, after, as_stock)


def table(found: list[Found]) -> str:
    head = "|kept per token and layer (bytes)|step (ms)|loss, first and last step|perplexity before|after|as a stock model"
    lines = [head.split("|")]
    for each in found:
        losses = f"{each.losses[0]:.3f}, {each.losses[-1]:.3f}" if each.losses else "not logged"
        stock = "it is one" if each.as_stock is None else f"{each.as_stock:.2f}"
        measured = f"{each.bytes_kept:,.0f}", f"{each.step_ms:.0f}", losses, f"{each.before:.2f}", f"{each.after:.2f}"
        lines.append([each.method, *measured, stock])
    return "\n".join(markdown(lines))


def main(decoder: DecoderArguments, training: TrainingArguments) -> None:
    """
    Raises:
        ValueError: several processes were started.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if training.world_size > 1:
        raise ValueError(
            f"{training.world_size} processes are running, and this example compares in one: start it without torchrun."
        )
    path = decoder.model_name_or_path or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = DATA[decoder.data]()
    rows = {split: packed(data[split]["text"], tokenizer, decoder.length) for split in ("train", "test")}
    test = spread(rows["test"], decoder.test_rows)
    found = []
    for method in METHODS:
        print(f"--- {method}", flush=True)
        found.append(run(method, path, rows["train"], test, decoder, training))
    file = Path(training.output_dir) / "results.json"
    write_json(file, [asdict(each) for each in found], training)
    print(table(found))
    print(f"\nMeasured on {device_name()}; written to {file}, beside the adapters of the reversible model.")


if __name__ == "__main__":
    parser = HfArgumentParser((DecoderArguments, DecoderTrainingArguments), description=__doc__)
    main(*parser.parse_args_into_dataclasses())
