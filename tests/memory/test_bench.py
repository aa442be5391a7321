"""What `hf-pareprop bench` recommends, case by case."""

import json
import time
from dataclasses import replace

import pytest
import torch
from families import FAMILIES

from hf_pareprop.tools.bench import code_for, contenders, limits_of, plot, recommend, sizes_within, table
from hf_pareprop.tools.compare import Comparison, Row
from hf_pareprop.tools.contenders import (
    CHECKPOINTING,
    STOCK,
    STOCK_CONTENDERS,
    Contender,
    faster,
    reversible_contenders,
    with_free_budget,
)
from hf_pareprop.tools.records import MB
from hf_pareprop.tools.timing import OUT_OF_MEMORY, time_interleaved

CAP = 1000 * MB
REPROP, PAREPROP = reversible_contenders([0.0625], ("reprop", "pareprop"))
GRAPHED = replace(PAREPROP, compiled=True, graphed=True)


def row(way, batch_size, rate, megabytes):
    """A row with the speed ``rate`` in samples per second; ``None`` means that it did not fit."""
    if rate is None:
        return Row(way, batch_size, error=OUT_OF_MEMORY, predicted={"graphs": megabytes * MB})
    return Row(way, batch_size, ms=[1e3 * batch_size / rate], peak_bytes=megabytes * MB)


def test_plain_training_where_it_is_fastest():
    rows = [row(STOCK, 8, 10, 800), row(CHECKPOINTING, 8, 7.5, 300), row(PAREPROP, 8, 8, 200)]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Stay with plain training.")
    assert "runs like reprop" not in said and "runs like reprop" in recommend(rows, 8, CAP, overlaps=False)
    assert f"({PAREPROP.name}) would take 200 MB instead of 800 MB and 1.25 times as long" in said


def test_plain_training_also_within_the_scatter_of_timings():
    rows = [row(STOCK, 8, 9.9, 800), row(PAREPROP, 8, 10, 200)]
    assert recommend(rows, 8, CAP).startswith("Stay with plain training.")


def scattered(way, batch_size, rates, megabytes):
    """A row with several samples of its speed, in samples per second."""
    return Row(way, batch_size, ms=[1e3 * batch_size / rate for rate in rates], peak_bytes=megabytes * MB)


def test_overlapping_ranges_are_not_ranked():
    """Plain training is chosen, or else the way with the least memory, unless one is faster in every sample."""
    noisy = [scattered(CHECKPOINTING, 8, [7, 9, 10], 700), scattered(PAREPROP, 8, [6, 8, 9.5], 260)]
    said = recommend(noisy, 8, CAP)
    assert said.startswith("Train the reversible model")
    assert f"Equally fast, as far as these timings tell: {CHECKPOINTING.name}." in said
    plain = scattered(STOCK, 8, [5, 7.5, 9.1], 900)
    assert recommend([plain, *noisy], 8, CAP).startswith("Stay with plain training.")
    assert "and about as long" in recommend([plain, *noisy], 8, CAP)
    clear = [scattered(CHECKPOINTING, 8, [9.6, 9.7, 9.8], 700), scattered(PAREPROP, 8, [6, 8, 9.5], 260)]
    assert recommend(clear, 8, CAP).startswith("Use gradient checkpointing")
    assert "[6.00-9.50]" in "".join(table([plain, *clear], {}))


@pytest.mark.parametrize(
    "way, batch_size, lines",
    [
        (STOCK, 8, ["args = TrainingArguments(..., per_device_train_batch_size=8)"]),
        (
            CHECKPOINTING,
            3,
            [
                "args = TrainingArguments(..., per_device_train_batch_size=3, gradient_accumulation_steps=3, "
                "gradient_checkpointing=True)"
            ],
        ),
        (
            PAREPROP.within_gradients(),
            8,
            [
                "model = hf_pareprop.to_reversible('some/model', backward_engine='pareprop', beta=0.0625, "
                "memory_budget='gradients')",
                "args = TrainingArguments(..., per_device_train_batch_size=8)",
            ],
        ),
        (
            GRAPHED,
            8,
            [
                "model = hf_pareprop.to_reversible('some/model', backward_engine='pareprop', beta=0.0625, "
                "compile_steps=True)",
                "args = TrainingArguments(..., per_device_train_batch_size=8, dataloader_drop_last=True)",
                "trainer = hf_pareprop.GraphedTrainer(model, args, ...)  # in place of Trainer; all batches of one shape",
            ],
        ),
    ],
)
def test_code_that_applies_it(way, batch_size, lines):
    assert code_for(row(way, batch_size, 8, 260), "some/model", 8) == lines


def test_reversible_training_where_plain_does_not_fit():
    rows = [
        row(STOCK, 1, None, 1200),
        row(CHECKPOINTING, 8, 7, 700),
        row(REPROP, 8, 7.5, 200),
        row(PAREPROP, 8, 8, 260),
    ]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Train the reversible model with backward_engine='pareprop', beta=0.0625, batch size 8.")
    assert "Plain training does not fit within 1000 MB, not even at batch 1." in said


def test_retention_where_some_layers_can_be_kept():
    kept = PAREPROP.retaining(5)
    rows = [row(STOCK, 4, 10, 900), row(PAREPROP, 8, 9, 260), row(kept, 8, 11, 950)]
    wanted = "Train the reversible model with backward_engine='pareprop', beta=0.0625, memory_budget='5 layers', batch"
    assert recommend(rows, 8, CAP).startswith(f"{wanted} size 8.")


def test_what_is_free_is_kept_where_that_is_fastest():
    rows = [row(STOCK, 1, None, 1200), row(PAREPROP, 8, 9, 260), row(PAREPROP.within_gradients(), 8, 11, 261)]
    wanted = (
        "Train the reversible model with backward_engine='pareprop', beta=0.0625, memory_budget='gradients', batch"
    )
    assert recommend(rows, 8, CAP).startswith(wanted)


def test_checkpointing_where_it_is_faster():
    rows = [row(STOCK, 1, None, 1200), row(CHECKPOINTING, 8, 8, 700), row(PAREPROP, 8, 7, 260)]
    assert recommend(rows, 8, CAP).startswith("Use gradient checkpointing of the stock model, batch size 8.")


def test_accumulation_where_a_smaller_batch_is_faster():
    rows = [row(STOCK, 3, 10, 900), row(CHECKPOINTING, 8, 7, 700), row(PAREPROP, 8, 8, 260)]
    said = recommend(rows, 8, CAP)
    assert said.startswith("Stay with plain training.")
    assert "Accumulate gradients over 3 steps for batch 8" in said and "fits up to" not in said
    assert "Plain training fits up to batch 2" in recommend([row(STOCK, 2, 5, 900), rows[2]], 8, CAP)
    assert f"take {PAREPROP.name} at batch 8, 8.00 samples/s, 260 MB" in said
    alone = recommend([row(STOCK, 3, 10, 900), row(PAREPROP, 5, 9, 900)], 8, CAP)
    assert "nothing fits" in alone


def test_a_peak_above_the_cap_does_not_count():
    """On a CPU nothing stops a step from taking more than it should."""
    rows = [row(STOCK, 8, 10, 1001), row(PAREPROP, 8, 8, 260)]
    assert recommend(rows, 8, CAP).startswith("Train the reversible model")


def test_nothing_fits():
    said = recommend([row(STOCK, 1, None, 2000), row(PAREPROP, 1, None, 1500)], 8, CAP)
    assert said.startswith("Nothing trains this model within 1000 MB")


@pytest.mark.parametrize("beta, reversible, graphs", [(0.0625, 6, 5), (1.0, 3, 3)])
def test_contenders(beta, reversible, graphs):
    """The ways of the stock model, and the two engines at the given beta, and at 1 if that is another beta.

    Also the faster engine with the budget that costs no memory, and on CUDA graphs of plain training and of the engines.
    """
    found = contenders(beta, True, torch.device("cuda"))
    assert len(found) == len(set(found)) == 7 + reversible + graphs
    assert sum(way.graphed for way in found) == graphs and all(
        way.compiled for way in found if way.graphed and way.engine
    )
    assert not any(way.graphed for way in contenders(beta, False, torch.device("cuda")))
    here = contenders(beta, False, torch.device("cpu"))
    assert any(c.compiled for c in found) and not any(c.compiled for c in here)
    assert any(c.offload for c in found) and not any(c.offload for c in here)  # which does nothing on a CPU


def test_graphs_that_win_are_called_by_the_trainer_that_makes_them():
    plain, graph = row(STOCK, 8, 5, 800), replace(STOCK, graphed=True)
    assert recommend([plain, row(GRAPHED, 8, 9, 300)], 8, CAP).startswith(
        "Train the reversible model with backward_engine='pareprop', beta=0.0625, compile_steps=True, and GraphedTrainer, batch"
    )
    said = recommend([plain, row(graph, 8, 9, 810)], 8, CAP)
    assert said.startswith("Train the stock model with GraphedTrainer, batch size 8.")


def test_a_graph_gets_a_batch_that_leaves_it_some_memory():
    """Its memory is not predicted. That of what it captures is, and a graph takes a few percent more."""
    subject, batch = FAMILIES["vit"].subject(4), FAMILIES["vit"].batch()
    needed = Comparison(subject, batch, torch.device("cpu"), False).predict(PAREPROP, 64).total
    comparison = Comparison(subject, batch, torch.device("cpu"), False, cap=needed)
    assert sizes_within(comparison, [PAREPROP, GRAPHED], 1000) == {PAREPROP: 64, GRAPHED: 57}
    assert sizes_within(comparison, [PAREPROP, GRAPHED], 8) == {PAREPROP: 8, GRAPHED: 8}
    assert limits_of(comparison, [PAREPROP, GRAPHED]) == {PAREPROP: 64, GRAPHED: None}


def test_a_row_knows_its_contender():
    """It survives JSON, and has a name of its own."""
    ours = with_free_budget(reversible_contenders([1, 0.5]))
    ways = [*STOCK_CONTENDERS, *ours, *faster(ours, torch.device("cuda")), PAREPROP.retaining(5)]
    assert len({way.name for way in ways}) == len(set(ways)) == len(ways)
    for way in ways:
        given = Row(way, 8, ms=[1.5], predicted={"graphs": 3})
        written = json.loads(json.dumps(given.as_dict()))
        assert Row.from_dict(written) == given and written["contender"]["name"] == way.name
    assert Contender("pareprop", 1.0, budget="gradients").name == "pareprop, beta 1, budget of gradients"


def test_table_and_plot_hold_what_did_not_fit():
    rows = [row(STOCK, 8, None, 2000), row(PAREPROP, 8, 8, 260)]
    lines = table(rows, {STOCK: 3, PAREPROP: 40})
    assert OUT_OF_MEMORY in lines[1] and lines[1].split()[-1] == "3"
    assert "260 MB" in lines[2] and "8.00" in lines[2]
    assert len(plot(rows, "title", CAP).axes) == 2


def test_rounds_end_when_time_is_up():
    """Timing stops after a round, and never before each method has one sample."""
    counts = dict(a=0, b=0)

    def report(method, ms):
        counts[method] += 1

    steps = {name: lambda: lambda: time.sleep(0.02) for name in counts}
    time_interleaved(steps, 9, 1, torch.device("cpu"), report, seconds=0.1)
    assert counts["a"] == counts["b"] < 4
    time_interleaved(steps, 9, 1, torch.device("cpu"), report, seconds=0)
    assert counts["a"] == counts["b"] < 5
