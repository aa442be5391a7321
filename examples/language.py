"""What the decoder's example and study share: rows of tokens, LoRA, and perplexity."""

from collections.abc import Iterable, Sequence

import peft
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The names of the linear layers of a Llama and of models like it."""


def packed(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Concatenate texts, with an end-of-text token after each, and cut them into rows of `length` tokens.

    Returns:
        The columns `input_ids` and `labels`, which are the same. Tokens at the end that do not fill a row are left out.

    Raises:
        ValueError: the texts do not fill one row.

    Example:
        >>> packed(["def f(x): ...", "A good film."], tokenizer, 4).num_rows
        2
    """
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if not rows:
        raise ValueError(
            f"the texts have {len(tokens)} tokens, which do not fill a row of {length}: give more text or shorter rows."
        )
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def spread(rows: Dataset, count: int) -> Dataset:
    """`count` rows at equal distances, or all rows if there are fewer."""
    return rows.select(range(0, len(rows), max(1, len(rows) // count))).select(range(min(count, len(rows))))


def perplexity(model: torch.nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 4) -> float:
    """The exponential of the mean loss of the next token, in evaluation mode. The model's own mode is restored.

    Args:
        model: a causal language model, stock, reversible or with adapters.
        rows: token ids, rows of one length.
    """
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for ids in torch.as_tensor(rows).split(batch_size):
            total += model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss.item() * len(ids)
    model.train(training)
    return float(torch.tensor(total / len(rows)).exp())


def with_lora(model: torch.nn.Module, rank: int) -> peft.PeftModel:
    """The model with LoRA adapters of a rank at every linear layer of its layers. Nothing else is trained."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)
