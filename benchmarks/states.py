"""Where the bits go that beta = 2^-m appends to a state: kept in packed side bits, or in wider states.

    python benchmarks/states.py [--device cuda]

Times one state update and its inverse, as every step of a reversible layer does them, and says what each keeps.
``packed`` is what the package does: fp32 states on a grid, and the bits shifted below it packed into bytes, one buffer
per step. ``fp64`` lets states grow by m bits with every update, and stores a pair of them (an anchor) where 53 bits end.
``fused`` is what the package does on CUDA: ``packed``, but an update and its inverse are one kernel each.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_pareprop.coupling import (
    advance_in_passes,
    advance_undoably,
    retreat,
    retreat_in_passes,
    round_to_grid,
    runs_fused,
)
from hf_pareprop.plan import LayerPlan, plan_layers
from hf_pareprop.tools.records import cpu_model, number, ratio, save, software
from hf_pareprop.tools.timing import milliseconds

GRID_BITS = 12
SIZES = {"8 x 128 x 384": (8, 128, 384), "32 x 512 x 768": (32, 512, 768)}
"""Batch, length and width."""


def fp64(value: Tensor, previous: Tensor, beta: float) -> Tensor:
    """Forward and back: the next state, what a step reads of it, and the previous state again."""
    following = torch.add(round_to_grid(value, GRID_BITS), previous, alpha=beta)
    following.float()
    return torch.sub(following, round_to_grid(value, GRID_BITS)).div_(beta)


def packed(value: Tensor, previous: Tensor, plan: LayerPlan) -> Tensor:
    """The same as the package does it on a CPU."""
    following, sides = advance_in_passes(value, previous, plan)
    return retreat_in_passes(value, following, plan, sides)


def fused(value: Tensor, previous: Tensor, plan: LayerPlan) -> Tensor:
    """The same as the package does it on CUDA."""
    following, sides = advance_undoably(value, previous, plan)
    return retreat(value, following, plan, sides)


def measure(size: tuple[int, int, int], m: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median times, in rounds over all; the states that come back are checked to be the ones that went in."""
    torch.manual_seed(0)
    value = torch.randn(size, device=device)
    state = torch.randint(-(2**20), 2**20, size, device=device) * 2.0**-GRID_BITS
    plan = plan_layers(2.0**-m, 1, GRID_BITS)[0]
    works: dict[str, Callable[[], Tensor]] = {
        "fp64": partial(fp64, value, state.double(), 2.0**-m),
        "packed": partial(packed, value, state, plan),
    }
    if runs_fused(value, state, plan):
        works["fused"] = partial(fused, value, state, plan)
    assert all(torch.equal(work(), state.to(work().dtype)) for work in works.values())
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            samples[name].append(milliseconds(work, device))
    return {name: statistics.median(times) for name, times in samples.items()}


def bytes_kept(steps: int, m: int) -> dict[str, float]:
    """Per element of a state, above two fp32 states: wider states and anchors, or a buffer of bits per step."""
    layers, room = steps // 2, (53 - GRID_BITS - 12) // m
    return {"fp64": 8.0 + 16 * max(0, -(-layers // room) - 1), "packed": steps * m / 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here.")
    device = torch.device(args.device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_model()}, {torch.get_num_threads()} threads"
    )
    results = []
    print(
        f"{name}\n| states | m | fp64, ms | packed, ms | packed / fp64 | fused, ms | fused / packed |\n|---|---|---|---|---|---|---|"
    )
    for label, size in SIZES.items():
        for m in (1, 2, 3, 4):
            found = measure(size, m, device, args.repeats)
            results.append({"size": label, "m": m, **found})
            fused_ms = found.get("fused")
            times = [found["fp64"], found["packed"], found["packed"] / found["fp64"], fused_ms]
            cells = [number(value, ".2f") for value in (*times, ratio(fused_ms, found["packed"]))]
            print(f"| {label} | {m} | {' | '.join(cells)} |")
    print("\nbytes per element above two fp32 states:\n| layers | m | fp64 and anchors | packed |\n|---|---|---|---|")
    kept = [{"layers": n, "m": m, **bytes_kept(2 * n, m)} for n in (6, 12, 24, 48) for m in (1, 2, 3, 4)]
    for row in kept:
        print(f"| {row['layers']} | {row['m']} | {row['fp64']:.0f} | {row['packed']:.1f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"device": name, **software(), "times": results, "bytes": kept}, indent=1) + "\n"
    save(args.out / f"states-{args.device}.json", lambda file: file.write_text(whole))
    save(args.out / f"states-{args.device}.png", lambda file: plot(results, name).savefig(file, dpi=110, format="png"))


def plot(results: list[dict], title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.5), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r['size']}\nm={r['m']}" for r in results]
    methods = [method for method in ("fp64", "packed", "fused") if method in results[0]]
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        axes.bar([x + width * i for x in range(len(results))], [r[method] for r in results], width, label=method)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(results))], labels, fontsize=7)
    axes.set(ylabel="ms, update and inverse", yscale="log", title=title)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
