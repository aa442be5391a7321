"""Predict activation memory against depth: plain training, activation checkpointing and the reversible model.

    python -m benchmarks.depth [--size vit-l] [--batch-size 64] [--depths 12 24 48 96]

Nothing is trained: a step runs on tensors without data, in bf16 autocast.
"""

import torch

from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender
from hf_pareprop.tools.records import GB, software

from .options import Parser, positive, write_figure, write_json
from .sizes import SIZES, sample, subject

LINES = {
    STOCK: ("plain training", "black"),
    CHECKPOINTING: ("activation checkpointing", "#e69f00"),
    Contender("reprop", 1.0): ("reversible (reprop, beta 1)", "#d55e00"),
}


def main() -> None:
    from matplotlib.figure import Figure

    parser = Parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="vit-l", help="default: vit-l")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--length", type=positive, default=512, help="tokens of a text; default: %(default)s")
    parser.add_argument("--depths", nargs="+", type=positive, default=[12, 24, 48, 96], help="default: 12 24 48 96")
    args = parser.parsed()
    batch = resized(sample(args.size, args.length), args.batch_size, "meta")
    found: dict[str, dict[int, int]] = {}
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for way, (name, colour) in LINES.items():
        bytes_ = {
            d: predict(subject(args.size, d), way, batch, torch.device("cpu"), True).activations for d in args.depths
        }
        print(name, {depth: f"{size / GB:.2f} GB" for depth, size in bytes_.items()}, flush=True)
        axes.plot(args.depths, [size / GB for size in bytes_.values()], color=colour, marker="o", label=name)
        found[name] = bytes_
    axes.set(xlabel="layers", ylabel="activations (GB)", xticks=args.depths, ylim=(0, None))
    axes.set_title(f"{args.size}, batch {args.batch_size}, bf16: activation memory of a training step", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    about = {"benchmark": "depth", "size": args.size, "batch_size": args.batch_size, **software()}
    write_json(args.out / "depth.json", {**about, "activation_bytes": found})
    write_figure(args.out / "depth.png", figure, dpi=130)


if __name__ == "__main__":
    main()
