"""Measure what a training step takes the host: the time, and for each layer the kernels, views and calls of functions.

    python -m benchmarks.host [--rounds 60] [--check]

On a GPU the host launches kernels, and if it cannot launch them fast enough the GPU waits. Here tensors are so small that
computing takes next to no time, on one thread of a CPU, in bf16 autocast. The counts are the same in every run. They are of a
CPU: on CUDA an update of a state is one kernel. ``--check`` measures nothing, and fails if a count is above that in the results.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender, Subject, forward_backward
from hf_pareprop.tools.families import FAMILIES
from hf_pareprop.tools.inputs import random_batch
from hf_pareprop.tools.records import markdown, software
from hf_pareprop.tools.timing import Step, time_interleaved
from hf_pareprop.torch_private import DispatchMode

from .options import RESULTS, Parser, positive, write_json

WAYS = (STOCK, CHECKPOINTING, *(Contender("reprop", beta) for beta in (1.0, 1 / 32)))
NAMES = ("vit", "roberta")
FILE = RESULTS / "host.json"
CPU = torch.device("cpu")
FEW, MANY = 2, 6
"""The depths between which counts per layer are taken."""

NOT_A_KERNEL = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

Counts = dict[str, float]


class _Operators(DispatchMode):
    """Counts the operators that run, as kernels or as views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in NOT_A_KERNEL:
            returned = [result.alias_info for result in func._schema.returns]
            if returned and all(alias is not None and not alias.is_write for alias in returned):
                self.views += 1
            else:
                self.kernels += 1
        return func(*args, **(kwargs or {}))


def step_of(name: str, way: Contender, depth: int, dropout: float) -> Step:
    """A training step of a small model, without the optimizer."""
    row = FAMILIES[name]
    config = row.config_class(**row.small_config_fields(depth, dropout))
    torch.manual_seed(0)
    model = Subject(row.classifier, config).build(way)
    batch = random_batch(model, batch_size=1, length=8)

    def step() -> None:
        model.zero_grad()
        forward_backward(model, batch, way, CPU, True)

    return step


def counts_of(name: str, way: Contender, dropout: float = 0.0) -> Counts:
    """Kernels, views and calls of Python functions per layer, in the forward and the backward pass."""
    few, many = (_counts(step_of(name, way, depth, dropout)) for depth in (FEW, MANY))
    return {what: (many[what] - few[what]) / (MANY - FEW) for what in few}


def _counts(step: Step) -> Counts:
    for _ in range(3):  # what is worked out once is left out
        step()
    with _Operators() as operators:
        step()
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"kernels": operators.kernels, "views": operators.views, "calls": calls}


def times_of(name: str, dropout: float, rounds: int) -> dict[str, list[float]]:
    """The milliseconds of steps of 12 layers by every way, taken in turn."""
    found: dict[str, list[float]] = {way.name: [] for way in WAYS}
    steps: Mapping[Contender, Callable[[], Step]] = {
        way: partial(lambda step: step, step_of(name, way, 12, dropout)) for way in WAYS
    }

    def report(method: Contender, ms: float | None = None, error: str = "") -> None:
        if ms is None:
            raise RuntimeError(f"{method.name}: {error}")
        found[method.name].append(ms)

    time_interleaved(steps, rounds, 5, CPU, report)
    return found


def lines_of(file: Path) -> Iterator[str]:
    """The table of the results: a line for each model and way."""
    rows = json.loads(file.read_text())["rows"]
    head = ["", "", "kernels", "views", "calls", "time, without dropout", "with dropout"]
    base = {row["family"]: row["ms"] for row in rows if row["way"] == CHECKPOINTING.name}
    lines = [head]
    for row in rows:
        relative = [
            f"{statistics.median(row['ms'][d]) / statistics.median(base[row['family']][d]):.2f}" for d in row["ms"]
        ]
        lines.append([row["family"], row["way"], *(f"{row['counts'][what]:g}" for what in row["counts"]), *relative])
    yield from markdown(lines)


def check(file: Path = FILE) -> list[str]:
    """The counts that are above those in the results, in words."""
    found = []
    for row in json.loads(file.read_text())["rows"]:
        way = next(way for way in WAYS if way.name == row["way"])
        if way.engine is not None:
            now = counts_of(row["family"], way)
            found += [
                f"{row['family']}, {way.name}: {now[what]:g} {what} a layer, where the results have {row['counts'][what]:g}"
                for what in ("kernels", "views")
                if now[what] > row["counts"][what]
            ]
    return found


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=60, help="samples of each way; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only compare the counts")
    args = parser.parsed()
    torch.set_num_threads(1)
    if args.check:
        print("\n".join(worse := check()) or "no count is above that in the results")
        return bool(worse)
    rows = []
    for name in NAMES:
        times = {dropout: times_of(name, dropout, args.rounds) for dropout in (0.0, 0.1)}
        for way in WAYS:
            ms = {f"{dropout:g}": found[way.name] for dropout, found in times.items()}
            rows.append({"family": name, "way": way.name, "counts": counts_of(name, way), "ms": ms})
    write_json(args.out / FILE.name, {"benchmark": "host", "threads": 1, **software(), "rows": rows})
    print("\n".join(lines_of(args.out / FILE.name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
