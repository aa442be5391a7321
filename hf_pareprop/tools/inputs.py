"""Inputs for a model: lines of a text file, images, or random ones."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from .architectures import counts_from_padding
from .source import CheckpointError, Source, explained

TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"}
CHARACTERS = 64
"""For each token that is wanted, this many characters of a text are read. Words are shorter than that."""

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def real_batches(
    source: Source, model: PreTrainedModel, path: Path, *, batch_size: int = 8, limit: int = 200, max_length: int = 128
) -> Iterator[dict[str, Any]]:
    """Batches of the first ``limit`` texts (one per line) or images (a file, or all in a directory) in ``path``.

    Args:
        source: the checkpoint with the tokenizer or the image processor.
        model: the model. It determines whether texts or images are read, and the device.
        path: the file or directory to read.
        batch_size: the number of inputs in a batch.
        limit: the largest number of inputs to read.
        max_length: the largest number of tokens; longer texts are truncated.
    """
    if not path.is_file() and not path.is_dir():
        what = "is neither a file nor a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give a text file, an image, or a directory of images.")
    if model.main_input_name == "pixel_values":
        yield from _image_batches(source, model, path, batch_size, limit)
    else:
        yield from _text_batches(source, model, path, batch_size, limit, max_length)


def _text_batches(source, model, path: Path, batch_size: int, limit: int, max_length: int) -> Iterator[dict[str, Any]]:
    if path.is_dir() or path.suffix.lower() in TABLES:
        raise CheckpointError(f"{path} is not plain text: give a file with one text per line.")
    texts = list(islice(_lines(path, max_length), limit))
    if not texts:
        raise CheckpointError(f"{path} has no text in it.")
    if not source.has_vocabulary():
        raise CheckpointError(f"{source.name} has no tokenizer to read {path} with: put its files there.")
    with explained(f"{source.name} has no tokenizer that can be loaded", "Look at its files."):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    config = model.config
    # Many decoders have no padding token. Any token will do, because padding is masked.
    if tokenizer.pad_token is None and not counts_from_padding(config):
        tokenizer.pad_token = tokenizer.eos_token
    positions = _positions(config, max_length)
    names = ("input_ids", "attention_mask", "token_type_ids")
    for start in range(0, len(texts), batch_size):
        chosen, longest = texts[start : start + batch_size], min(max_length, positions)
        with explained(f"the tokenizer of {source.name} cannot prepare {path}", "Look at its tokenizer_config.json."):
            batch = tokenizer(chosen, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        if (largest := int(batch["input_ids"].max())) >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {source.name} makes token {largest} of {path}, and the model has vocab_size={config.vocab_size}: "
                "put the tokenizer there that belongs to the model."
            )
        yield _shaped({name: batch[name].to(model.device) for name in names if name in batch}, model)


def _lines(path: Path, max_length: int) -> Iterator[str]:
    """The lines of a text file that are not empty, each cut at a length that has at least ``max_length`` tokens."""
    longest = CHARACTERS * max_length
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(longest):
                if line.strip():
                    yield line.rstrip("\n")
                while len(line) == longest and not line.endswith("\n"):
                    line = file.readline(longest)  # skip the rest of the line
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Give a text file.") from error


def _image_batches(source, model, path: Path, batch_size: int, limit: int) -> Iterator[dict[str, Any]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CheckpointError("reading images needs Pillow: pip install pillow.") from error
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} has no images in it ({', '.join(sorted(IMAGES))}).")
    advice = "Look at its preprocessor_config.json."
    with explained(f"{source.name} has no image processor that can be loaded", advice):
        processor = AutoImageProcessor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    for start in range(0, min(len(files), limit), batch_size):
        images = []
        for file in files[start : min(start + batch_size, limit)]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(file) as image:
                        images.append(image.convert("RGB" if model.config.num_channels == 3 else "L"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
                raise CheckpointError(f"{file} is not an image that can be read: {error}.") from error
        with explained(f"the image processor of {source.name} cannot prepare {path}", advice):
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels.to(model.device)}


def random_batch(model: PreTrainedModel, *, batch_size: int = 2, length: int = 128, seed: int = 0) -> dict[str, Any]:
    """Random tokens `(batch_size, length)`, or random images of the model's size, the same for the same seed."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(batch_size, config.num_channels, *_pair(config.image_size), generator=generator)
        return {"pixel_values": pixels.to(model.device)}
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    length = min(length, _positions(config, length))
    reserved = max(map(_largest, special)) + 1
    first = reserved if reserved < config.vocab_size else 0
    tokens = torch.randint(first, config.vocab_size, (batch_size, length), generator=generator)
    return _shaped({"input_ids": tokens.to(model.device)}, model)


def with_targets(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """``batch`` with labels of the right shape and any value, so that the head of ``model`` computes a loss."""
    inputs: torch.Tensor = batch[model.main_input_name]
    head = type(model).__name__
    first = inputs.new_zeros(len(inputs), dtype=torch.long)
    if head.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
        return {**batch, "labels": inputs}
    if head.endswith("ForTokenClassification"):
        return {**batch, "labels": torch.zeros_like(inputs)}
    if head.endswith("ForQuestionAnswering"):
        return {**batch, "start_positions": first, "end_positions": first}
    if head.endswith("ForMaskedImageModeling"):
        height, width = _pair(model.config.image_size)
        rows, columns = _pair(model.config.patch_size)
        patches = (height // rows) * (width // columns)
        return {**batch, "bool_masked_pos": inputs.new_ones(len(inputs), patches, dtype=torch.bool)}
    if head.endswith("ForMultipleChoice"):
        return {**batch, "labels": first}
    if head.endswith("Classification"):
        config: Any = model.config
        labels, problem = config.num_labels, config.problem_type
        if problem == "multi_label_classification" or (problem == "regression" and labels > 1):
            return {**batch, "labels": inputs.new_zeros(len(inputs), labels, dtype=torch.float)}
        return {
            **batch,
            "labels": first.float() if labels == 1 and problem != "single_label_classification" else first,
        }
    return batch


def loss_of(outputs: Any) -> torch.Tensor:
    """The loss of a model that got the batch of :func:`with_targets`. Without a head it is the mean square of the output."""
    loss: torch.Tensor | None = outputs.get("loss")
    return outputs[0].float().square().mean() if loss is None else loss


def _shaped(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """``batch`` in the shape of one choice per text, `(batch, 1, length)`, if the model is for multiple choice."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: tensor.unsqueeze(1) for name, tensor in batch.items()}
    return batch


def _positions(config: Any, otherwise: int) -> int:
    """The largest number of tokens in a text; ``otherwise`` if the model has no table of positions."""
    positions: int = getattr(config, "max_position_embeddings", None) or otherwise
    return positions - (config.pad_token_id or 0) - 1 if counts_from_padding(config) else positions


def _largest(tokens: int | Sequence[int] | None) -> int:
    return max(tokens, default=0) if isinstance(tokens, Sequence) else tokens or 0


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
