"""Write checkpoints for timm. `timm.create_model("local-dir:FOLDER", pretrained=True)` and TimmWrapper can read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import is_timm_available

from ..configuration_rev_mvit import ARCHITECTURES
from ..modeling_rev_mvit import RevMViTPreTrainedModel
from .architectures import Library
from .configuration import is_statistic
from .source import CheckpointError, quoted, read_json

PRETRAINED_CFG: dict[str, Any] = {
    "custom_load": False,
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
}
"""The preprocessing in the configuration of the MViTv2 checkpoints that timm distributes."""

FIXED = {"mlp_ratio": 4.0, "qkv_bias": True, "layer_norm_eps": 1e-6}
"""Fields with a fixed value in timm's architectures."""


def save_timm_checkpoint(model: RevMViTPreTrainedModel, folder: str | Path, processor: Path | None = None) -> None:
    """Write `config.json` and `model.safetensors` of the timm model with the weights of a reversible MViT.

    The timm model computes what ``model`` computes at ``beta=0``. At another beta the outputs differ.

    Args:
        model: a reversible MViT with a classifier, or without one ([`RevMViTModel`]).
        folder: the directory; it is made if it does not exist.
        processor: `preprocessor_config.json` of an image processor. Its mean and deviation are written to the configuration.

    Raises:
        ValueError: timm has no such architecture, or the image processor's file is damaged.

    Example:
        >>> save_timm_checkpoint(model, "mvit-for-timm")
        >>> timm.create_model("local-dir:mvit-for-timm", pretrained=True)
    """
    config = timm_config(model)
    if processor is not None and processor.is_file():
        given = read_json(processor)
        for ours, theirs in {"mean": "image_mean", "std": "image_std"}.items():
            if not is_statistic(value := given.get(theirs)):
                raise CheckpointError(
                    f"{processor} says {theirs}={quoted(value)}: a number for each channel is expected. Correct it there."
                )
            config["pretrained_cfg"][ours] = value or config["pretrained_cfg"][ours]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def timm_config(model: RevMViTPreTrainedModel) -> dict[str, Any]:
    """The contents of timm's `config.json` for a reversible MViT.

    Raises:
        ValueError: timm has no such architecture.
    """
    config: Any = model.config
    name, labels = config.timm_name(), config.num_labels if hasattr(model, "head") else 0
    odd = [f"{field}={getattr(config, field)}" for field, value in FIXED.items() if getattr(config, field) != value]
    if name is None or odd:
        what = ", ".join(odd) or f"depths={config.depths} and embed_dim={config.embed_dim}"
        raise ValueError(
            f"timm has no MViTv2 with {what}, so its weights cannot become a checkpoint of timm: it has "
            f"{', '.join(ARCHITECTURES)}. Keep the reversible checkpoint; at beta=0 it is the conventional model."
        )
    cfg = {**PRETRAINED_CFG, **(config.timm_pretrained_cfg or {})}
    for statistic in ("mean", "std"):
        cfg[statistic] = cfg[statistic] or PRETRAINED_CFG[statistic]
        if len(values := cfg[statistic]) != config.num_channels:
            cfg[statistic] = [round(sum(values) / len(values), 6)] * config.num_channels
    cfg |= {"num_classes": labels, "input_size": [config.num_channels, config.image_size, config.image_size]}
    result: dict[str, Any] = {"architecture": name, "num_classes": labels, "num_features": config.hidden_size}
    result["global_pool"] = "token" if config.use_cls_token else "avg"
    names = [config.id2label[i] for i in range(labels)]
    if names != [f"LABEL_{i}" for i in range(labels)]:
        result["label_names"] = names
    arguments = {"img_size": (config.image_size, 224), "in_chans": (config.num_channels, 3)}
    if changed := {field: value for field, (value, usual) in arguments.items() if value != usual}:
        result["model_args"] = changed
    return {**result, "pretrained_cfg": cfg}


def wrapper_config(model: RevMViTPreTrainedModel) -> PreTrainedConfig:
    """The configuration with which transformers' TimmWrapper makes the timm model.

    Raises:
        ValueError: timm has no such architecture.
        ImportError: timm is not installed.
    """
    fields, given = timm_config(model), {"id2label": model.config.id2label, "label2id": model.config.label2id}
    fields |= {"model_args": fields.get("model_args"), "num_classes": model.config.num_labels}
    if not is_timm_available():
        raise ImportError(
            f"The stock twin of {type(model).__name__} is a model of timm, which is not installed: pip install timm. Without it, "
            "hf-pareprop export writes a checkpoint that timm loads."
        )
    from transformers import TimmWrapperConfig  # in transformers 5.17 this imports timm and torchvision

    config: PreTrainedConfig = TimmWrapperConfig.from_dict(fields, **given)
    return config


def _head_of(config: Mapping[str, Any]) -> str | None:
    wrapped = config.get("model_type", "timm_wrapper") == "timm_wrapper"
    if not wrapped or not str(config.get("architecture", "")).startswith("mvitv2"):
        return None
    cfg = config.get("pretrained_cfg")
    classes = config.get("num_classes", cfg.get("num_classes", 1000) if isinstance(cfg, Mapping) else 1000)
    return "ForImageClassification" if classes else "Model"


TIMM = Library(
    name="timm",
    models="MViTv2",
    head_of=_head_of,
    model_name=lambda model: str(timm_config(model)["architecture"]),
    save=save_timm_checkpoint,
    wrapper="TimmWrapper",
    wrapper_config=wrapper_config,
)
