"""What the studies share: a command line, and cases with results in a JSON file, so that an interrupted study goes on."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.kept import Kept
from benchmarks.measure import Job, run_child
from benchmarks.options import Parser
from hf_pareprop.tools.records import cpu_model, software

RESULTS = Path(__file__).parent / "results"

ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""The environment of a case: it has one thread, so that cases do not disturb each other."""


def study(
    name: str,
    parser: Parser,
    arguments: Sequence[str] | None,
    jobs_of: Callable[[argparse.Namespace], Iterable[Job]],
    fields: Sequence[str],
    child: Callable[[Job], None],
) -> tuple[Path, list[Job]] | None:
    """Read the command line of a study, and run the cases whose results are not in its JSON file.

    The file is written after each case.

    Args:
        name: the name of the study's module and of its JSON file.
        parser: the parser with the options that other studies do not have.
        arguments: the command line.
        jobs_of: a function from the options to the cases. ``seeds`` is a range.
        fields: the fields that identify a case.
        child: runs one case in a process of its own, and prints the results.

    Returns:
        The directory of the results, and all results; ``None`` in the process of one case.
    """
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted up from 42")
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of cases that run at the same time, with one thread each"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parsed(arguments)
    if args.child:
        child(args.child)
        return None
    args.seeds = range(42, 42 + args.seeds)
    about = {"device": f"{cpu_model()}, one thread per case", **software()}
    kept, lock = Kept(args.out / f"{name}.json", "results", fields, about), Lock()
    jobs = list(jobs_of(args))

    def work(job: Job) -> None:
        events, error = run_child(f"studies.{name}", job, ALONE)
        if error or not events:
            raise SystemExit(f"{job} failed: {error or 'its process said nothing'}")
        result = {**job, **events[-1]}
        with lock:
            kept.add(result)
            done = sum(kept.find(each) is not None for each in jobs)
            print(f"{done} of {len(jobs)} cases: {json.dumps(result)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(work, [job for job in jobs if kept.find(job) is None]):
            pass
    return args.out, kept.parts
