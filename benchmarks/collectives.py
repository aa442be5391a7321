"""Measure what two processes send each other in a training step, and what a process holds between forward and backward.

    python -m benchmarks.collectives [--size vit-s] [--batch-size 4] [--depths 2 4]

Two processes on a CPU train with DDP and with FSDP2 (`fully_shard` on every layer, then on the model): plainly, with
activation checkpointing, and reversibly. A profiler's trace of the third step has every collective with its tensors, and
every allocation. What a layer adds is the difference between two depths, divided by the number of layers between them.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from hf_pareprop.tools.compare import resized
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender
from hf_pareprop.tools.records import markdown, software

from .options import Parser, positive, write_json
from .sizes import SIZES, sample, subject
from .tracing import Event, traced

PROCESSES = 2
WAYS = {
    "plain": STOCK,
    "checkpointing": CHECKPOINTING,
    "reprop, beta 1": Contender("reprop", 1.0),
    "pareprop, beta 1": Contender("pareprop", 1.0),
    "pareprop, beta 1/32": Contender("pareprop", 1 / 32),
}
WRAPPINGS = ("DDP", "FSDP2")
COLLECTIVES = {
    "all_gather": "c10d::_allgather_base_",
    "reduce_scatter": "c10d::_reduce_scatter_base_",
    "all_reduce": "c10d::allreduce_",
}
"""The profiler's name for each collective."""

ELEMENT_BYTES = torch.float32.itemsize
FORWARD = "forward pass"

Row = dict[str, Any]


def counted(events: Sequence[Event]) -> Row:
    """How often each collective ran in a trace, the bytes of the whole tensors, and the bytes held after the forward pass.

    Raises:
        ValueError: a collective has another name than expected, or its tensors are not fp32.
    """
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    names = {event: name for name, event in COLLECTIVES.items()}
    for event in events:
        if event.get("cat") == "cpu_op" and event["name"].startswith("c10d::"):
            if event["name"] not in names or not {*map(str, event["args"]["Input type"])} & {"float", "TensorList"}:
                raise ValueError(f"unknown collective {event['name']} of {event['args'].get('Input type')}.")
            calls[names[event["name"]]] += 1
            sizes[names[event["name"]]] += ELEMENT_BYTES * _elements(event["args"]["Input Dims"])
    (forward,) = (e for e in events if e.get("cat") == "user_annotation" and e["name"] == FORWARD)
    end = forward["ts"] + forward["dur"]
    held = sum(e["args"]["Bytes"] for e in events if e["name"] == "[memory]" and e["ts"] <= end)
    return {"calls": dict(calls), "bytes": dict(sizes), "held": held}


def _elements(shapes: Sequence[Any]) -> int:
    """The number of elements of the largest tensor of a collective, which is the whole one. A list has one tensor."""
    flat = [shape[0] if shape and isinstance(shape[0], list) else shape for shape in shapes]
    return max(int(torch.Size(shape).numel()) for shape in flat if shape)


def measure(wrapping: str, way: Contender, size: str, depth: int, batch_size: int) -> Row:
    """Measure one model in this process; see :func:`counted`."""
    torch.manual_seed(0)
    model: Any = subject(size, depth).build(way)
    if wrapping == "DDP":
        wrapped: nn.Module = DistributedDataParallel(model, broadcast_buffers=False)  # position ids do not change
    else:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules and type(module).__name__.endswith("Layer"):
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    batch = resized(sample(size, 128), batch_size)

    def step() -> None:
        with record_function(FORWARD):
            loss = wrapped(**batch).loss
        loss.backward()

    for _ in range(2):  # in the first step DDP builds its buckets, and FSDP2 learns the order of layers
        step()
        model.zero_grad()
    return counted(traced(step, torch.device("cpu"), tensors=True))


def work(rank: int, store: str, args: argparse.Namespace, out: Path) -> None:
    """Run all cases in one of the processes. The first process writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    rows = []
    for wrapping in WRAPPINGS:
        for name, way in WAYS.items():
            found = [measure(wrapping, way, args.size, depth, args.batch_size) for depth in args.depths]
            rows.append({"wrapping": wrapping, "way": name, "depths": found, **per_layer(*found, args.depths)})
    if rank == 0:
        about = {"benchmark": "collectives", "size": args.size, "batch_size": args.batch_size, "depths": args.depths}
        write_json(out, {**about, **software(), "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def per_layer(less: Row, more: Row, depths: Sequence[int]) -> Row:
    """What one layer adds: collectives, bytes of the whole tensors in them, and bytes held."""
    layers = depths[1] - depths[0]

    def added(key: str) -> dict[str, float]:
        return {name: (more[key].get(name, 0) - less[key].get(name, 0)) / layers for name in COLLECTIVES}

    return {
        "layer": {"calls": added("calls"), "bytes": added("bytes"), "held": (more["held"] - less["held"]) / layers}
    }


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown: what one layer adds in every way to train."""
    head = ["wrapping", "way", *(f"{name}, MB in calls" for name in COLLECTIVES), "held, MB"]
    lines = [head]
    for row in rows:
        layer = row["layer"]
        sent = [
            f"{layer['bytes'][name] / 2**20:.2f} in {layer['calls'][name]:g}" if layer["bytes"][name] else "none"
            for name in COLLECTIVES
        ]
        lines.append([row["wrapping"], row["way"], *sent, f"{layer['held'] / 2**20:.2f}"])
    return "\n".join(markdown(lines))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="vit-s", help="default: vit-s")
    parser.add_argument("--batch-size", type=positive, default=4, help="batch size of each process; default: 4")
    parser.add_argument("--depths", nargs=2, type=positive, default=[2, 4], help="two numbers of layers; default: 2 4")
    args = parser.parsed()
    if args.depths[0] >= args.depths[1]:
        parser.error(f"--depths {args.depths[0]} {args.depths[1]}: the second has to be the larger one.")
    out = args.out / f"collectives-{args.size}.json"
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (os.path.join(folder, "store"), args, out), nprocs=PROCESSES)
    print(table(json.loads(out.read_text())["rows"]))


if __name__ == "__main__":
    main()
