"""Whether rebuilding overlaps with the gradient computation, according to traces."""

import time

import pytest
import torch
from families import FAMILIES, linears, never_waiting

from benchmarks.tracing import (
    GRADIENTS,
    REBUILD,
    Span,
    busy,
    hidden_share,
    host_synchronisations,
    length,
    spans_of,
    traced,
)


def span(kind, start, end):
    return Span(kind, "thread 1", 0, start, end)


def a_range(kind, ts, dur, tid=1):
    return {"cat": "user_annotation", "name": kind, "ts": ts, "dur": dur, "tid": tid}


def a_kernel(correlation, launched, ts, dur, stream, tid=1, call="cudaLaunchKernel"):
    launch = {"cat": "cuda_runtime", "name": call, "ts": launched, "dur": 1, "tid": tid}
    kernel = {"cat": "kernel", "name": "gemm", "ts": ts, "dur": dur, "tid": 99}
    return [
        {**launch, "args": {"correlation": correlation}},
        {**kernel, "args": {"correlation": correlation, "stream": stream}},
    ]


@pytest.mark.parametrize(
    "rebuilds, gradients, expected",
    [
        ([(0, 10)], [(10, 20)], 0.0),
        ([(0, 10)], [(4, 20)], 0.6),
        ([(0, 10), (20, 30)], [(0, 30)], 1.0),
        ([(0, 10), (5, 20)], [(15, 16), (15, 18)], 0.15),  # overlapping spans of one kind count once
    ],
)
def test_hidden_share(rebuilds, gradients, expected):
    spans = [span(REBUILD, *r) for r in rebuilds] + [span(GRADIENTS, *g) for g in gradients]
    assert hidden_share(spans) == pytest.approx(expected)


def test_nothing_rebuilt_is_an_error():
    with pytest.raises(ValueError, match="no rebuilding"):
        hidden_share([span(GRADIENTS, 0, 1)])


def test_kernels_belong_to_the_range_that_launched_them():
    """Even if they run later and on any stream. Other kernels, and launches of other threads, do not count."""
    events = [
        a_range(REBUILD, 0, 10),
        a_range(GRADIENTS, 12, 10),
        a_range(REBUILD, 24, 10),
        *a_kernel(1, 5, 100, 50, stream=7),
        *a_kernel(2, 15, 120, 100, stream=20),
        *a_kernel(3, 30, 160, 50, stream=7),
        *a_kernel(4, 11, 90, 1000, stream=7),  # between the ranges: not ours
        *a_kernel(5, 5, 90, 1000, stream=7, tid=2),  # of another thread
    ]
    spans = spans_of(events)
    assert [(s.kind, s.lane, s.step, s.start, s.end) for s in spans] == [
        (REBUILD, "stream 7", 0, 100, 150),
        (GRADIENTS, "stream 20", 0, 120, 220),
        (REBUILD, "stream 7", 1, 160, 210),
    ]
    assert hidden_share(spans) == pytest.approx(80 / 100)
    assert length(busy(spans, REBUILD)) == 100


def test_calls_that_make_the_host_wait_are_found():
    events = [
        a_range(REBUILD, 0, 10),
        a_range(GRADIENTS, 12, 10),
        *a_kernel(1, 5, 100, 50, stream=7),
        *a_kernel(2, 6, 100, 50, stream=7, call="cudaMemcpyAsync"),
        *a_kernel(3, 13, 100, 50, stream=7, call="cudaEventRecord"),
    ]
    assert host_synchronisations(events) == []
    waits = [
        (4, "cudaStreamSynchronize"),
        (8, "cudaMemcpy"),
        (14, "cudaDeviceSynchronize"),
        (99, "cudaDeviceSynchronize"),
    ]
    events += [{"cat": "cuda_runtime", "name": name, "ts": ts, "dur": 1, "tid": 1, "args": {}} for ts, name in waits]
    assert host_synchronisations(events) == ["cudaStreamSynchronize", "cudaMemcpy", "cudaDeviceSynchronize"]


def model_and_batch(family, engine, device):
    """They are so large that starting a thread takes little time compared with a step."""
    model = FAMILIES[family].build(depth=2, backward_engine=engine, beta=0.5, wider=4, mlp_ratio=4)
    batch = {name: tensor.to(device) for name, tensor in FAMILIES[family].large_batch().items()}
    return model.to(device), batch


def dawdle(device):
    """Sleep much longer than starting a thread takes on busy cores, or launching a step's kernels."""
    if device.type == "cuda":
        torch.cuda._sleep(10_000_000)  # cycles of the device, which does nothing meanwhile
    else:
        time.sleep(0.03)


class Slow(torch.autograd.Function):
    """Takes time in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        dawdle(x.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        dawdle(grad.device)
        return grad


def slow_down(model):
    """Make both steps of every layer slow."""
    for layer in model.encoder_layers:
        for dense in linears(layer)[-3::2]:
            dense.forward = lambda x, original=dense.forward: Slow.apply(original(x))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_worker_thread_hides_rebuilding(family, lane):
    device, spans = torch.device("cpu"), {}
    for engine in ("reprop", "pareprop"):
        model, batch = model_and_batch(family, engine, device)
        slow_down(model)
        model(**batch).loss.backward()
        spans[engine] = spans_of(traced(lambda model=model, batch=batch: model(**batch).loss.backward(), device))
    for own in spans.values():
        for kind in (REBUILD, GRADIENTS):
            assert [s.step for s in own if s.kind == kind] == list(range(4))
    assert hidden_share(spans["reprop"]) == 0
    if lane == "thread":
        assert hidden_share(spans["pareprop"]) > 0
        assert len({s.lane for s in spans["pareprop"]}) == 2
    else:
        assert hidden_share(spans["pareprop"]) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_hide_rebuilding_without_host_synchronisation(family, bf16):
    device = torch.device("cuda", 0)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        model, batch = model_and_batch(family, "pareprop", device)
        slow_down(model)
        model(**batch).loss.backward()
        loss = model(**batch).loss
        with never_waiting():
            loss.backward()
        events = traced(lambda: model(**batch).loss.backward(), device)
    assert host_synchronisations(events) == []
    assert hidden_share(spans_of(events)) > 0
