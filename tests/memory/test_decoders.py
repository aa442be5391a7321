"""Compare what `hf-pareprop bench --plan` computes for training a decoder with measurements and known numbers."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from benchmarks import decoders as page
from benchmarks.pages import TABLE, filled
from hf_pareprop.tools.decoder_plan import PUBLISHED, TOKENS, configuration, explained, table
from hf_pareprop.tools.decoders import FULL, FULL_IN_BF16, LORA, TRAININGS, MadeOnMeta, needs, ways, without_weights
from hf_pareprop.tools.memory import peak_bytes

CPU = torch.device("cpu")
DEPTH = 6
SMALL = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, vocab_size=4000)
LLAMA = LlamaConfig(**SMALL, num_hidden_layers=DEPTH, tie_word_embeddings=True)
WIDE = LlamaConfig(
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
    num_hidden_layers=DEPTH,
    tie_word_embeddings=True,
)
ON_DEVICE = [way for way in ways() if not way.on_host]


def trained(config, way, training):
    """A model with random weights."""
    model = without_weights(config, training, config.num_hidden_layers, config.vocab_size, way)
    MadeOnMeta(model).build(way.contender)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
    return model


def measured(model, tokens, training):
    """The bytes that a step takes on top of weights and optimizer."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=training.autocast):
            outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()  # while the logits are held, as the plan has it
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    return peak_bytes(step, CPU)


def error_of_plan(own, found):
    """By how many bytes a plan is off, beyond 1 % and the gradients of one layer.

    Those come one after the other while the layer's graph goes, and the plan counts all of them or none.
    """
    planned = own.peak(TOKENS[0], chunked=False) - own.weights - own.optimizer
    return abs(planned - found) - 0.01 * found - (own.gradients - own.head_gradient) / DEPTH


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [
        TRAININGS[1],
        *(pytest.param(training, marks=pytest.mark.every_case) for training in (TRAININGS[0], TRAININGS[2])),
    ],
    ids=["bf16", "fp32", "lora"],
)
@pytest.mark.parametrize("way", ON_DEVICE, ids=lambda way: way.name)
def test_the_plan_is_what_is_measured(way, training):
    """The text is so long that activations take more memory than weights, as in cases for which people ask for a plan."""
    found = measured(trained(WIDE, way, training), TOKENS[0], training)
    assert error_of_plan(needs(WIDE, way, training), found) <= 0


@pytest.mark.slow
def test_the_plan_of_another_way_is_not_what_is_measured():
    plain, _, _, layers, _, _ = ways()
    found = measured(trained(WIDE, layers, FULL_IN_BF16), TOKENS[0], FULL_IN_BF16)
    assert error_of_plan(needs(WIDE, plain, FULL_IN_BF16), found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, Qwen3Config(**SMALL, head_dim=16)], ids=["llama", "qwen3"])
def test_bits_that_are_stored(config):
    """In any precision, checkpointing stores the residual stream, and reversible training stores side bits."""
    _, checkpointing, offloaded, layers, sub_blocks, at_1 = ways()
    assert needs(config, checkpointing, FULL).bits == pytest.approx(32, abs=0.01)
    assert needs(config, checkpointing, FULL_IN_BF16).bits == pytest.approx(16, abs=0.01)
    assert needs(config, offloaded, FULL_IN_BF16).bits == 0
    for way, bits in ((layers, 7), (sub_blocks, 10), (at_1, 0)):
        assert needs(config, way, FULL_IN_BF16).bits == pytest.approx(bits, abs=0.01), way


@pytest.mark.slow
def test_weights_gradients_and_optimizer():
    """For a shape whose parameters can be counted by hand."""
    own = needs(LLAMA, ways()[1], FULL_IN_BF16)
    layer = 64 * (64 + 16 * 2 + 16 * 2 + 64) + 3 * 64 * 192 + 2 * 64
    parameters = 4000 * 64 + DEPTH * layer + 64
    assert own.gradients == 2 * parameters and own.optimizer == 4 * parameters
    assert own.weights == pytest.approx(2 * parameters, rel=0.001)  # and the frequencies of the positions
    adapters = needs(LLAMA, ways()[1], LORA)
    widths = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 192) * 3
    assert adapters.gradients == 4 * 16 * DEPTH * widths and adapters.head_gradient == 0


def test_the_longest_text():
    own = needs(LLAMA, ways()[1], FULL_IN_BF16)
    cap = 2**30
    for chunked in (True, False):
        longest = own.longest(cap, chunked)
        assert own.peak(longest, chunked) <= cap < own.peak(longest + 1024, chunked)
    assert own.longest(cap, True) > own.longest(cap, False) and own.longest(1000, True) == 0


@pytest.mark.slow
def test_the_command(run, tmp_path):
    LLAMA.save_pretrained(tmp_path)
    said = run("bench", tmp_path, "--plan", "--max-length", 3000, "--beta", 0.25, "--memory-cap", "1GB")
    assert "6 layers, 64 wide" in said and "GB at 3000" in said and "longest in 1 GB" in said
    assert "reversible layers, beta 1/4" in said and "LoRA of rank 16" in said


@pytest.mark.parametrize(
    "options, message, status",
    [
        (["--rounds", "3"], "leave out --rounds", 2),
        (["--beta", "0.3"], "beta=0.3 is not", 1),
        (["--beta", "0"], "beta=0 is plain training", 1),
        (["--memory-cap", "much"], "--memory-cap much", 1),
    ],
)
def test_what_a_plan_does_not_take(options, message, status, run, tmp_path):
    LLAMA.save_pretrained(tmp_path)
    assert message in run("bench", tmp_path, "--plan", *options, status=status)


def test_models_that_are_not_planned(run, src, tmp_path):
    assert "model_type 'roberta': --plan knows llama" in run("bench", src, "--plan", status=1)
    MistralConfig(**SMALL, sliding_window=16).save_pretrained(tmp_path / "mistral")
    assert "has a sliding window of 16 tokens" in run("bench", tmp_path / "mistral", "--plan", status=1)


def test_the_page_shows_what_was_computed():
    """The page passes the check, and a changed page fails."""
    text, found = page.PAGE.read_text(), page.read()
    assert filled(text, page.lines_of) == text
    assert {place["what"] for place in TABLE.finditer(text)} == PUBLISHED.keys() == found.keys()
    assert filled(text.replace("| checkpointing |", "| checked |"), page.lines_of) == text


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
def test_what_was_computed_is_what_is_computed(model):
    """For one kind of training, computing again gives the committed results."""
    chosen = ways()[1:]
    own = {way.name: needs(configuration(model), way, FULL_IN_BF16) for way in chosen}
    written = {name: page.as_needs(page.read()[model][FULL_IN_BF16.name][name]) for name in own}
    assert table(own, TOKENS, page.CAP) == table(written, TOKENS, page.CAP)
    assert explained(own, TOKENS) == explained(written, TOKENS)
