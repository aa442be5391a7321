"""Real inputs for a model: lines of a text file, or images."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from .source import CheckpointError, Source, first_line

TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"}
CHARACTERS = 64
"""Of a text for each token that is asked for; words are shorter."""

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def real_batches(
    source: Source, model: PreTrainedModel, path: Path, *, batch_size: int = 8, limit: int = 200, max_length: int = 128
) -> Iterator[dict[str, Any]]:
    """Batches of the first ``limit`` texts (one per line) or images (a file, or all in a directory) in ``path``.

    Args:
        source: where the tokenizer or image processor is.
        model: says which of the two it takes, and on which device.
        max_length: tokens; longer texts are truncated.

    Raises:
        CheckpointError: there is nothing to read, or no tokenizer or image processor to read it with.
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library has no class for its own
        raise CheckpointError(f"{source.name} has no tokenizer that can be loaded: {first_line(error)}") from error
    config = model.config
    positions = config.max_position_embeddings - (config.pad_token_id or 0) - 1
    names = ("input_ids", "attention_mask", "token_type_ids")
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=min(max_length, positions),
            return_tensors="pt",
        )
        yield _shaped({name: batch[name].to(model.device) for name in names if name in batch}, model)


def _lines(path: Path, max_length: int) -> Iterator[str]:
    """The lines of a text file that say something, each as far as ``max_length`` tokens can reach."""
    longest = CHARACTERS * max_length
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(longest):
                if line.strip():
                    yield line.rstrip("\n")
                while len(line) == longest and not line.endswith("\n"):
                    line = file.readline(longest)  # the rest of it
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}.") from error


def _image_batches(source, model, path: Path, batch_size: int, limit: int) -> Iterator[dict[str, Any]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CheckpointError("reading images takes Pillow: pip install pillow.") from error
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} has no images in it ({', '.join(sorted(IMAGES))}).")
    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes of a processor
        raise CheckpointError(
            f"{source.name} has no image processor that can be loaded: {first_line(error)}"
        ) from error
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
        try:
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        except Exception as error:  # whatever the fields of its configuration make of it
            raise CheckpointError(
                f"the image processor of {source.name} cannot prepare {path}: {first_line(error)} Look at its preprocessor_config.json."
            ) from error
        yield {"pixel_values": pixels.to(model.device)}


def random_batch(model: PreTrainedModel, *, batch_size: int = 2, length: int = 128, seed: int = 0) -> dict[str, Any]:
    """Random tokens `(batch_size, length)`, or random images of the model's size, the same for the same seed."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(batch_size, config.num_channels, *_pair(config.image_size), generator=generator)
        return {"pixel_values": pixels.to(model.device)}
    length = min(length, config.max_position_embeddings - (config.pad_token_id or 0) - 1)
    reserved = max(config.pad_token_id or 0, config.bos_token_id or 0, config.eos_token_id or 0) + 1
    first = reserved if reserved < config.vocab_size else 0
    tokens = torch.randint(first, config.vocab_size, (batch_size, length), generator=generator)
    return _shaped({"input_ids": tokens.to(model.device)}, model)


def with_targets(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """With what the head of ``model`` computes a loss from: any labels of the right shape."""
    inputs: torch.Tensor = batch[model.main_input_name]
    head = type(model).__name__
    first = inputs.new_zeros(len(inputs), dtype=torch.long)
    if head.endswith("ForMaskedLM"):
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
    if head.endswith(("Classification", "ForMultipleChoice")):
        regression = model.config.num_labels == 1 and not head.endswith("ForMultipleChoice")
        return {**batch, "labels": first.float() if regression else first}
    return batch


def _shaped(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """With one choice, where the model wants choices: `(batch, 1, length)`."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: tensor.unsqueeze(1) for name, tensor in batch.items()}
    return batch


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
