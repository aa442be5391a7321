import os
import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
FOLDERS = [path for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith("__")]
sys.path[:0] = map(str, [ROOT, ROOT / "examples", TESTS, *FOLDERS])  # shared by the tests

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not torch.cuda.is_available():
    # Kernels are tested without a GPU; Triton looks at this when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from families import FAMILIES  # noqa: E402, as it imports what reads these variables


def pytest_addoption(parser):
    parser.addoption(
        "--every-case", action="store_true", help="also the cases of large tests that are left out otherwise"
    )


def pytest_configure(config):
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        config.option.markexpr = "not slow"
    # One thread each: many workers share the cores, and a core has to be idle for the worker lane to overlap.
    torch.set_num_threads(1)


LARGE, LARGE_WITHOUT_FAMILY, SHARE, STAGED_SHARE = 12, 100, 5, 8
"""If a test has more cases than this in a family, or altogether if it has no family, only one case in this many runs. The
choice is random but always the same. Families with stages have a stricter choice, because their models take several times as
long. `--every-case` runs all cases."""

QUICK = 4
"""If a test has at least twice this many cases in a family, one in this many runs by default. The others are marked slow."""


def mark_slow(items):
    groups = {}
    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and "slow" not in item.keywords:
            family = next(
                (given.params[key] for key in ("family", "name", "family_name") if key in given.params), None
            )
            groups.setdefault((item.function, str(family)), []).append(item)
    for group in groups.values():
        if len(group) >= 2 * QUICK:
            quick = set(Random(0).sample(group, len(group) // QUICK))
            for item in group:
                if item not in quick:
                    item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(config, items):
    cases = {}
    for item in items:
        given = getattr(item, "callspec", None)
        if given is None or config.option.every_case:
            continue
        named = (given.params.get(key) for key in ("family", "name", "family_name"))
        family = next((name for name in named if isinstance(name, str) and name in FAMILIES), None)
        cases.setdefault((item.function, family), []).append(item)
    spared = set()
    for (_, family), group in cases.items():
        if len(group) > (LARGE if family else LARGE_WITHOUT_FAMILY):
            share = STAGED_SHARE if family and FAMILIES[family].row.staged else SHARE
            spared.update(group)
            spared.difference_update(Random(0).sample(group, len(group) // share))
    if not config.option.every_case:
        spared.update(item for item in items if "every_case" in item.keywords)
    if spared:
        config.hook.pytest_deselected(items=[item for item in items if item in spared])
        items[:] = [item for item in items if item not in spared]
    mark_slow(items)
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family that has a row."""
    return FAMILIES[request.param]


@pytest.fixture(params=["inline", "thread"])
def lane(request):
    """Run `pareprop` on the CPU with and without a worker thread, independent of the machine's cores."""
    from hf_pareprop.lanes import replaced, side_lane

    def lane_of(device):
        if device.type == "cpu":
            return cpu_lane(request.param)
        with replaced(None):
            return side_lane(device)

    with replaced(lane_of):
        yield request.param


@cache
def cpu_lane(name):
    from hf_pareprop.lanes import InlineLane, ThreadLane

    return InlineLane() if name == "inline" else ThreadLane()


@pytest.fixture
def cores(monkeypatch):
    """A function that makes the process see a given number of cores."""

    def give(count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)), raising=False)

    return give


@pytest.fixture
def rebuilt():
    """The steps that were rebuilt since this list was last cleared, each as the layer's position and the step in it."""
    from hf_pareprop.observer import Observer, observing

    found = []

    class Noting(Observer):
        def step_rebuilt(self, position, step, rebuilt):
            found.append((position, step))

    with observing(Noting()):
        yield found


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line with arguments. Returns what it prints."""
    from hf_pareprop.tools import cli

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["hf-pareprop", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        if isinstance(code, str):  # the interpreter prints it and exits with 1
            code, message = 1, code
        else:
            message = ""
        out, err = capsys.readouterr()
        assert code == status, (code, message, out, err)
        return out + message + err

    return run


@pytest.fixture
def texts(tmp_path):
    """Three texts."""
    path = tmp_path / "texts.txt"
    path.write_text("w1 w2 w3\n\nw4 w5 w6 w7 w8 w9\nw10 nothing\n")
    return path


@pytest.fixture
def src(tmp_path):
    """A stock checkpoint with a tokenizer."""
    from checkpoints import save_tokenizer
    from test_architectures import stock

    folder = tmp_path / "stock"
    stock("RobertaForSequenceClassification").save_pretrained(folder)
    save_tokenizer(folder)
    return folder
