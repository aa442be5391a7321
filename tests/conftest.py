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
sys.path[:0] = map(str, [ROOT, ROOT / "examples", TESTS, *FOLDERS])  # where tests find what they share

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not torch.cuda.is_available():
    # Kernels are tested without a GPU; Triton looks at this when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from families import FAMILIES  # noqa: E402, as it imports what reads these variables


def pytest_configure(config):
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        config.option.markexpr = "not slow"
    # One thread each: many workers share the cores, and a core has to be idle for the worker lane to overlap.
    torch.set_num_threads(1)


LARGE, SHARE = 12, 6
"""Of a test with more cases than this in one family, the families with stages take one case in so many, drawn at random
but always the same: their models take several times as long, and every value of every parameter stays in."""

QUICK = 4
"""Of a test with so many cases, or of one family, one case in so many is not slow."""


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


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(config, items):
    cases = {}
    for item in items:
        given = getattr(item, "callspec", None)
        names = [given.params.get(key) for key in ("family", "name", "family_name")] if given else []
        for name in names:
            if isinstance(name, str) and name in FAMILIES and FAMILIES[name].row.staged:
                cases.setdefault((item.function, name), []).append(item)
    spared = set()
    for group in cases.values():
        if len(group) > LARGE:
            spared.update(group)
            spared.difference_update(Random(0).sample(group, len(group) // SHARE))
    if spared:
        config.hook.pytest_deselected(items=[item for item in items if item in spared])
        items[:] = [item for item in items if item not in spared]
    mark_slow(items)
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Every family that has a row."""
    return FAMILIES[request.param]


@pytest.fixture(params=["inline", "thread"])
def lane(request):
    """Run `pareprop` on the CPU with and without a worker thread, whatever the machine's cores."""
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
    """A function that gives the process so many cores, as far as it can see."""

    def give(count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)), raising=False)

    return give


@pytest.fixture
def rebuilt():
    """The steps that were rebuilt since this list was last cleared: the layer's position, the step's within it."""
    from hf_pareprop.observer import Observer, observing

    found = []

    class Noting(Observer):
        def step_rebuilt(self, position, step, rebuilt):
            found.append((position, step))

    with observing(Noting()):
        yield found


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line: its arguments in, what it says out."""
    from hf_pareprop.tools import cli

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["hf-pareprop", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        if isinstance(code, str):  # what the interpreter prints and turns into 1
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
