"""What `hf-pareprop bench` recommends, case by case."""

import time

import pytest
import torch

from hf_pareprop.tools.bench import code_for, contenders, plot, recommend, table
from hf_pareprop.tools.compare import Row
from hf_pareprop.tools.records import MB
from hf_pareprop.tools.timing import OUT_OF_MEMORY, time_interleaved

CAP = 1000 * MB
PLAIN, CHECKPOINTED, REPROP, PAREPROP = (
    "plain training",
    "gradient checkpointing",
    "reprop, beta 0.0625",
    "pareprop, beta 0.0625",
)


def row(name, batch_size, rate, megabytes):
    """``rate`` in samples per second; ``None`` did not fit."""
    if rate is None:
        return Row(name, batch_size, error=OUT_OF_MEMORY, predicted={"graphs": megabytes * MB})
    return Row(name, batch_size, ms=[1e3 * batch_size / rate], peak_bytes=megabytes * MB)


def test_plain_training_where_it_is_fastest():
    rows = [row(PLAIN, 8, 10, 800), row(CHECKPOINTED, 8, 7.5, 300), row(PAREPROP, 8, 8, 200)]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Stay with plain training.")
    assert "runs like reprop" not in said and "runs like reprop" in recommend(rows, 8, CAP, overlaps=False)
    assert f"({PAREPROP}) would take 200 MB instead of 800 MB and 1.25 times as long" in said


def test_plain_training_also_within_the_scatter_of_timings():
    rows = [row(PLAIN, 8, 9.9, 800), row(PAREPROP, 8, 10, 200)]
    assert recommend(rows, 8, CAP).startswith("Stay with plain training.")


def scattered(name, batch_size, rates, megabytes):
    """With several samples, in samples per second."""
    return Row(name, batch_size, ms=[1e3 * batch_size / rate for rate in rates], peak_bytes=megabytes * MB)


def test_overlapping_ranges_are_not_ranked():
    """Plain training, or else what needs the least memory; unless a step is faster in every sample."""
    noisy = [scattered(CHECKPOINTED, 8, [7, 9, 10], 700), scattered(PAREPROP, 8, [6, 8, 9.5], 260)]
    said = recommend(noisy, 8, CAP)
    assert said.startswith("Train the reversible model")
    assert f"As fast, as far as these timings tell: {CHECKPOINTED}." in said
    plain = scattered(PLAIN, 8, [5, 7.5, 9.1], 900)
    assert recommend([plain, *noisy], 8, CAP).startswith("Stay with plain training.")
    assert "and about as long" in recommend([plain, *noisy], 8, CAP)
    clear = [scattered(CHECKPOINTED, 8, [9.6, 9.7, 9.8], 700), scattered(PAREPROP, 8, [6, 8, 9.5], 260)]
    assert recommend(clear, 8, CAP).startswith("Use gradient checkpointing")
    assert "[6.00-9.50]" in "".join(table([plain, *clear], {}))


@pytest.mark.parametrize(
    "name, batch_size, lines",
    [
        (PLAIN, 8, ["args = TrainingArguments(..., per_device_train_batch_size=8)"]),
        (
            CHECKPOINTED,
            3,
            [
                "args = TrainingArguments(..., per_device_train_batch_size=3, gradient_accumulation_steps=3, "
                "gradient_checkpointing=True)"
            ],
        ),
        (
            f"{PAREPROP}, budget of gradients",
            8,
            [
                "model = hf_pareprop.to_reversible('some/model', backward_engine='pareprop', beta=0.0625, "
                "memory_budget='gradients')",
                "args = TrainingArguments(..., per_device_train_batch_size=8)",
            ],
        ),
    ],
)
def test_code_that_applies_it(name, batch_size, lines):
    assert code_for(row(name, batch_size, 8, 260), "some/model", 8) == lines


def test_reversible_training_where_plain_does_not_fit():
    rows = [
        row(PLAIN, 1, None, 1200),
        row(CHECKPOINTED, 8, 7, 700),
        row(REPROP, 8, 7.5, 200),
        row(PAREPROP, 8, 8, 260),
    ]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Train the reversible model with backward_engine='pareprop', beta=0.0625, batch size 8.")
    assert "Plain training does not fit within 1000 MB, not even at batch 1." in said


def test_retention_where_some_layers_can_be_kept():
    kept = f"{PAREPROP}, 5 layers kept"
    rows = [row(PLAIN, 4, 10, 900), row(PAREPROP, 8, 9, 260), row(kept, 8, 11, 950)]
    wanted = "Train the reversible model with backward_engine='pareprop', beta=0.0625, memory_budget='5 layers', batch"
    assert recommend(rows, 8, CAP).startswith(f"{wanted} size 8.")


def test_what_is_free_is_kept_where_that_is_fastest():
    rows = [row(PLAIN, 1, None, 1200), row(PAREPROP, 8, 9, 260), row(f"{PAREPROP}, budget of gradients", 8, 11, 261)]
    wanted = (
        "Train the reversible model with backward_engine='pareprop', beta=0.0625, memory_budget='gradients', batch"
    )
    assert recommend(rows, 8, CAP).startswith(wanted)


def test_checkpointing_where_it_is_faster():
    rows = [row(PLAIN, 1, None, 1200), row(CHECKPOINTED, 8, 8, 700), row(PAREPROP, 8, 7, 260)]
    assert recommend(rows, 8, CAP).startswith("Use gradient checkpointing of the stock model, batch size 8.")


def test_accumulation_where_a_smaller_batch_is_faster():
    rows = [row(PLAIN, 3, 10, 900), row(CHECKPOINTED, 8, 7, 700), row(PAREPROP, 8, 8, 260)]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Stay with plain training.")
    assert "Accumulate gradients over 3 steps for batch 8" in said and "fits up to" not in said
    assert "Plain training fits up to batch 2" in recommend([row(PLAIN, 2, 5, 900), rows[2]], 8, CAP)
    assert f"take {PAREPROP} at batch 8, 8.00 samples/s, 260 MB" in said
    alone = recommend([row(PLAIN, 3, 10, 900), row(PAREPROP, 5, 9, 900)], 8, CAP)
    assert "nothing fits" in alone


def test_a_peak_above_the_cap_does_not_count():
    """On a CPU nothing stops a step from taking more than it should."""
    rows = [row(PLAIN, 8, 10, 1001), row(PAREPROP, 8, 8, 260)]
    assert recommend(rows, 8, CAP).startswith("Train the reversible model")


def test_nothing_fits():
    said = recommend([row(PLAIN, 1, None, 2000), row(PAREPROP, 1, None, 1500)], 8, CAP)
    assert said.startswith("Nothing trains this model within 1000 MB")


@pytest.mark.parametrize("beta, reversible", [(0.0625, 6), (1.0, 3)])
def test_contenders(beta, reversible):
    """Beside the stock model's ways: the two engines at the beta asked for, and at 1 if that is another one.

    And the faster engine with what it can keep for free.
    """
    found = contenders(beta, True, torch.device("cuda"))
    assert len(found) == len(set(found)) == 7 + reversible
    here = contenders(beta, False, torch.device("cpu"))
    assert any(c.compiled for c in found) and not any(c.compiled for c in here)
    assert any(c.offload for c in found) and not any(c.offload for c in here)  # which does nothing on a CPU


def test_table_and_plot_hold_what_did_not_fit():
    rows = [row(PLAIN, 8, None, 2000), row(PAREPROP, 8, 8, 260)]
    lines = table(rows, {PLAIN: 3, PAREPROP: 40})
    assert OUT_OF_MEMORY in lines[1] and lines[1].split()[-1] == "3"
    assert "260 MB" in lines[2] and "8.00" in lines[2]
    assert len(plot(rows, "title", CAP).axes) == 2


def test_rounds_end_when_time_is_up():
    """After a round, and never before the first sample of each."""
    counts = dict(a=0, b=0)

    def report(method, ms):
        counts[method] += 1

    steps = {name: lambda: lambda: time.sleep(0.02) for name in counts}
    time_interleaved(steps, 9, 1, torch.device("cpu"), report, seconds=0.1)
    assert counts["a"] == counts["b"] < 4
    time_interleaved(steps, 9, 1, torch.device("cpu"), report, seconds=0)
    assert counts["a"] == counts["b"] < 5
