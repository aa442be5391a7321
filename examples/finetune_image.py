"""Train an image classifier with reversible ViT and the stock Trainer.

    python examples/finetune_image.py               # from scratch on handwritten digits, PaReprop in the backward
    python examples/finetune_image.py --compare     # the same beside plain training, checkpointing and serial reprop

A stock ViT checkpoint and any data set with an image and a label column can be given instead.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from assets import digits
from common import STOCK, RunArguments, main, train
from datasets import Dataset, DatasetDict, load_dataset
from transformers import HfArgumentParser, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_pareprop import RevViTConfig, RevViTForImageClassification


@dataclass
class ImageArguments:
    """Model and data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a ViT checkpoint; default: a small ViT from scratch"}
    )
    beta: float | None = field(
        default=None, metadata={"help": "coupling; default: 1 from scratch, 0.5 from a stock checkpoint"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "data set for load_dataset; default: scikit-learn's digits"}
    )
    image_column: str = "image"
    label_column: str = "label"
    hidden_size: int = field(default=96, metadata={"help": "width of the model from scratch"})
    num_hidden_layers: int = field(default=6, metadata={"help": "depth of the model from scratch"})


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the default data, a few minutes on two CPU cores."""

    output_dir: str = "runs/image"
    num_train_epochs: float = 25
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 120
    learning_rate: float = 2e-3
    warmup_steps: float = 0.1
    weight_decay: float = 0.05
    save_strategy: str = "no"
    report_to: str = "none"
    remove_unused_columns: bool = False


def read_data(arguments: ImageArguments, channels: int | None, size: int | None) -> DatasetDict:
    """Splits `train` and `test` with columns `pixel_values`, (channels, height, width) floats, and `label`.

    Raises:
        ValueError: a split or a column is missing, or images differ in size and no checkpoint says which to resize to.
    """
    if not arguments.dataset_name:
        return digits()
    data = load_dataset(arguments.dataset_name)
    for split in ("train", "test"):
        if split not in data:
            raise ValueError(f"the data set has no split {split!r}; it has {', '.join(data)}.")
        for column in (arguments.image_column, arguments.label_column):
            if column not in data[split].column_names:
                raise ValueError(
                    f"the data set has no column {column!r}; it has {', '.join(data[split].column_names)}. Name its "
                    "columns with --image_column and --label_column."
                )

    def pixels(row: dict) -> dict:
        image = row[arguments.image_column]
        if channels is not None:
            image = image.convert("L" if channels == 1 else "RGB").resize((size, size))
        array = np.asarray(image, dtype=np.float32) / 127.5 - 1
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return {"pixel_values": array, "label": row[arguments.label_column]}

    return data.map(pixels, remove_columns=data["train"].column_names)


def shift_randomly(images: torch.Tensor, by: int) -> torch.Tensor:
    """Shift each image of (batch, channels, height, width) by up to `by` pixels, padding with zeros."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, [by] * 4)
    corners = torch.randint(0, 2 * by + 1, (len(images), 2)).tolist()
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, corners, strict=True)])


def collate(rows: list[dict], augment: bool) -> dict[str, torch.Tensor]:
    """Rows of the data set as a batch."""
    shapes = {np.shape(row["pixel_values"]) for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"images differ in shape: {sorted(shapes)[:3]}. Resize them, or give a checkpoint to fit them to.")
    images = torch.tensor(np.stack([row["pixel_values"] for row in rows]), dtype=torch.float32)
    images = shift_randomly(images, by=1) if augment else images
    return {"pixel_values": images, "labels": torch.tensor([row["label"] for row in rows])}


def configuration_for(data: Dataset, image: ImageArguments, labels: int) -> dict:
    """Fields of a small ViT for the images of `data`, the same for the stock and the reversible model."""
    channels, height, width = np.shape(data[0]["pixel_values"])
    return {
        "image_size": [height, width],
        "patch_size": max(2, min(height, width) // 8 * 2),
        "num_channels": channels,
        "hidden_size": image.hidden_size,
        "num_hidden_layers": image.num_hidden_layers,
        "num_attention_heads": max(1, image.hidden_size // 32),
        "intermediate_size": 2 * image.hidden_size,
        "num_labels": labels,
    }


def once(image: ImageArguments, run: RunArguments, training: TrainingArguments) -> dict:
    channels = size = None
    if image.model_name_or_path:
        config = ViTConfig.from_pretrained(image.model_name_or_path)
        channels, size = config.num_channels, config.image_size
    data = read_data(image, channels, size)
    labels = len(set(data["train"]["label"]))

    def build(method: str):
        if image.model_name_or_path:
            if method in STOCK:
                return ViTForImageClassification.from_pretrained(image.model_name_or_path, num_labels=labels)
            beta = 0.5 if image.beta is None else image.beta
            return RevViTForImageClassification.from_pretrained(
                image.model_name_or_path, num_labels=labels, beta=beta, backward_engine=method
            )
        fields = configuration_for(data["train"], image, labels)
        if method in STOCK:
            return ViTForImageClassification(ViTConfig(**fields))
        beta = 1.0 if image.beta is None else image.beta
        return RevViTForImageClassification(RevViTConfig(**fields, beta=beta, backward_engine=method))

    class AugmentedData(torch.utils.data.Dataset):
        """Marks training rows, so that only they are augmented."""

        def __init__(self, rows: Dataset):
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict:
            return {**self.rows[index], "augment": True}

    return train(
        build,
        {"train": AugmentedData(data["train"]), "test": data["test"]},
        run,
        training,
        description={
            "dataset": image.dataset_name or "scikit-learn's digits",
            "base_model": image.model_name_or_path or "trained from scratch",
        },
        data_collator=lambda rows: collate(rows, augment=not image.dataset_name and "augment" in rows[0]),
    )


if __name__ == "__main__":
    parser = HfArgumentParser((ImageArguments, RunArguments, ImageTrainingArguments), description=__doc__)
    image, run, training = parser.parse_args_into_dataclasses()
    main(__file__, run, training, lambda: once(image, run, training))
