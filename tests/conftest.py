import os
import sys
from pathlib import Path

import pytest
import torch

for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not torch.cuda.is_available():
    # Kernels are tested without a GPU; Triton looks at this when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    # One thread each: many workers share the cores, and a core has to be idle for the worker lane to overlap.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["roberta", "vit"])
def family(request):
    from families import FAMILIES

    return FAMILIES[request.param]


@pytest.fixture(params=["inline", "thread"])
def lane(request, monkeypatch):
    """Run `pareprop` on the CPU with and without a worker thread, whatever the machine's cores."""
    from hf_pareprop import lanes

    monkeypatch.setattr(lanes, "_cores", lambda: 2 if request.param == "thread" else 1)
    return request.param
