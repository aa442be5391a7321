"""Where rebuilds run."""

import multiprocessing
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, assert_same, assert_same_on_cuda, step

from hf_pareprop import lanes
from hf_pareprop.engine import PaReprop
from hf_pareprop.layer_call import LayerCall, RebuiltStep

CPU = torch.device("cpu")


def test_the_worker_is_used_only_if_cores_are_idle(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(lanes, "_cores", lambda: 2 * threads)
    assert isinstance(lanes.side_lane(CPU), lanes.ThreadLane)
    assert lanes.side_lane(CPU) is lanes.side_lane(CPU)
    monkeypatch.setattr(lanes, "_cores", lambda: 2 * threads - 1)
    assert isinstance(lanes.side_lane(CPU), lanes.InlineLane)


def test_other_devices_run_inline():
    assert isinstance(lanes.side_lane(torch.device("meta")), lanes.InlineLane)


def test_inline_work_waits_to_be_asked_for():
    """So `reprop` has one step's graph alive at a time."""
    done = []
    with lanes.InlineLane().session() as session:
        job = session.start(lambda: done.append(1))
        assert not done
        job.result()
        assert done == [1]


def test_worker_runs_beside_the_caller():
    with lanes.ThreadLane().session() as session:
        barrier = threading.Barrier(2, timeout=10)
        job = session.start(barrier.wait)
        barrier.wait()  # would time out if the work ran on this thread
        job.result()


def test_a_session_ends_when_its_work_is_done():
    done = []
    with pytest.raises(KeyError), lanes.ThreadLane().session() as session:
        session.start(lambda: (time.sleep(0.2), done.append(1)))
        raise KeyError
    assert done == [1]


def test_an_exception_reaches_whoever_asks():
    with lanes.ThreadLane().session() as session:
        job = session.start(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            job.result()


def test_the_next_step_is_rebuilt_while_gradients_are_computed(monkeypatch):
    """The schedule of the paper: rebuilding step i-1 begins before the gradients of step i, one step ahead, no more."""
    events = []
    gradients = RebuiltStep.gradients

    class RecordingSession:
        def __init__(self, session):
            self.session = session

        def start(self, work):
            events.append(("start", work.func.__self__.module.layer_idx, work.args[0]))
            return self.session.start(work)

    class RecordingLane(lanes.ThreadLane):
        @contextmanager
        def session(self):
            with super().session() as session:
                yield RecordingSession(session)

    lane = RecordingLane()
    monkeypatch.setattr(PaReprop, "lane", staticmethod(lambda device: lane))
    monkeypatch.setattr(
        RebuiltStep, "gradients", lambda self, grad: events.append("gradients") or gradients(self, grad)
    )
    family = FAMILIES["vit"]
    step(family.build(2, beta=0.5), family.batch(), "pareprop")
    g = "gradients"
    assert events == [("start", 1, 1), ("start", 1, 0), g, ("start", 0, 1), g, ("start", 0, 0), g, g]


def _train_in_child(queue):
    family = FAMILIES["vit"]
    queue.put(step(family.build(2, beta=0.5), family.batch(), "pareprop")[0].item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_can_train(monkeypatch):
    """The worker thread does not survive a fork; waiting for it would hang for ever."""
    monkeypatch.setattr(lanes, "_cores", lambda: 2 * torch.get_num_threads())
    family = FAMILIES["vit"]
    model, batch = family.build(2, beta=0.5), family.batch()
    loss, reference, _ = step(model, batch, "pareprop")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_train_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == loss.item()
    child.join(timeout=10)
    assert_same(reference, step(model, batch, "pareprop")[1])


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, [0.5, 0, 1.0, 0.25, 0.25]])
def test_cuda_engines_agree(family, beta, autocast, dropout):
    model = family.build(5, dropout, beta=beta).cuda()
    batch = {k: v.cuda() for k, v in family.batch().items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = step(model, batch, "autograd", autocast=autocast)
    for engine in ("reprop", "pareprop"):
        for _ in range(5):  # a race would not show every time
            again = step(model, batch, engine, autocast=autocast)
            assert torch.equal(reference[0], again[0])
            assert_same_on_cuda(again[1], reference[1])


@pytest.mark.cuda
def test_cuda_states_are_rebuilt_bit_for_bit(family):
    import hf_pareprop as hp

    model = family.build(24, 0.1, beta=0.5).cuda()
    batch = {k: v.cuda() for k, v in family.batch().items()}
    with torch.autocast("cuda", torch.bfloat16):
        assert hp.verify(model, batch).exact


@pytest.mark.cuda
def test_cuda_random_state_after_a_step(family):
    model = family.build(3, 0.3, beta=0.5).cuda()
    batch = {k: v.cuda() for k, v in family.batch().items()}
    states = []
    for engine in ("autograd", "reprop", "pareprop"):
        step(model, batch, engine)
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.cuda
def test_cuda_no_host_synchronisation(family):
    """The backward never waits for the device. (The forward of transformers' attention mask does, in stock models too.)"""
    model = family.build(3, 0.1, beta=0.5).cuda()
    batch = {k: v.cuda() for k, v in family.batch().items()}
    step(model, batch, "pareprop")
    loss = model(**batch).loss
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_memory_is_flat_in_depth(family):
    """At most 3 % of a stock layer's activations per added layer."""

    def peak(build, depth):
        model = build(depth).cuda()
        batch = {k: v.cuda().repeat(64, *[1] * (v.dim() - 1)) for k, v in family.batch().items()}
        model(**batch).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch).loss.backward()
        return torch.cuda.max_memory_allocated() - before

    def slope(build):
        return (peak(build, 12) - peak(build, 4)) / 8

    stock = slope(family.build_stock)
    for engine in ("reprop", "pareprop"):
        assert slope(lambda depth, e=engine: family.build(depth, beta=0.5, backward_engine=e)) <= 0.03 * stock


def test_graphs_alive_at_a_time(family, lane, monkeypatch):
    """One step's with `reprop`, two with `pareprop` where it overlaps: counted from a rebuild's start to its graph's end."""
    alive, highest, rebuild = [0], [0], LayerCall.rebuild

    def counting(self, *args):
        alive[0] += 1
        highest[0] = max(highest[0], alive[0])
        rebuilt = rebuild(self, *args)
        weakref.finalize(rebuilt, lambda: alive.__setitem__(0, alive[0] - 1))
        return rebuilt

    monkeypatch.setattr(LayerCall, "rebuild", counting)
    model = family.build(5, 0.1, beta=0.5)
    for engine, most in (("reprop", 1), ("pareprop", 2 if lane == "thread" else 1)):
        highest[0] = 0
        step(model, family.batch(), engine)
        assert (highest[0], alive[0]) == (most, 0)
