"""Options are checked where they are given, and errors say which values are allowed."""

import logging
from functools import cache

import pytest
import torch
import transformers
from families import FAMILIES, assert_same, linears, step

import hf_pareprop as hp
from hf_pareprop.plan import CONVERTED_BETA, parse_budget, parse_size

BUDGETS = [
    None,
    "gradients",
    "auto",
    "4GB",
    "1.5 GB",
    "300MB",
    "20 kb",
    "2GiB",
    "80%",
    "0%",
    "12.5 %",
    "4 layers",
    "1 layer",
]
NO_BUDGETS = [
    "gradient",
    "",
    "GB",
    "4",
    "4 GBs",
    "101%",
    "-1GB",
    "many layers",
    "4.5 layers",
    1,
    0.5,
    4096,
    True,
    ["auto"],
]

WRONG = [
    ("memory_budget", "gradient"),
    ("memory_budget", 1),
    ("beta", 0.3),
    ("beta", [1.0]),
    ("backward_engine", "parepropp"),
    ("grid_bits", 0),
    ("grid_bits", 23),
    ("stock_model_type", "gpt2"),
    ("steps", "block"),
    ("steps", 1),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Maps the name of a family to the folder of a stock checkpoint."""

    @cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        FAMILIES[name].build_stock(2).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("text", BUDGETS)
def test_budgets(text):
    parse_budget(text)


@pytest.mark.parametrize("text", NO_BUDGETS, ids=repr)
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="memory_budget=.*'gradients', 'auto', an amount such as '4GB'"):
        parse_budget(text)


def test_what_budgets_say():
    assert parse_budget("1.5 GB").bytes == 3 * 2**29 == parse_size("1536MB") == parse_size("1.5GiB")
    assert parse_budget("80%").share == 0.8
    assert parse_budget("12 layers").layers == 12
    assert parse_budget("gradients").gradients
    assert parse_budget("auto").share == "auto"


@pytest.mark.parametrize("field, value", WRONG)
@pytest.mark.parametrize("name", FAMILIES)
def test_where_a_wrong_option_is_refused(name, stock, field, value):
    """In the configuration, in `from_pretrained`, by the setter, and when a model is made of a changed configuration."""
    family = FAMILIES[name]
    given = {"beta": 0.5, field: value}
    with pytest.raises(ValueError, match=f"{field}=|beta has 1 entries"):
        family.config(**family.config_fields(2, 0.0), **given)
    with pytest.raises(ValueError, match=f"{field}=|beta has 1 entries"):
        family.model.from_pretrained(stock(name), **given)
    with pytest.raises(ValueError, match=f"{field}=|beta has 1 entries"):
        hp.to_reversible(family.build_stock(2), **given)
    config = family.config(**family.config_fields(2, 0.0))
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"{field}=|beta has 1 entries"):
        family.model(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_configuration_is_checked_before_it_is_saved(name, tmp_path):
    model = FAMILIES[name].build(2)
    model.config.memory_budget = "gradient"
    with pytest.raises(ValueError, match="memory_budget='gradient'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field, value", [("anchor_every", 2), ("retained_layers", 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_fields_of_earlier_versions(name, stock, field, value):
    family = FAMILIES[name]
    with pytest.raises(ValueError, match=f"{field}={value}: there is no such field"):
        family.config(**family.config_fields(2, 0.0), **{field: value})
    with pytest.raises(ValueError, match=f"{field}={value}: there is no such field"):
        family.model.from_pretrained(stock(name), **{field: value})


def test_setters_and_the_callback(family):
    model = family.build(2)
    for wrong in ("gradient", 1, 0.5):
        with pytest.raises(ValueError, match="memory_budget="):
            model.set_memory_budget(wrong)
        with pytest.raises(ValueError, match="memory_budget="):
            hp.MemoryBudget(wrong)
    with pytest.raises(ValueError, match="backward_engine="):
        model.set_backward_engine("fast")
    with pytest.raises(ValueError, match="beta="):
        model.set_beta(0.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_default_of_beta_for_weights_of_a_stock_model(name, stock):
    family = FAMILIES[name]
    assert CONVERTED_BETA == 1 / 32
    assert family.model.from_pretrained(stock(name)).config.beta == 1 / 32
    assert hp.to_reversible(family.build_stock(2)).config.beta == 1 / 32
    assert hp.to_reversible(str(stock(name))).config.beta == 1 / 32
    assert family.config(**family.config_fields(2, 0.0)).beta == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_of_beta_for_whole_layers(name, stock):
    family = FAMILIES[name]
    assert family.config(**family.config_fields(2, 0.0), steps="layer").beta == 1
    whole = hp.to_reversible(family.build_stock(2), steps="layer")
    assert (whole.config.steps, whole.config.beta) == ("layer", 1 / 128)
    for again in (hp.to_reversible(whole), hp.to_reversible(str(stock(name)), steps="layer")):
        assert (again.config.steps, again.config.beta) == ("layer", 1 / 128)
    assert hp.to_reversible(whole, steps="sublayer").config.beta == 1 / 32
    loaded = family.model.from_pretrained(stock(name), steps="layer")
    assert (loaded.config.steps, loaded.config.beta) == ("layer", 1 / 128)
    chosen = family.model.from_pretrained(stock(name), steps="layer", beta=0.5)
    assert (chosen.config.steps, chosen.config.beta) == ("layer", 0.5)


def test_no_grid_needs_the_autograd_engine(family):
    model = family.build(2, beta=0.5, grid_bits=None)
    with pytest.raises(RuntimeError, match="grid_bits=None leaves states floats.*set_backward_engine"):
        model(**family.batch())
    model.set_backward_engine("autograd")
    model(**family.batch()).loss.backward()
    with torch.no_grad():
        model.set_backward_engine("pareprop")
        model(**family.batch())


@pytest.mark.parametrize("beta, conventional", [(0.5, 0), (0, 3), ([0.5, 0, 1], 1)], ids=str)
def test_gradient_checkpointing(family, beta, conventional, caplog):
    """It does nothing to reversible layers. Conventional layers use it, and the gradients are the same."""
    model, batch = family.build(3, 0.1, beta=beta), family.batch()
    reference = step(model, batch, "reprop")[1]
    runs = []
    for layer in model.encoder_layers:
        dense = linears(layer)[-3]
        dense.forward = lambda x, original=dense.forward: runs.append(1) or original(x)
    step(model, batch, "reprop")
    without = len(runs)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    runs.clear()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_info()
    logging.Logger.info_once.cache_clear()
    try:
        assert_same(reference, step(model, batch, "reprop")[1])
    finally:
        transformers.utils.logging.disable_propagation()
        transformers.utils.logging.set_verbosity_warning()
    assert (without, len(runs)) == (2 * (3 - conventional) + conventional, 6)
    assert ("does nothing to reversible layers" in caplog.text) == (conventional < 3)
