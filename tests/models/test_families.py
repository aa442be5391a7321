"""A family is a configuration file, a modeling file and one row: everything else takes it from the row."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES

import hf_pareprop as hp
from hf_pareprop.tools import families
from hf_pareprop.tools.accounting import predict
from hf_pareprop.tools.cards import model_card
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Subject, Twins, reversible_contenders
from hf_pareprop.tools.families import ARCHITECTURES, STOCK_CLASSES
from hf_pareprop.tools.inputs import random_batch, with_targets
from hf_pareprop.tools.memory import memory_growth
from hf_pareprop.tools.records import layers_in_words, width_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

ABOUT_ONE_MODEL = {
    "studies/conversion_cases.py",
    "examples/cuda_graph.py",
    "examples/finetune_text.py",
}
"""Case studies and examples, which are not for every family."""


def code_of(path: Path) -> str:
    """The code of a file without comments and docstrings, which may use a family as an example."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


CODE = {
    str(path.relative_to(ROOT)): code_of(path)
    for folder in ("hf_pareprop", "benchmarks", "studies", "examples")
    for path in (ROOT / folder).rglob("*.py")
}
CODE |= {f"tests/{name}.py": code_of(ROOT / f"tests/{name}.py") for name in ("conftest", "families")}


def test_the_places_of_a_family(family):
    """A family is named in its two files and in its row, and nowhere else."""
    classes, model_type = family.config.__name__.removesuffix("Config"), family.config.model_type
    own = {f"hf_pareprop/{kind}_{model_type}.py" for kind in ("configuration", "modeling")}
    own |= {"hf_pareprop/tools/families.py"}
    if family.row.architectures[0].library:
        own |= {"hf_pareprop/tools/timm_checkpoint.py"}  # what reads and writes that library's checkpoints
    naming = {path for path, code in CODE.items() if classes in code or model_type in code}
    assert naming - ABOUT_ONE_MODEL == own


def test_the_exceptions_are_needed():
    named = [
        name for f in FAMILIES.values() for name in (f.config.__name__.removesuffix("Config"), f.config.model_type)
    ]
    assert all(any(name in CODE[path] for name in named) for path in ABOUT_ONE_MODEL)


def test_layers_are_counted_by_stages():
    """`num_hidden_layers` of a family with stages is the number of its stages, if it has such a field at all."""
    for path, code in CODE.items():
        if path.startswith(("hf_pareprop/tools", "tests")) or path == "benchmarks/sizes.py":
            assert "num_hidden_layers" not in code, path


def test_public_names(family):
    """All classes of a family except the abstract one are public."""
    prefix = family.config.__name__.removesuffix("Config")
    expected = {name.rpartition(".")[2] for name in family.model.auto_map.values()}
    assert {name for name in hp.__all__ if name.startswith(prefix)} == expected <= set(dir(hp))
    for name in expected:
        assert getattr(hp, name).__name__ == name
    assert len(hp.__all__) == len(set(hp.__all__))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'hf_pareprop' has no attribute 'RevVit'; it has .*RevViTModel"):
        _ = hp.RevVit
    with pytest.raises(ImportError, match="RevVit"):
        from hf_pareprop import RevVit  # noqa: F401
    assert not hasattr(hp, "__wrapped__")


def test_auto_classes_are_registered(family):
    row = family.row
    assert transformers.CONFIG_MAPPING[row.config_class.model_type] is row.config_class
    assert row.auto_classes.keys() == row.base.auto_map.keys() - {"AutoConfig"}
    for auto, cls in row.auto_classes.items():
        with torch.device("meta"):
            config = family.config(**family.config_fields(1))
            assert type(getattr(transformers, auto).from_config(config)) is cls


def test_registering_again():
    hp.register()
    code = (
        "import sys, hf_pareprop; first = hf_pareprop.RevViTModel; "
        "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('hf_pareprop')]; "
        "import hf_pareprop as again; assert again.RevViTModel is not first; "
        "from transformers import AutoModel; "
        "config = again.RevViTConfig(num_hidden_layers=1); assert type(AutoModel.from_config(config)) is again.RevViTModel; "
        "print('TWICE')"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert "TWICE" in result.stdout, result.stderr[-2000:]


def test_heads_have_the_names_of_stock_heads(family):
    for architecture in family.row.architectures:
        for head, cls in architecture.heads.items():
            assert cls.__name__ == family.config.__name__.removesuffix("Config") + head
            if architecture.has_stock_classes:
                assert STOCK_CLASSES[architecture.prefix + head] == (architecture, head)
                assert architecture.stock_class(cls).__name__ == architecture.prefix + head


def test_a_row_fits_its_configuration(family):
    """Every field that a row names exists in the configuration and has the intended effect."""
    row = family.row
    known = family.config().to_dict().keys()
    for shape in [*row.sizes.values(), row.small]:
        fields = {**row.size_fields, **row.small_fields, **row.shape_fields(shape), **row.dropout_fields(0.1)}
        assert fields.keys() <= known | {"num_labels"}
        assert row.config(shape).stage_depths == shape.depths
        assert width_of(row.config(shape)) == shape.width
    for depth in (1, 2, 3, 6):
        config = family.config(**family.config_fields(depth))
        assert sum(config.stage_depths) == depth and len(config.stage_depths) == 1 + (row.staged and depth >= 3)
    assert width_of(family.config(**family.config_fields(2, wider=2))) == 2 * row.small.width


def test_random_inputs(family):
    """A model accepts random inputs, and its head computes a loss from the added targets."""
    model = family.build(2)
    batch = with_targets(random_batch(model, batch_size=1, length=16), model)
    assert "labels" in batch and model(**batch).loss.isfinite()


def test_growth_of_memory(family):
    model = family.build(4, beta=0.5, backward_engine="reprop", scale=1.0)
    growth = memory_growth(model, family.batch())
    assert growth.flat and growth.stored > 10_000


def test_layers_in_words(family):
    config = family.config(**family.config_fields(6))
    assert layers_in_words(config) == ("6 (2 + 4)" if family.row.staged else "6")
    card = model_card(family.model(config), model_name="m", base_model="b")
    assert f"| layers, width | {layers_in_words(config)}, {family.row.small.width} |" in str(card)


# A family that transformers has no stock classes for


@pytest.fixture
def without_stock(family, monkeypatch):
    """A row as if transformers had no stock models for the family."""
    name = family.row.architectures[0].model_type
    monkeypatch.setitem(ARCHITECTURES, name, replace(ARCHITECTURES[name], prefix=None))
    return replace(family, row=replace(family.row, architectures=(ARCHITECTURES[name],)))


def test_without_stock_classes_there_is_no_way_to_one(without_stock):
    (architecture,) = without_stock.row.architectures
    if architecture.library is None:
        with pytest.raises(ValueError, match="has no stock twin: transformers has no models of type"):
            hp.to_stock(without_stock.build(1))
    with pytest.raises(pytest.skip.Exception, match="no stock classes"):
        without_stock.build_stock(1)


def test_plain_training_is_then_the_reversible_class_at_beta_zero(without_stock):
    subject, batch = without_stock.subject(2), without_stock.batch()
    for contender in (STOCK, CHECKPOINTING):
        model = subject.build(contender)
        assert type(model) is without_stock.model
        assert (model.config.beta, model.config.backward_engine) == (0, "autograd")
        assert all(layer.gradient_checkpointing == contender.checkpointing for layer in model.encoder_layers)
    twins = Twins(subject, CPU)
    shared = {p.data_ptr() for p in twins.reversible.parameters()}
    for contender in (STOCK, CHECKPOINTING, *reversible_contenders([0.5])):
        before = [p.detach().clone() for p in twins.plain.parameters()]
        twins.step(contender, batch, False)
        assert any(not torch.equal(a, b) for a, b in zip(before, twins.plain.parameters(), strict=True))
        assert twins.plain.config.beta == 0
    assert {p.data_ptr() for p in twins.plain.parameters()} == shared


@pytest.mark.slow
def test_it_needs_the_memory_of_a_stock_model(without_stock, monkeypatch):
    """According to the accounting; with checkpointing it needs less."""
    subject = without_stock.subject(4, wider=3, mlp_ratio=4)
    batch = {n: torch.cat([t] * 16) for n, t in without_stock.batch().items()}
    plain, checkpointed = (predict(subject, way, batch, CPU, False) for way in (STOCK, CHECKPOINTING))
    assert checkpointed.graphs < plain.graphs / 2
    row = families.FAMILIES[without_stock.row.name]
    if row.architectures[0].has_stock_classes:
        monkeypatch.setitem(ARCHITECTURES, row.architectures[0].model_type, row.architectures[0])
        stock = predict(Subject(subject.model_class, subject.config), STOCK, batch, CPU, False)
        assert plain.graphs == pytest.approx(stock.graphs, rel=0.1)
