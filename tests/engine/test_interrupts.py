"""A KeyboardInterrupt in the middle of a backward pass: random numbers go on where they were, and the next step is right."""

import signal
import time

import pytest
import torch
from families import FAMILIES, assert_same, step

from hf_pareprop import lanes

TIMES = 60


@pytest.fixture
def interrupt():
    """Raise a KeyboardInterrupt in this thread after some seconds, like Ctrl-C. With 0, cancel that."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs a timer that sends signals")

    def handle(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handle)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inline", "thread"])
def test_interrupts_at_any_time(interrupt, place):
    family = FAMILIES["vit"]
    model, batch = family.build(6, 0.3, beta=0.5), family.batch()
    reference = step(model, batch, "autograd")
    lane = lanes.ThreadLane() if place == "thread" else lanes.InlineLane()
    with lanes.replaced(lambda device: lane):
        step(model, batch, "pareprop")
        torch.manual_seed(7)
        loss = model(**batch).loss
        begin = time.perf_counter()
        loss.backward()
        duration = time.perf_counter() - begin
        interrupted = 0
        for i in range(TIMES):
            model.zero_grad()
            torch.manual_seed(7)
            loss = model(**batch).loss
            state = torch.get_rng_state()
            try:
                interrupt(max(1e-5, duration * i / TIMES))
                loss.backward()
                interrupt(0)
            except KeyboardInterrupt:
                interrupted += 1
            assert torch.equal(state, torch.get_rng_state())
            again = step(model, batch, "pareprop")
            assert torch.equal(reference[0], again[0])
            assert_same(reference[1], again[1])
    assert interrupted > TIMES / 4


def test_an_impatient_user(interrupt):
    """A second interrupt, which comes while the first one waits for the worker, does not end that wait."""
    done = []

    def work():
        time.sleep(0.3)
        done.append(1)

    job = lanes.ThreadLane().job(work)
    job.begin()
    time.sleep(0.05)
    interrupt(0.1)
    with pytest.raises(KeyboardInterrupt):
        job.abandon()
    assert done == [1]


def test_an_interrupt_while_a_result_is_awaited(interrupt):
    done = []

    def work():
        time.sleep(0.3)
        done.append(1)

    job = lanes.ThreadLane().job(work)
    job.begin()
    interrupt(0.1)
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert done == [1]


def test_work_that_has_not_begun_is_cancelled():
    done, lane = [], lanes.ThreadLane()
    first, second, third = lane.job(lambda: time.sleep(0.1)), *(lane.job(lambda: done.append(1)) for _ in range(2))
    first.begin()
    second.begin()
    for job in (second, third):  # the third has not even been put where the worker would find it
        job.abandon()
    first.result()
    assert not done
