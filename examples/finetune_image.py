"""Train an image classifier with reversible ViT, Swin or MViT and the stock Trainer.

    python examples/finetune_image.py                  # from scratch on handwritten digits, PaReprop in the backward
    python examples/finetune_image.py --family swin    # or mvit
    python examples/finetune_image.py --compare        # the same beside plain training, checkpointing and serial reprop
    python examples/finetune_image.py --dataset_name fashion-mnist --num_train_epochs 2

A stock checkpoint of the family, and any data set with an image and a label column, can be used instead.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from assets import digits, fashion_mnist
from common import STOCK, RunArguments, check_columns, main, train
from datasets import DatasetDict, load_dataset
from transformers import HfArgumentParser, TrainingArguments

from hf_pareprop.plan import CONVERTED_BETA
from hf_pareprop.tools.contenders import to_plain
from hf_pareprop.tools.families import FAMILIES, Family, Shape

FASHION_MNIST = "fashion-mnist"
IMAGE_FAMILIES = [name for name, family in FAMILIES.items() if family.takes_images]


@dataclass
class ImageArguments:
    """Model and data."""

    family: str = field(default="vit", metadata={"help": "the kind of model", "choices": IMAGE_FAMILIES})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "directory or Hub id of a checkpoint; default: a small model from scratch"}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": f"coupling; default: 1 from scratch, {CONVERTED_BETA:g} from a stock checkpoint"},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"data set for load_dataset, or {FASHION_MNIST}; default: scikit-learn's digits"},
    )
    image_column: str = "image"
    label_column: str = "label"
    image_size: int = field(default=32, metadata={"help": "pixels that --dataset_name is resized to, from scratch"})
    hidden_size: int = field(default=96, metadata={"help": "width of the model from scratch; of its last stage"})
    num_hidden_layers: int = field(default=6, metadata={"help": "depth of the model from scratch, in all stages"})


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
    """The splits `train` and `test` with the columns `pixel_values`, (channels, size, size) in [-1, 1], and `label`.

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


def enlarged(data: DatasetDict, size: int) -> DatasetDict:
    """Images of `size` pixels: small images are enlarged by whole factors, and the rest is padding."""
    data = data.with_format("torch")

    def enlarge(rows: dict) -> dict:
        images = rows["pixel_values"]
        factor = size // images.shape[-1]
        images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        left = size - images.shape[-1]
        return {**rows, "pixel_values": torch.nn.functional.pad(images, [left // 2, left - left // 2] * 2)}

    return data.map(enlarge, batched=True).with_format(None)


def from_scratch(family: Family, image: ImageArguments, channels: int, size: int) -> dict[str, Any]:
    """The configuration fields of a small model for images of `size` pixels. Stages halve the patches, if there are stages."""
    depths = family.depths(image.num_hidden_layers)
    width = image.hidden_size >> (len(depths) - 1)
    grid = 8 if family.staged else 4
    optional = {"patch_size": max(1, size // grid), "window_size": 4}
    known = family.config_class().to_dict()
    return {
        **family.shape_fields(Shape(width, max(1, width // 32), depths, mlp_ratio=2)),
        **{name: value for name, value in optional.items() if name in known},
        "image_size": size,
        "num_channels": channels,
        "initializer_range": width**-0.5,  # the usual 0.02 is for models eight times as wide
    }


def once(image: ImageArguments, run: RunArguments, training: TrainingArguments) -> dict:
    checkpoint, family = image.model_name_or_path, FAMILIES[image.family]
    patches = "patch_size" in family.config_class().to_dict()
    if checkpoint:
        stock: Any = family.config_class.from_pretrained(checkpoint)
        channels, size = stock.num_channels, stock.image_size
    elif image.dataset_name in (None, FASHION_MNIST):
        # Patches of a fixed size need larger images than the digits of 8 x 8 pixels, and halving needs an even number of patches.
        channels, size = 1, 32 if image.dataset_name or not patches else 8
    else:
        channels, size = 3, image.image_size
    with training.main_process_first():  # the other processes use what the main process has downloaded
        if image.dataset_name in (None, FASHION_MNIST):
            data = fashion_mnist() if image.dataset_name else digits()
            if size != len(data["test"][0]["pixel_values"][0]):
                data = enlarged(data, size)
        else:
            data = read_data(image, channels, size)
    labels = len(set(data["train"]["label"]))

    def build(method: str):
        engine = "autograd" if method in STOCK else method
        beta = image.beta if image.beta is not None else CONVERTED_BETA if checkpoint else 1.0
        options: dict[str, Any] = {"num_labels": labels, "beta": beta, "backward_engine": engine}
        if checkpoint:
            model = family.classifier.from_pretrained(checkpoint, **options)
        else:
            model = family.classifier(family.config_class(**from_scratch(family, image, channels, size), **options))
        return to_plain(model) if method in STOCK else model

    test = data["test"].with_format("torch")
    is_digits = image.dataset_name is None
    train_split = data["train"].with_transform(shift_randomly) if is_digits else data["train"].with_format("torch")
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
