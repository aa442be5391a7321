"""Do reversible models that are trained from scratch become as accurate as plain ones? ViT, Swin and MViT on Fashion-MNIST.

    python -m studies.convergence [--families vit swin mvit] [--seeds 3] [--epochs 15] [--images 12000] [--jobs 2]

Every model is trained twice: at beta 1 with the engine pareprop, and at beta 0, where it is the plain model bit for bit. Both
start from the same weights, and see the same batches for the same number of steps. Each training is a process of its own on
one thread. Results are written after each training. Trainings that the JSON file already holds do not run again.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.measure import Job, emit
from benchmarks.options import Parser, write_figure
from hf_pareprop.tools.records import markdown

from .resumed import RESULTS, study

FAMILIES = ("vit", "swin", "mvit")
SIZE = 32
"""The side of an image in pixels: 28, plus padding of two on each side, so that every grid of patches can be halved."""

FIELDS: dict[str, dict[str, Any]] = {
    "vit": dict(patch_size=4, hidden_size=64, num_hidden_layers=8, num_attention_heads=4, intermediate_size=128),
    "swin": dict(patch_size=4, embed_dim=48, depths=[2, 6], num_heads=[3, 6], window_size=4, mlp_ratio=2.0),
    "mvit": dict(embed_dim=32, depths=[1, 2, 5], num_heads=1, mlp_ratio=2.0),
}
CURVE_ROWS = 2000
"""The number of test images after every epoch but the last. After the last epoch all 10,000 are used."""

IDENTITY = ("family", "beta", "seed", "epochs", "images")
"""The fields that identify a training."""

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 128, 1e-3, 0.05, 0.1


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """The jobs, seed by seed, so that the results at any time are those of a smaller study."""
    for seed in args.seeds:
        for family in args.families:
            for beta in (1.0, 0.0):
                yield {"family": family, "beta": beta, "seed": seed, "epochs": args.epochs, "images": args.images}


def child(job: Job) -> None:
    """Train one model. Emits the accuracy on the test split after every epoch, and the training losses."""
    import assets
    import torch
    from torch.nn.functional import pad

    from hf_pareprop.tools.families import FAMILIES as ROWS

    torch.set_num_threads(1)
    began = time.perf_counter()
    data = assets.fashion_mnist().with_format("torch")

    def split(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = data[name].shuffle(seed=0).select(range(min(count, len(data[name]))))[:]
        return pad(rows["pixel_values"], [2] * 4) * 2 - 1, rows["label"]

    images, labels = split("train", job["images"])
    test_images, test_labels = split("test", 10_000)
    row = ROWS[job["family"]]
    config = row.config_class(
        image_size=SIZE,
        num_channels=1,
        num_labels=10,
        beta=job["beta"],
        backward_engine="pareprop" if job["beta"] else "autograd",
        **FIELDS[job["family"]],
    )
    torch.manual_seed(job["seed"])
    model: Any = row.classifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = job["epochs"] * (len(images) // BATCH)
    warm_up = int(WARM_UP * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(1, warm_up), total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm_up),
        ],
        [warm_up],
    )
    curve, losses = [], []
    for epoch in range(job["epochs"]):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = model(images[rows], labels=labels[rows]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * BATCH
        losses.append(round(total / (len(images) // BATCH * BATCH), 4))
        model.eval()
        rows = len(test_images) if epoch == job["epochs"] - 1 else CURVE_ROWS
        with torch.no_grad():
            found = torch.cat([model(part).logits.argmax(-1) for part in test_images[:rows].split(500)])
        curve.append((found == test_labels[:rows]).double().mean().item())
    parameters = sum(p.numel() for p in model.parameters())
    emit(curve=curve, losses=losses, parameters=parameters, seconds=round(time.perf_counter() - began, 1))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of the accuracy after the last epoch in per cent: means over seeds, and the difference for each seed."""
    lines = [["family", "parameters", "seeds", "plain", "reversible, beta 1", "difference, seed by seed"]]
    for family in dict.fromkeys(r["family"] for r in results):
        ends = {
            beta: {r["seed"]: 100 * r["curve"][-1] for r in results if (r["family"], r["beta"]) == (family, beta)}
            for beta in (0.0, 1.0)
        }
        seeds = sorted(ends[0.0].keys() & ends[1.0].keys())
        if not seeds:
            continue
        plain, reversible = (statistics.mean(ends[beta][seed] for seed in seeds) for beta in (0.0, 1.0))
        differences = ", ".join(f"{ends[1.0][seed] - ends[0.0][seed]:+.2f}" for seed in seeds)
        parameters = next(r["parameters"] for r in results if r["family"] == family)
        means = f"{plain:.2f}", f"{reversible:.2f}"
        lines.append([family, f"{parameters:,}", str(len(seeds)), *means, differences])
    return "\n".join(markdown(lines))


def plot(results: Sequence[Mapping[str, Any]]) -> Any:
    """Draw learning curves: test accuracy by epoch, with a line for every seed."""
    families = list(dict.fromkeys(r["family"] for r in results))
    figure, axes = plt.subplots(1, len(families), figsize=(4 * len(families), 3.4), squeeze=False, sharey=True)
    for axis, family in zip(axes[0], families, strict=True):
        for beta, colour, name in ((0.0, "0.45", "plain"), (1.0, "tab:blue", "reversible, beta 1")):
            runs = [r for r in results if (r["family"], r["beta"]) == (family, beta)]
            for i, run in enumerate(runs):
                epochs = range(1, len(run["curve"]) + 1)
                axis.plot(epochs, [100 * a for a in run["curve"]], color=colour, lw=1, label=None if i else name)
        axis.set_title(family)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend()
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, RESULTS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=12_000, help="how many of the 60,000 training images to use")
    if found := study("convergence", parser, arguments, jobs_of, IDENTITY, child):
        out, results = found
        print(table(results))
        write_figure(out / "convergence.png", plot(results))


if __name__ == "__main__":
    main()
