"""Time and peak memory of one training step: stock, gradient checkpointing, and the reversible engines.

    python benchmarks/engines.py [--device cuda] [--depths 4 8 12 24]

Every case's memory is measured in a process of its own. Times are taken in one process per family and depth, in
rounds over all methods, so that what slows the machine down slows them all.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RETURN_FREED_MEMORY, be_killed_first, emit, peak_memory, run_child
from models import (
    CHECKPOINTING,
    ENGINES,
    METHODS,
    STOCK,
    build,
    contender,
    device_of,
    make_batch,
    training_step,
)
from options import parse
from report import MB, Result, Results, as_dicts, plot, table

from hf_pareprop.lanes import side_lane
from hf_pareprop.tools.records import cores, cpu_model, save, slug, software
from hf_pareprop.tools.timing import OUT_OF_MEMORY, Step, error_of, time_interleaved

FLAT = 0.03
"""Memory counts as flat in depth up to this share of a stock layer's activations per added layer."""

DESCRIPTION = (
    "Time and peak memory of one training step (forward and backward, gradients kept allocated) of the stock model, "
    "of gradient checkpointing, and of the reversible model with each of its backward engines."
)


# In a child


def child(job: dict[str, Any]) -> None:
    """Do one job of the parent's and report by events."""
    be_killed_first()
    args = argparse.Namespace(**job["arguments"])
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if job["kind"] == "machine":
        emit(**machine(args))
    elif job["kind"] == "memory":
        measure_memory(args, job["family"], job["depth"], job["method"])
    else:
        measure_times(args, job["family"], job["depth"], job["methods"])


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What it is measured on. In a child, so that the parent takes nothing of the device."""
    device, cpu = device_of(args), cpu_model()
    found = {"device": args.device, "device_name": cpu, "cpu": cpu, "cores": cores()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device_name": properties.name, "device_memory": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "compute_capability": [properties.major, properties.minor]}
    return found | {
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "lane_overlaps": side_lane(device).overlaps,
    }


def measure_memory(args: argparse.Namespace, family: str, depth: int, method: str) -> None:
    """Emit the peak memory of one step, or why there is none."""
    device = device_of(args)
    try:
        model = build(family, args, depth, method)
        batch = make_batch(args, model)
        # On the CPU a small step, because not all that a step frees leaves the resident set. On CUDA the step itself,
        # because its sizes select the kernels, and with them the workspaces that stay allocated.
        small = batch if device.type == "cuda" else {name: tensor[:1] for name, tensor in batch.items()}
        training_step(model, small, args.autocast)
        emit(method=method, **peak_memory(partial(training_step, model, batch, args.autocast), device))
    except Exception as error:
        emit(method=method, error=error_of(error))


def measure_times(args: argparse.Namespace, family: str, depth: int, methods: Sequence[str]) -> None:
    """Emit samples of the time of one step by each method.

    Two models, one plain and one reversible, serve all methods: they need less memory side by side than five.
    """
    device = device_of(args)
    models = {method in ENGINES: method for method in methods}
    built = {reversible: build(family, args, depth, method) for reversible, method in models.items()}
    batch = make_batch(args, next(iter(built.values())))

    def prepare(method: str) -> Step:
        model = built[method in ENGINES]
        contender(args, method).prepare(model)
        return partial(training_step, model, batch, args.autocast)

    warm_ups = 3 if device.type == "cuda" else 1
    time_interleaved({method: partial(prepare, method) for method in methods}, args.repeats, warm_ups, device, emit)


# In the parent


class Run:
    """The whole measurement: starts the children, shows progress, gathers their events."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.results = Results(
            Result(family, depth, method) for family in args.families for depth in args.depths for method in METHODS
        )
        self.jobs = len(args.families) * len(args.depths) * (len(METHODS) + 1)
        self.started = 0

    def start(self, kind: str, **job: Any) -> tuple[list[dict[str, Any]], str | None]:
        arguments = {name: value for name, value in vars(self.args).items() if name != "out"}
        environment = RETURN_FREED_MEMORY if kind == "memory" else {}
        return run_child(Path(__file__), {"kind": kind, "arguments": arguments, **job}, environment)

    def machine(self) -> dict[str, Any]:
        """What it is measured on.

        Raises:
            RuntimeError: the device does not work.
        """
        events, error = self.start("machine")
        if not events:
            raise RuntimeError(f"--device {self.args.device} does not work here: {error}")
        return events[0]

    def measure(self) -> None:
        for family in self.args.families:
            for depth in self.args.depths:
                cases = [r for r in self.results if (r.family, r.depth) == (family, depth)]
                for case in cases:
                    self.memory(case)
                self.times(cases)

    def memory(self, case: Result) -> None:
        self.announce(f"{case.family}, depth {case.depth}, {case.method}: memory")
        events, error = self.start("memory", family=case.family, depth=case.depth, method=case.method)
        event = events[-1] if events else {}
        case.peak_bytes, case.reserved_bytes = event.get("peak_bytes"), event.get("reserved_bytes")
        if case.peak_bytes is None:
            case.memory_error = event.get("error") or error or "its process said nothing"
            print(case.memory_error, flush=True)
        else:
            print(f"{case.peak_bytes / MB:.1f} MB", flush=True)

    def times(self, cases: Sequence[Result]) -> None:
        """Time the cases of one family and depth, but for those that failed before."""
        sound = [case for case in cases if not case.memory_error]
        family, depth = cases[0].family, cases[0].depth
        self.announce(f"{family}, depth {depth}: time, {self.args.repeats} rounds over {len(sound)} methods")
        if not sound:
            print("nothing left to time", flush=True)
            return
        events, error = self.start("time", family=family, depth=depth, methods=[case.method for case in sound])
        for case in sound:
            own = [event for event in events if event["method"] == case.method]
            case.ms = [event["ms"] for event in own if "ms" in event]
            case.time_error = next((event["error"] for event in own if "error" in event), error)
        shown = (f"{c.method} {c.time_error or f'{c.median_ms:.1f} ms'}" for c in sound)
        print(", ".join(shown), flush=True)

    def announce(self, what: str) -> None:
        self.started += 1
        print(f"[{self.started:{len(str(self.jobs))}}/{self.jobs}] {what} ... ", end="", flush=True)


def verdicts(results: Results) -> list[dict[str, Any]]:
    """For each family, whether activation memory is flat in depth where activations are rebuilt."""
    found = []
    for family in results.families():
        stock = results.bytes_per_layer(family, STOCK)
        slopes = {method: results.bytes_per_layer(family, method) for method in ("reprop", "pareprop")}
        shares = {method: slope / stock for method, slope in slopes.items() if stock and slope is not None}
        holds = max(shares.values()) <= FLAT if len(shares) == len(slopes) else None
        found.append({"family": family, "stock_bytes_per_layer": stock, "shares_of_stock": shares, "holds": holds})
    return found


def verdict_line(verdict: dict[str, Any]) -> str:
    if verdict["holds"] is None:
        return f"{verdict['family']}: unknown, as memory was not measured at two or more depths"
    shares = ", ".join(f"{method} {100 * share:.1f} %" for method, share in verdict["shares_of_stock"].items())
    stock = verdict["stock_bytes_per_layer"] / MB
    word = "holds" if verdict["holds"] else "falls short"
    return f"{verdict['family']}: {word}; {shares} of a stock layer's {stock:.2f} MB per added layer"


def heading(args: argparse.Namespace, machine: dict[str, Any]) -> str:
    """What was measured, and on what."""
    threads = f" ({machine['threads']} threads on {machine['cores']} cores)" if args.device == "cpu" else ""
    lane = "overlaps" if machine["lane_overlaps"] else "does not overlap here and runs as reprop"
    compute = "bf16 autocast" if args.autocast == "bf16" else "fp32"
    return (
        f"One training step on {machine['device_name']}{threads}\n"
        f"width {args.width}, {args.heads} heads, batch {args.batch_size}, {args.length} tokens, "
        f"dropout {args.dropout:g}, {compute}, beta {args.beta:g}; pareprop {lane}"
    )


def finish(run: Run, environment: dict[str, Any], title: str, name: str) -> None:
    """Print the table and the verdicts, write the JSON and the plot."""
    args, found = run.args, verdicts(run.results)
    print(f"\n{title}\n\n{table(run.results, (STOCK, CHECKPOINTING, 'reprop'))}\n")
    print(f"Memory flat in depth (at most {100 * FLAT:g} % of a stock layer's activations per added layer):")
    print("\n".join(map(verdict_line, found)))
    data = {
        "benchmark": "engines",
        "environment": environment,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "flat_in_depth": found,
        "results": as_dicts(run.results),
    }
    figure = plot(run.results, title)
    save(args.out / f"{name}.json", lambda path: path.write_text(json.dumps(data, indent=1) + "\n"))
    save(args.out / f"{name}.png", lambda path: figure.savefig(path, format="png", dpi=150))
    print(f"\nwritten: {name}.json and {name}.png in {args.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments, DESCRIPTION)
    run = Run(args)
    try:
        environment = run.machine() | software()
    except RuntimeError as error:
        print(f"engines.py: error: {error}", file=sys.stderr)
        return 1
    title = heading(args, environment)
    name = args.name or "engines-" + slug(environment["device_name"])
    print(title, flush=True)
    try:
        run.measure()
    except KeyboardInterrupt:
        # Under another name, so as not to replace the results of a complete run.
        print("\ninterrupted; measured so far:")
        finish(run, environment, title, f"{name}-interrupted")
        return 130
    finish(run, environment, title, name)
    return int(any(error != OUT_OF_MEMORY for result in run.results for error in result.errors))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
