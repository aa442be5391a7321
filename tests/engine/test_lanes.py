"""Lanes, the places where rebuilds run."""

import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from families import FAMILIES, assert_same, never_waiting, rebuilt_steps, step

import hf_pareprop as hp
from hf_pareprop import lanes
from hf_pareprop.observer import Observer, observing
from hf_pareprop.tools.accounting import AheadLane

CPU = torch.device("cpu")


def test_the_worker_is_used_only_if_cores_are_idle(cores):
    threads = torch.get_num_threads()
    cores(2 * threads)
    assert isinstance(lanes.side_lane(CPU), lanes.ThreadLane)
    assert lanes.side_lane(CPU) is lanes.side_lane(CPU)
    cores(2 * threads - 1)
    assert isinstance(lanes.side_lane(CPU), lanes.InlineLane)


def test_other_devices_run_inline():
    assert isinstance(lanes.side_lane(torch.device("meta")), lanes.InlineLane)


def test_a_lane_is_replaced_in_a_context(cores):
    """Contexts can be nested, and after them the device's own lane is used again."""
    cores(2 * torch.get_num_threads())
    own, mine, yours = lanes.side_lane(CPU), lanes.InlineLane(), AheadLane()
    with lanes.replaced(lambda device: mine):
        with lanes.replaced(lambda device: yours if device == CPU else mine):
            assert lanes.side_lane(CPU) is yours and lanes.side_lane(torch.device("meta")) is mine
        with lanes.replaced(None):
            assert lanes.side_lane(CPU) is own
        assert lanes.side_lane(CPU) is mine
    assert lanes.side_lane(CPU) is own


def test_only_the_overlapping_engine_takes_the_side_lane(family):
    """It uses that lane for all steps but those that a chain begins with."""
    jobs = []

    class Counting(AheadLane):
        def job(self, work):
            jobs.append(1)
            return super().job(work)

    model, batch = family.build(3, beta=0.5), family.batch()
    plans = model.base_model.layer_plans
    chains = len({plan.stage for plan in plans}) + sum(plan.transition for plan in plans)
    with lanes.replaced(lambda device: Counting()):
        ahead = len(rebuilt_steps(model)) - chains
        for engine, expected in (("autograd", 0), ("reprop", 0), ("pareprop", ahead)):
            jobs.clear()
            step(model, batch, engine)
            assert len(jobs) == expected


def test_inline_work_waits_to_be_asked_for():
    """So `reprop` has one step's activations alive at a time."""
    done = []
    job = lanes.InlineLane().job(lambda: done.append(1))
    job.begin()
    assert not done
    job.result()
    assert done == [1]


def test_worker_runs_beside_the_caller():
    barrier = threading.Barrier(2, timeout=10)
    job = lanes.ThreadLane().job(barrier.wait)
    job.begin()
    barrier.wait()  # would time out if the work ran on this thread
    job.result()


def test_an_abandoned_job_is_waited_for():
    begun, done = threading.Event(), []
    job = lanes.ThreadLane().job(lambda: (begun.set(), time.sleep(0.2), done.append(1)))
    job.begin()
    begun.wait()
    job.abandon()
    assert done == [1]


def test_an_exception_reaches_whoever_asks():
    job = lanes.ThreadLane().job(lambda: 1 // 0)
    job.begin()
    with pytest.raises(ZeroDivisionError):
        job.result()


def test_the_next_step_is_rebuilt_while_gradients_are_computed():
    """The schedule of the paper: rebuilding step i-1 begins before the gradients of step i, and no step earlier."""
    events = []

    class Noting(Observer):
        @contextmanager
        def rebuilding(self, position, step):
            events.append(("rebuild", position, step))
            yield

        @contextmanager
        def differentiating(self, position, step):
            events.append(("gradients", position, step))
            yield

    family = FAMILIES["vit"]
    model, batch = family.build(2, beta=0.5), family.batch()
    places = [(1, 1), (1, 0), (0, 1), (0, 0)]
    rebuilds, gradients = ([(what, *place) for place in places] for what in ("rebuild", "gradients"))
    with observing(Noting()):
        step(model, batch, "reprop")
        assert events == [event for pair in zip(rebuilds, gradients, strict=True) for event in pair]
        events.clear()
        with lanes.replaced(lambda device: AheadLane()):  # what is begun runs at once
            step(model, batch, "pareprop")
    begun_ahead = zip(rebuilds[1:], gradients[:-1], strict=True)
    assert events == [rebuilds[0], *(event for pair in begun_ahead for event in pair), gradients[-1]]


def _train_in_child(queue):
    family = FAMILIES["vit"]
    queue.put(step(family.build(2, beta=0.5), family.batch(), "pareprop")[0].item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_can_train(cores):
    """The worker thread does not survive a fork, and waiting for it would never end."""
    cores(2 * torch.get_num_threads())
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
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, 1 / 256, [0.5, 0, 1.0, 0.25, 0.25]])
def test_cuda_engines_agree(family, beta, autocast, dropout):
    model = family.build(5, dropout, beta=beta).cuda()
    batch = {k: v.cuda() for k, v in family.batch().items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = step(model, batch, "autograd", autocast=autocast)
    for engine in ("reprop", "pareprop"):
        for _ in range(5):  # a race would not show every time
            again = step(model, batch, engine, autocast=autocast)
            assert torch.equal(reference[0], again[0])
            assert_same(again[1], reference[1])


FIRST_STEP = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from families import FAMILIES, step
family = FAMILIES[sys.argv[2]]
batch = {name: tensor.cuda() for name, tensor in family.batch().items()}
step(family.build(3, 0.1, beta=0.5).cuda(), batch, "reprop", autocast=True)
"""


@pytest.mark.cuda
def test_cuda_first_step_of_a_process(family):
    """PyTorch sets the order of its attention kernels when attention first runs, here within a reversible layer."""
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", FIRST_STEP, str(tests), family.row.name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.cuda
def test_cuda_states_are_rebuilt_bit_for_bit(family):
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
    with never_waiting():
        loss.backward()


@pytest.mark.cuda
def test_cuda_memory_is_flat_in_depth(family):
    """An added layer takes at most 3 % of the activations of a stock layer."""

    def peak(build, depth):
        model = build(depth).cuda()
        # Large, because the allocator rounds sizes up to a megabyte.
        batch = {k: v.cuda().repeat(256, *[1] * (v.dim() - 1)) for k, v in family.batch().items()}
        model(**batch).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch).loss.backward()
        return torch.cuda.max_memory_allocated() - before

    def slope(build):
        return (peak(build, 16) - peak(build, 8)) / 8  # both models are deep enough to differ in the deepest stage

    stock = slope(family.build_stock)
    for engine in ("reprop", "pareprop"):
        assert slope(lambda depth, e=engine: family.build(depth, beta=0.5, backward_engine=e)) <= 0.03 * stock


@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_steps_alive_at_a_time(family, lane, engine):
    """The activations of one step with `reprop`, of two with `pareprop` where it overlaps. They count from the rebuild on."""
    overlaps = engine == "pareprop" and lane == "thread"
    changes, begun = [], threading.Semaphore(0)  # of both threads

    class Counting(Observer):
        @contextmanager
        def rebuilding(self, position, step):
            changes.append(1)
            if (position, step) != steps[-1]:  # the first one
                begun.release()
            yield

        def step_rebuilt(self, position, step, rebuilt):
            left = [tensor for tensor in rebuilt.saved if tensor is not None]
            count = [len(left)]

            def gone():
                count[0] -= 1
                if not count[0]:
                    changes.append(-1)

            for tensor in left:
                weakref.finalize(tensor, gone)

        @contextmanager
        def differentiating(self, position, step):
            if overlaps and (position, step) != steps[0]:
                assert begun.acquire(timeout=60)  # the next rebuild has begun
            yield

    model = family.build(2, 0.1, beta=0.5, one_stage=True)
    steps = rebuilt_steps(model)
    with observing(Counting()):
        step(model, family.batch(), engine)
    alive = list(accumulate(changes))
    assert (max(alive), alive[-1], len(alive)) == (2 if overlaps else 1, 0, 2 * len(steps))
