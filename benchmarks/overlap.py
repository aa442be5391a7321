"""Measure how much of the rebuilding PaReprop hides behind the gradient computation, and draw the two lanes.

    python -m benchmarks.overlap [--device cuda] [--size vit-b] [--depth 12] [--batch-size 4] [--autocast bf16]

It traces one backward pass with each engine that rebuilds. Without tracing, it times steps of these engines, of plain
training and of gradient checkpointing.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_pareprop.lanes import cores, side_lane
from hf_pareprop.plan import CONVERTED_BETA
from hf_pareprop.tools.compare import Comparison, Row
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender, reversible_contenders
from hf_pareprop.tools.records import aligned, device_name, number, ratio, slug, software

from .options import Parser, file_name, positive, write_figure, write_json
from .sizes import SIZES, sample, subject
from .tracing import GRADIENTS, REBUILD, Span, busy, hidden_share, host_synchronisations, length, spans_of, traced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {REBUILD: "#d55e00", GRADIENTS: "#0072b2"}
STEPS_SHOWN = 8


def trace_of(comparison: Comparison, contender: Contender, size: int, device: torch.device) -> dict[str, Any]:
    """The results from the trace of one step with an engine that rebuilds."""
    step = comparison.step(contender, size)
    step()
    events = traced(step, device)
    spans = spans_of(events)
    return {
        "rebuild_ms": length(busy(spans, REBUILD)) / 1e3,
        "gradients_ms": length(busy(spans, GRADIENTS)) / 1e3,
        "hidden_share": hidden_share(spans),
        "host_synchronisations": host_synchronisations(events),
        "spans": [[span.kind, span.lane, span.step, span.start, span.end] for span in spans],
    }


def table(rows: Sequence[Row], traces: dict[str, dict[str, Any]]) -> str:
    """A table with a line per contender. Columns about rebuilding are filled only for engines that rebuild."""
    lines = [["contender", "samples/s", "to plain", "to reprop", "rebuilding ms", "gradients ms", "hidden"]]
    plain, reprop = (
        next(row.samples_per_second for row in rows if row.contender.engine == engine) for engine in (None, "reprop")
    )
    for row in rows:
        found = traces.get(row.contender.name)
        seen = [f"{found['rebuild_ms']:.1f}", f"{found['gradients_ms']:.1f}"] if found else ["-", "-"]
        relative = (ratio(row.samples_per_second, rate) for rate in (plain, reprop))
        lines.append(
            [
                row.contender.name,
                row.error or f"{row.samples_per_second:.2f}",
                *(number(value, ".2f") for value in relative),
                *seen,
                f"{100 * found['hidden_share']:.0f} %" if found else "-",
            ]
        )
    return "\n".join(aligned(lines, left={0}))


def timeline(traces: dict[str, dict[str, Any]], title: str) -> "Figure":
    """Draw the lanes of each engine over the same period: the first steps of the backward pass."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 1.2 + 1.6 * len(traces)), layout="constrained")
    spans = {name: [Span(*span) for span in found["spans"]] for name, found in traces.items()}
    shown = {name: [span for span in own if span.step < STEPS_SHOWN] for name, own in spans.items()}
    longest = max(max(span.end for span in own) - own[0].start for own in shown.values())
    rows = figure.subplots(len(traces), 1, squeeze=False)
    for (name, own), axes in zip(shown.items(), rows.flat, strict=True):
        lanes = list(dict.fromkeys(span.lane for span in own))
        for span in own:
            begin, duration = (span.start - own[0].start) / 1e3, (span.end - span.start) / 1e3
            row, colour = lanes.index(span.lane), COLOURS[span.kind]
            axes.barh(row, duration, left=begin, height=0.8, color=colour, edgecolor="white", linewidth=0.3)
            if span.lane.startswith("thread"):  # not on kernels: they are too many and too short
                axes.text(
                    begin + duration / 2, row, f"-{span.step + 1}", ha="center", va="center", fontsize=7, color="w"
                )
        axes.set(yticks=range(len(lanes)), yticklabels=[f"lane {i + 1}" for i in range(len(lanes))])
        axes.set(xlim=(0, longest / 1e3), ylim=(len(lanes) - 0.5, -0.5))
        axes.set_title(f"{name}: {100 * traces[name]['hidden_share']:.0f} % of the rebuilding hidden", fontsize=9)
    rows.flat[-1].set_xlabel(
        f"ms since the backward pass began; the last {STEPS_SHOWN} steps of the model, -1 the last"
    )
    handles = [Patch(color=COLOURS[REBUILD], label="rebuild"), Patch(color=COLOURS[GRADIENTS], label="gradients")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, device=True)
    parser.add_argument("--size", choices=list(SIZES), default="vit-s", help="default: vit-s")
    parser.add_argument("--depth", type=positive, default=12, help="number of layers; default: 12")
    parser.add_argument("--batch-size", type=positive, default=1, help="default: 1")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a text; default: 128")
    beta = f"coupling, 1 or 2^-m; default: {CONVERTED_BETA:g}, that of converted models"
    parser.add_argument("--beta", type=float, default=CONVERTED_BETA, help=beta)
    parser.add_argument("--autocast", choices=("none", "bf16"), default="none", help="default: none")
    parser.add_argument("--rounds", type=positive, default=10, help="timed steps of each engine; default: 10")
    parser.add_argument(
        "--threads",
        type=positive,
        help="PyTorch's threads on a CPU; default: half the cores, so that rebuilding overlaps",
    )
    parser.add_argument("--name", type=file_name, help="name of the results; default: overlap- and the device's name")
    return parser.parsed(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads or max(1, cores() // 2))
    torch.manual_seed(0)
    batch = sample(args.size, args.length)
    comparison = Comparison(subject(args.size, args.depth), batch, device, args.autocast == "bf16")
    rebuilding = reversible_contenders([args.beta], ("reprop", "pareprop"))
    sizes = dict.fromkeys((STOCK, CHECKPOINTING, *rebuilding), args.batch_size)
    rows = comparison.measure(sizes, args.rounds, partial(print, file=sys.stderr), warm_ups=3)
    traces = {way.name: trace_of(comparison, way, args.batch_size, device) for way in rebuilding}
    title = (
        f"{args.size}, {args.depth} layers, batch {args.batch_size}, "
        f"{'bf16 autocast' if args.autocast == 'bf16' else 'fp32'}, on {device_name(device)}"
    )
    print(f"{title}\n\n{table(rows, traces)}")
    if not side_lane(device).overlaps:
        print("pareprop runs like reprop here: a CPU's worker lane takes twice as many cores as PyTorch has threads.")
    name = args.name or "overlap-" + slug(device_name(device))
    data = {"benchmark": "overlap", "title": title, "arguments": {k: str(v) for k, v in vars(args).items()}}
    data |= {"device_name": device_name(device), "cores": cores(), **software()}
    data |= {"rows": [row.as_dict() for row in rows], "traces": traces}
    write_json(args.out / f"{name}.json", data, indent=None)
    write_figure(args.out / f"{name}.png", timeline(traces, title), dpi=120)
    print(f"written: {name}.json and {name}.png in {args.out}")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
