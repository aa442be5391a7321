"""Train a reversible ViT with each training step captured in one CUDA graph, and compare its speed with ordinary steps.

    python examples/cuda_graph.py [--batch_size 64] [--num_hidden_layers 12] [--steps 300]

All batches need the same shape: the images have one size, and the last incomplete batch is dropped.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from assets import digits
from torch import Tensor
from torch.utils.data import DataLoader

from hf_pareprop import GraphedStep, RevViTConfig, RevViTForImageClassification

WARM_UP_STEPS = 10


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def build(args: argparse.Namespace) -> RevViTForImageClassification:
    config = RevViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, args.hidden_size // 32),
        intermediate_size=2 * args.hidden_size,
        num_labels=10,
        initializer_range=args.hidden_size**-0.5,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )
    return RevViTForImageClassification(config).cuda().train()


def batches(args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Endless batches of one shape."""
    data = digits()["train"].rename_column("label", "labels").with_format("torch")
    while True:
        for batch in DataLoader(data, args.batch_size, shuffle=True, drop_last=True):
            yield {name: tensor.cuda() for name, tensor in batch.items()}


def train(args: argparse.Namespace, graphed: bool) -> tuple[float, float]:
    """Train a model. Returns the milliseconds per step, and the accuracy on test images at the end."""
    torch.manual_seed(args.seed)
    model, stream = build(args), batches(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, capturable=True, fused=True)

    def ordinary(**batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss

    ordinary(**next(stream))  # creates the optimizer's state
    step: Callable[..., Tensor] = GraphedStep(model, next(stream), optimizer) if graphed else ordinary
    times = []
    for _ in range(args.steps):
        batch = next(stream)
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(**batch)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    test = digits()["test"].with_format("torch")[:]
    with torch.no_grad():
        guesses = model.eval()(test["pixel_values"].cuda()).logits.argmax(-1).cpu()
    return statistics.median(times[WARM_UP_STEPS:] or times), (guesses == test["label"]).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("cuda_graph.py: error: this machine has no CUDA device, which CUDA graphs need.", file=sys.stderr)
        return 2
    for graphed in (False, True):
        ms, accuracy = train(args, graphed)
        print(f"{'one CUDA graph' if graphed else 'ordinary steps':15} {ms:8.2f} ms per step, accuracy {accuracy:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
