"""Train a converted model to compute what its original computes, by distilling it from the original on unlabelled text.

    python examples/adapt.py --model_name_or_path STOCK --train_file texts.txt --beta 0.5 --output_dir runs/adapted

The larger `beta` is, the more a conversion changes what the model computes. A few hundred steps of self-distillation undo
most of that change before the model learns any task. No labels are needed, and the result is an ordinary reversible
checkpoint. At 1/32, the default of a conversion, there is almost nothing to undo, and the distillation does more harm than
good. So `--beta` has no default here.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from assets import english_encoder, rotten_tomatoes
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_pareprop import to_reversible
from hf_pareprop.tools.cards import model_card


@dataclass
class AdaptArguments:
    """Arguments of the adaptation."""

    beta: float = field(metadata={"help": "coupling: 1, 0.5, 0.25, ..."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "directory or Hub id of a stock text checkpoint; default: an English encoder"},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "a text per line; default: Rotten Tomatoes sentences, without their labels"}
    )
    steps: int = field(default=200, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=32, metadata={"help": "texts in a step"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak, after a warm-up of a tenth of the steps"})
    max_length: int = field(default=64, metadata={"help": "tokens; longer texts are truncated"})
    seed: int = 42
    output_dir: str = "runs/adapted"


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance between token states `(tokens, width)`, relative to the variance of the wanted states."""
    return (found - wanted).square().mean() / wanted.var()


def adapt(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 2e-4,
    max_length: int = 64,
) -> list[float]:
    """Train `model` to compute the last hidden states of `stock`. Returns the loss of every step.

    Both are base models on one device. The original runs in evaluation mode, and the converted model without dropout, so that
    the states can be equal.

    Raises:
        ValueError: there are fewer texts than a batch holds.
    """
    if len(texts) < batch_size:
        raise ValueError(
            f"{len(texts)} texts do not fill a batch of {batch_size}: give more, or a smaller batch_size."
        )
    loader = DataLoader(
        list(texts),
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: tokenizer(
            rows, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    stock.eval(), model.eval()
    losses: list[float] = []
    progress = tqdm(total=steps, desc="adapting")
    while len(losses) < steps:
        for batch in loader:
            batch = batch.to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                with torch.no_grad():
                    wanted = stock(**batch)[0]
                found = model(**batch)[0]
            tokens = batch["attention_mask"].bool()
            loss = distance(found[tokens].float(), wanted[tokens].float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if len(losses) == steps:
                break
    progress.close()
    return losses


def main(arguments: AdaptArguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_seed(arguments.seed)
    checkpoint = arguments.model_name_or_path or str(english_encoder())
    texts = (
        [line for line in Path(arguments.train_file).read_text(encoding="utf-8").splitlines() if line.strip()]
        if arguments.train_file
        else rotten_tomatoes()["train"]["text"]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stock = AutoModel.from_pretrained(checkpoint).to(device)
    model = to_reversible(stock, beta=arguments.beta)
    losses = adapt(
        model,
        stock,
        tokenizer,
        texts,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        max_length=arguments.max_length,
    )
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    model_card(
        model,
        model_name=Path(arguments.output_dir).name,
        base_model=checkpoint,
        dataset=arguments.train_file or "Rotten Tomatoes sentences, without labels",
        training=f"{arguments.steps} steps of self-distillation from the base model",
    ).save(Path(arguments.output_dir) / "README.md")
    print(f"distance to the original: {losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps")
    print(f"saved in {arguments.output_dir}: a reversible checkpoint to fine-tune at beta={arguments.beta:g}")


if __name__ == "__main__":
    main(HfArgumentParser(AdaptArguments, description=__doc__).parse_args_into_dataclasses()[0])
