"""Sharding that hides parameters from a rebuilt layer: gradients are right, or the first forward pass is refused."""

import accelerate
import pytest
import torch
from families import FAMILIES, assert_same, gradients, step
from test_distributed import launch

ENGINES = ["reprop", "pareprop"]
STRATEGIES = [
    ("SHARD_GRAD_OP", "reprop"),
    ("FULL_SHARD", "pareprop"),
    pytest.param("SHARD_GRAD_OP", "pareprop", marks=pytest.mark.every_case),
    pytest.param("FULL_SHARD", "reprop", marks=pytest.mark.every_case),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fsdp2_on_parts_of_a_layer(engine):
    """Hooks inside the layer gather the parameters of its parts when it is rebuilt, too.

    RoBERTa passes the parameters of a norm to the next layer, but FSDP2 has sharded them by then.
    """
    said = launch("sharded_worker.py", "finer", engine, "sublayer")
    assert all(f"{name} equal in" in said for name in ("vit", "swin", "mvit")), said
    assert "roberta refused" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, steps",
    [
        ("reprop", "sublayer"),
        ("pareprop", "layer"),
        pytest.param("reprop", "layer", marks=pytest.mark.every_case),
        pytest.param("pareprop", "sublayer", marks=pytest.mark.every_case),
    ],
)
def test_fsdp2_in_mixed_precision(engine, steps):
    """By default it casts the hidden state between layers."""
    said = launch("sharded_worker.py", "mixed", engine, steps)
    assert all(f"{name} equal in" in said for name in FAMILIES), said


@pytest.mark.slow
@pytest.mark.parametrize("strategy, engine", STRATEGIES)
def test_fsdp1_with_whole_layers_as_steps(strategy, engine):
    said = launch("sharded_worker.py", strategy, engine, "layer")
    assert all(f"{name} equal in" in said for name, family in FAMILIES.items() if not family.row.staged), said


@pytest.mark.slow
@pytest.mark.parametrize("strategy, engine", STRATEGIES)
def test_fsdp1_with_sub_blocks_as_steps(strategy, engine):
    """RoBERTa passes the parameters of a norm to the next layer."""
    said = launch("sharded_worker.py", strategy, engine, "sublayer")
    assert "vit equal in" in said and "roberta equal in" in said


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["layer", "sublayer"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, steps):
    """ZeRO-3 removes parameters when a module ends. RoBERTa's layers notice that if their steps are sub-blocks."""
    pytest.importorskip("deepspeed", exc_type=ImportError)
    said = launch("deepspeed_worker.py", stage, steps)
    assert f"vit: reprop and pareprop equal with ZeRO-{stage}" in said
    if stage == 3 and steps == "sublayer":
        assert "roberta refused: the LayerNorm that ends a layer" in said and "steps='layer'" in said
    else:
        assert f"roberta: reprop and pareprop equal with ZeRO-{stage}" in said


OFFLOADED = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), torch.device("cpu")),
}


@pytest.mark.parametrize("steps", ["layer", "sublayer"])
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloading_of_accelerate(family, how, steps, tmp_path):
    """It is for inference: even the stock model silently gets no gradients. Here training is refused in all engines."""
    model, batch = family.build(3, beta=0.5, steps=steps).eval(), family.batch()
    with torch.no_grad():
        expected = model(**batch).logits
    OFFLOADED[how](model, tmp_path)
    with torch.no_grad():
        if family.row.name == "roberta" and steps == "sublayer":
            with pytest.raises(RuntimeError, match="applied by the next layer.*steps='layer'"):
                model(**batch)
        else:
            assert torch.equal(model(**batch).logits, expected)
    for engine in ("autograd", "reprop", "pareprop"):
        model.set_backward_engine(engine)
        with pytest.raises(RuntimeError, match="offloading of accelerate.*shard the model with FSDP2"):
            model(**batch)


def test_the_stock_model_gets_no_gradients_where_accelerate_offloads(family):
    """This is why training is refused. If this test fails, training could be allowed."""
    model = family.build_stock(2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    model(**family.batch()).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_beside_offloaded_layers(family):
    """A classifier on a frozen encoder that accelerate offloads."""
    model, batch = family.build(3, beta=0.5, steps="layer"), family.batch()
    model.base_model.requires_grad_(False)
    _, reference, _ = step(model, batch, "autograd")
    accelerate.cpu_offload(model.base_model, torch.device("cpu"))
    for engine in ("autograd", "reprop", "pareprop"):
        model.set_backward_engine(engine)
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        assert_same(reference, gradients(model))


@pytest.mark.slow
def test_stock_layers():
    """Llama, GPT-2 and DINOv2 under DDP, FSDP1, FSDP2 and FSDP2 in mixed precision."""
    assert "24 wrappings equal" in launch("stock_layers_worker.py")
