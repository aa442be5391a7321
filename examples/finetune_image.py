"""Train an image classifier with reversible ViT and the stock Trainer.

    python examples/finetune_image.py               # from scratch on handwritten digits, PaReprop in the backward
    python examples/finetune_image.py --compare     # the same beside plain training, checkpointing and serial reprop

A stock ViT checkpoint and any data set with an image and a label column can be given instead.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from assets import digits
from common import STOCK, RunArguments, check_columns, main, train
from datasets import DatasetDict, load_dataset
from transformers import HfArgumentParser, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_pareprop import RevViTConfig, RevViTForImageClassification
from hf_pareprop.plan import CONVERTED_BETA


@dataclass
class ImageArguments:
    """Model and data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a ViT checkpoint; default: a small ViT from scratch"}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": f"coupling; default: 1 from scratch, {CONVERTED_BETA:g} from a stock checkpoint"},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "data set for load_dataset; default: scikit-learn's digits"}
    )
    image_column: str = "image"
    label_column: str = "label"
    image_size: int = field(default=32, metadata={"help": "pixels that --dataset_name is resized to, from scratch"})
    hidden_size: int = field(default=96, metadata={"help": "width of the model from scratch"})
    num_hidden_layers: int = field(default=6, metadata={"help": "depth of the model from scratch"})


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the default data, a few minutes on two CPU cores."""

    output_dir: str = "runs/image"
    num_train_epochs: float = 20
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 120
    learning_rate: float = 1e-3
    warmup_steps: float = 0.1
    weight_decay: float = 0.05
    save_strategy: str = "no"
    report_to: str = "none"
    remove_unused_columns: bool = False


def read_data(arguments: ImageArguments, channels: int, size: int) -> DatasetDict:
    """Splits `train` and `test` with columns `pixel_values`, (channels, size, size) in [-1, 1], and `label`.

    Raises:
        ValueError: a split or a column is missing.
    """
    data = load_dataset(arguments.dataset_name)
    check_columns(data, "image", arguments.image_column, arguments.label_column)

    def pixels(row: dict) -> dict:
        image = row[arguments.image_column].convert("L" if channels == 1 else "RGB").resize((size, size))
        array = np.asarray(image, dtype=np.float32).reshape(size, size, channels).transpose(2, 0, 1)
        return {"pixel_values": array / 127.5 - 1, "label": row[arguments.label_column]}

    return data.map(pixels, remove_columns=data["train"].column_names).class_encode_column("label")


def shift_randomly(rows: dict) -> dict:
    """Rows of square images, each shifted by up to a pixel and padded with zeros: augmentation for tiny digits."""
    images = torch.tensor(np.stack(rows["pixel_values"]), dtype=torch.float32)
    size = images.shape[-1]
    corners = torch.randint(0, 3, (len(images), 2)).tolist()
    padded = torch.nn.functional.pad(images, [1] * 4)
    shifted = [p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, corners, strict=True)]
    return {**rows, "pixel_values": shifted}


def once(image: ImageArguments, run: RunArguments, training: TrainingArguments) -> dict:
    checkpoint = image.model_name_or_path
    if checkpoint:
        stock = ViTConfig.from_pretrained(checkpoint)
        channels, size = stock.num_channels, stock.image_size
    else:
        channels, size = (3, image.image_size) if image.dataset_name else (1, 8)
    data = read_data(image, channels, size) if image.dataset_name else digits()
    labels = len(set(data["train"]["label"]))
    fields = {
        "image_size": size,
        "patch_size": size // 4,
        "num_channels": channels,
        "hidden_size": image.hidden_size,
        "num_hidden_layers": image.num_hidden_layers,
        "num_attention_heads": max(1, image.hidden_size // 32),
        "intermediate_size": 2 * image.hidden_size,
        "num_labels": labels,
        "initializer_range": image.hidden_size**-0.5,  # the usual 0.02 is for models eight times as wide
    }

    def build(method: str):
        if method in STOCK:
            if checkpoint:
                return ViTForImageClassification.from_pretrained(checkpoint, num_labels=labels)
            return ViTForImageClassification(ViTConfig(**fields))
        beta = image.beta if image.beta is not None else CONVERTED_BETA if checkpoint else 1.0
        if checkpoint:
            return RevViTForImageClassification.from_pretrained(
                checkpoint, num_labels=labels, beta=beta, backward_engine=method
            )
        return RevViTForImageClassification(RevViTConfig(**fields, beta=beta, backward_engine=method))

    test = data["test"].with_format("torch")
    train_split = (
        data["train"].with_format("torch") if image.dataset_name else data["train"].with_transform(shift_randomly)
    )
    return train(
        build,
        DatasetDict(train=train_split, test=test),
        run,
        training,
        description={
            "dataset": image.dataset_name or "scikit-learn's digits",
            "base_model": checkpoint or "trained from scratch",
        },
    )


if __name__ == "__main__":
    parser = HfArgumentParser((ImageArguments, RunArguments, ImageTrainingArguments), description=__doc__)
    image, run, training = parser.parse_args_into_dataclasses()
    main(__file__, run, training, lambda: once(image, run, training))
