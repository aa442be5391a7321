"""Stock checkpoints in and out; at beta = 0 the stock model, bit for bit; bad input refused."""

import json

import pytest
import torch
import transformers
from families import FAMILIES, assert_same, cast, gradients, linears, rebuilt_steps, step
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

import hf_pareprop as hp
from hf_pareprop.tools.families import STOCK_CLASSES

REVERSIBLE = {name: architecture.heads[head] for name, (architecture, head) in STOCK_CLASSES.items()}
OWN = {
    name: family
    for name, (a, _) in STOCK_CLASSES.items()
    for family in FAMILIES.values()
    if a is family.row.architectures[0]
}
"""From the name of a stock class to its family, of stock models that load straight in."""
HEADS = sorted(OWN)


def stock(head, dropout=0.0, **fields):
    torch.manual_seed(0)
    if "Question" in head:
        fields["num_labels"] = 2
    cls, family = getattr(transformers, head), OWN[head]
    return cls(cls.config_class(**{**family.config_fields(3, dropout), **fields})).eval()


def batch_for(head, labels=True):
    batch = OWN[head].batch()
    answers = batch.pop("labels")
    if "MaskedImage" in head:
        patches = (batch["pixel_values"].shape[-1] // OWN[head].row.small_fields["patch_size"]) ** 2
        batch["bool_masked_pos"] = torch.arange(3 * patches).reshape(3, patches) % 2 == 0
    if "Choice" in head:
        batch = {k: torch.stack([v, v.flip(0)], dim=1) for k, v in batch.items()}
        answers = torch.tensor([0, 1, 1])
    if not labels or head.endswith("Model") or "MaskedImage" in head:
        return batch
    if "Question" in head:
        return {**batch, "start_positions": answers, "end_positions": answers + 2}
    if "Token" in head or "MaskedLM" in head:
        answers = batch["input_ids"] % 3
    return {**batch, "labels": answers}


def assert_outputs_equal(a, b):
    assert type(a) is type(b) or type(a).__module__.endswith("modeling_swin")  # a class of that module alone
    names = [name for name in a if name != "cross_attentions"]  # stock RoBERTa reports an empty tuple of them
    assert names == list(b)
    for name in names:
        if isinstance(a[name], tuple):
            assert len(a[name]) == len(b[name]), name
            assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True)), name
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_load_straight_in(head, tmp_path):
    stock(head).save_pretrained(tmp_path)
    # Loaded too: tensors mapped from a file are aligned differently, which picks other kernels for tiny matrices.
    model = getattr(transformers, head).from_pretrained(tmp_path)
    converted, info = REVERSIBLE[head].from_pretrained(tmp_path, beta=0.0, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not converted.training
    assert_outputs_equal(model(**batch_for(head)), converted(**batch_for(head)))
    assert REVERSIBLE[head].from_pretrained(tmp_path).config.beta == 1 / 32
    fields = dict(beta=0.25, grid_bits=12, backward_engine="reprop", memory_budget="1 layer")
    config = REVERSIBLE[head].from_pretrained(tmp_path, **fields).config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_beta_zero_is_the_stock_model(head, attention, precision):
    """Outputs in evaluation and, with dropout, in training; hidden states and attentions; gradients."""
    model = stock(head, dropout=0.1, attn_implementation=attention)
    converted = hp.to_reversible(model, beta=0)
    batch = batch_for(head, labels=precision != "bf16")  # stock RoBERTa computes the loss itself in bf16, we in fp32
    if precision == "bf16":
        model, converted, batch = model.bfloat16(), converted.bfloat16(), cast(batch, torch.bfloat16)
    asked = dict(output_hidden_states=True, output_attentions=attention == "eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert_outputs_equal(model(**batch, **asked), converted(**batch, **asked))
        for m in (model.train(), converted.train()):
            torch.manual_seed(5)
            m.outputs = m(**batch)
    assert_outputs_equal(model.outputs, converted.outputs)
    for m in (model, converted):
        first = m.outputs[0]
        sum(t.float().sum() for t in (first if isinstance(first, tuple) else (first,))).backward()
    found, expected = gradients(converted), gradients(model)
    assert len(found) == len(expected)
    assert all(any(torch.equal(g, e) for e in expected.values()) for g in found.values())


@pytest.mark.parametrize("head", HEADS)
def test_there_and_back_is_the_identity(head):
    model = stock(head)
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    rng = torch.get_rng_state()
    converted = hp.to_reversible(model, beta=0.5)
    back = hp.to_stock(converted)
    assert torch.equal(rng, torch.get_rng_state())
    assert type(back) is type(model)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    assert sum(not p.requires_grad for p in converted.parameters()) == 1
    assert not back.training and not converted.training
    differences = {"architectures", "dtype", "transformers_version"}
    a, b = ({k: v for k, v in m.config.to_dict().items() if k not in differences} for m in (model, back))
    assert a == b


def test_the_default_beta_is_announced(tmp_path, caplog):
    """Loading a stock checkpoint changes its outputs, so there is a warning, unless beta was given."""
    stock("ViTModel").save_pretrained(tmp_path)
    hp.RevViTModel.from_pretrained(tmp_path, beta=0.5)
    assert "beta" not in caplog.text
    hp.RevViTModel.from_pretrained(tmp_path)
    assert f"{tmp_path} is a stock checkpoint and becomes reversible at beta=0.03125" in caplog.text


def test_tied_weights_stay_tied():
    converted = hp.to_reversible(stock("RobertaForMaskedLM"))
    assert converted.lm_head.decoder.weight is converted.roberta.embeddings.word_embeddings.weight
    assert converted.lm_head.decoder.bias is converted.lm_head.bias


def test_conversion_leaves_the_source_alone(family):
    model = family.build_stock()
    converted = hp.to_reversible(model, beta=0.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert "beta" not in model.config.to_dict()


def test_conversion_keeps_dtype_and_mode(family):
    model = family.build_stock().to(torch.bfloat16).train()
    converted = hp.to_reversible(model)
    assert converted.dtype == torch.bfloat16 and converted.training
    assert converted.config.num_labels == 3
    assert converted.config._attn_implementation == model.config._attn_implementation


def test_conversion_from_a_directory(family, tmp_path):
    family.build_stock().save_pretrained(tmp_path)
    converted = hp.to_reversible(tmp_path, beta=[0.5, 0, 1])
    assert type(converted) is family.model
    assert converted.config.beta == [0.5, 0, 1]


def test_a_new_head_on_a_base_checkpoint(tmp_path):
    stock("RobertaModel").save_pretrained(tmp_path)
    model, info = hp.RevRobertaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert model.config.num_labels == 5
    assert {k.split(".")[0] for k in info["missing_keys"]} == {"classifier"}
    assert {k.split(".")[0] for k in info["unexpected_keys"]} <= {"pooler", "roberta"}
    assert all("pooler" in k for k in info["unexpected_keys"])


def test_a_base_model_from_a_checkpoint_with_a_head(tmp_path):
    model = stock("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    converted = hp.RevViTModel.from_pretrained(tmp_path, beta=0, add_pooling_layer=False)
    batch = batch_for("ViTModel")
    assert torch.equal(converted(**batch)[0], model.vit(**batch)[0])


@pytest.mark.parametrize("asked", [dict(return_dict=False), dict(output_hidden_states=True), {}])
@pytest.mark.parametrize("head", ["RobertaModel", "ViTModel"])
def test_forms_of_output(head, asked):
    model, batch = stock(head), batch_for(head)
    expected, found = model(**batch, **asked), hp.to_reversible(model, beta=0)(**batch, **asked)
    if asked.get("return_dict") is False:
        assert isinstance(found, tuple) and len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    else:
        assert_outputs_equal(expected, found)


@pytest.mark.parametrize(
    "inputs",
    [
        dict(inputs_embeds=torch.randn(2, 9, 32)),
        dict(input_ids=torch.randint(4, 61, (2, 9)), position_ids=torch.arange(18).reshape(2, 9) + 2),
        dict(input_ids=torch.randint(4, 61, (2, 9)), token_type_ids=torch.arange(18).reshape(2, 9) % 2),
        dict(input_ids=torch.randint(4, 61, (2, 9)), attention_mask=torch.ones(2, 1, 9, 9).tril().bool()),
        dict(input_ids=torch.cat([torch.randint(4, 61, (2, 20)), torch.ones(2, 10, dtype=torch.long)], 1)),
    ],
    ids=["inputs_embeds", "position_ids", "token_type_ids", "4-d mask", "padding past the positions"],
)
@pytest.mark.parametrize("chunk", [0, 3])
def test_text_inputs(inputs, chunk):
    if chunk and next(iter(inputs.values())).shape[1] % chunk:
        chunk = 10
    model = stock("RobertaModel", chunk_size_feed_forward=chunk)
    expected, found = model(**inputs), hp.to_reversible(model, beta=0)(**inputs)
    assert_outputs_equal(expected, found)


def test_chunks_need_not_divide_the_sequence():
    model = hp.to_reversible(stock("RobertaModel", chunk_size_feed_forward=4))
    ids = torch.randint(4, 61, (2, 9))
    whole = hp.to_reversible(stock("RobertaModel"))
    torch.testing.assert_close(model(ids)[0], whole(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [12, 16, 24])
def test_interpolated_positions(size):
    model = stock("ViTForImageClassification")
    batch = dict(pixel_values=torch.randn(2, 3, size, size), interpolate_pos_encoding=True)
    assert_outputs_equal(model(**batch), hp.to_reversible(model, beta=0)(**batch))


def test_images_that_are_not_square():
    fields = {**FAMILIES["vit"].config_fields(2), "image_size": [8, 12], "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**fields)).eval()
    batch = dict(pixel_values=torch.randn(2, 3, 8, 12))
    assert_outputs_equal(model(**batch), hp.to_reversible(model, beta=0)(**batch))


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_problem_types(family, problem):
    model = family.build_stock(problem_type=problem).eval()
    batch = family.batch()
    if problem != "single_label_classification":
        batch["labels"] = torch.rand(3, 3)
    assert_outputs_equal(model(**batch), hp.to_reversible(model, beta=0)(**batch))


ENGINES = ["reprop", "pareprop"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 256, [0.5, 0, 1.0], [0, 1.0, 1.0]])
def test_hidden_states_in_training(family, beta, engine, rebuilt):
    """Every layer is rebuilt. The hidden states and their gradients are those of the `autograd` engine."""
    model, batch = family.build(3, 0.1, beta=beta), family.batch()
    plain, found = step(model, batch, "autograd"), []
    for name in ("autograd", engine):
        model.set_backward_engine(name)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        outputs = model(**batch, output_hidden_states=True)
        assert torch.equal(outputs.loss.detach(), plain[0])
        assert len(outputs.hidden_states) == 1 + model.config.num_hidden_layers  # or stages, of a Swin
        (outputs.loss + sum(h.float().square().mean() for h in outputs.hidden_states)).backward()
        found.append((outputs.hidden_states, gradients(model)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert_same(found[0][1], found[1][1])
    assert sorted(rebuilt) == rebuilt_steps(model)
    lowest = linears(model.encoder_layers[0])[-1].weight
    lower = next(n for n, p in model.named_parameters() if p is lowest)
    assert not torch.equal(plain[1][lower], found[0][1][lower])


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 256])
def test_a_conventional_layer_reads_the_merged_hidden_state(family, beta):
    """It is the stock layer, applied to the hidden state that the reversible layer before it returned."""
    model = family.build(4, beta=[0, beta, 0, beta]).eval()
    batch = {name: tensor for name, tensor in family.batch().items() if name in ("input_ids", "pixel_values")}
    if family.row.staged:
        pytest.skip("its stock layers take more than a hidden state")
    stock = hp.to_stock(model).base_model
    layers = next(module for module in stock.modules() if isinstance(module, torch.nn.ModuleList))
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        for i in (0, 2):
            result = layers[i](states[i])
            assert torch.equal(result[0] if isinstance(result, tuple) else result, states[i + 1])


@pytest.fixture
def told(caplog):
    """Records what is logged from here on, including messages that are logged only once and were logged before."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    logging.info_once.cache_clear(), logging.warning_once.cache_clear()
    with caplog.at_level("INFO", "transformers"):
        yield caplog
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_maps_take_stored_activations(family, engine, rebuilt, told):
    """Attention maps are made inside layers, so the engine falls back to `autograd`, and says so."""
    model, batch = family.build(3, 0.1, beta=0.5, attn_implementation="eager"), family.batch()
    reference = step(model, batch, "autograd")
    again = step(model, {**batch, "output_attentions": True}, engine)
    assert torch.equal(reference[0], again[0]) and not rebuilt
    assert_same(reference[1], again[1])
    assert f"backward_engine={engine!r} falls back to 'autograd'" in told.text
    assert model.config.backward_engine == engine


@pytest.mark.parametrize("engine", ["autograd", *ENGINES])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("beta", [0.5, [0.5, 0, 1.0], 0])
def test_activation_checkpointing(family, beta, reentrant, engine, rebuilt, told):
    """Conventional layers run once more in the backward pass. Reversible layers are rebuilt as always, and a message says so."""
    model, batch = family.build(3, 0.1, beta=beta), family.batch()
    calls = [0, 0, 0]
    for i, layer in enumerate(model.encoder_layers):
        dense = linears(layer)[-1]

        def counted(x, i=i, original=dense.forward):
            calls[i] += 1
            return original(x)

        dense.forward = counted
    reference = step(model, batch, engine)
    plans, times = model.base_model.layer_plans, 1 if engine == "autograd" else 2  # that a rebuilt layer runs
    assert calls == [1 if plan.stores_activations else times for plan in plans]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls[:] = [0, 0, 0]
    rebuilt.clear()
    found = step(model, batch, engine)
    assert torch.equal(reference[0], found[0])
    assert_same(reference[1], found[1])
    assert calls == [times if plan.reversible else 2 for plan in plans]
    assert sorted(rebuilt) == ([] if engine == "autograd" else rebuilt_steps(model))
    said = "activation checkpointing does nothing to reversible layers" in told.text
    assert said == (any(plan.reversible for plan in plans) and engine != "autograd")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("beta", [1.0, 1 / 32, [0.5, 0, 1.0]])
def test_a_mask_that_needs_a_gradient_gets_one(beta, attention, engine, rebuilt):
    """Every layer is rebuilt all the same."""
    family = FAMILIES["roberta"]
    model, batch = family.build(3, 0.1, beta=beta, attn_implementation=attention), family.batch()
    found = []
    for name in ("autograd", engine):
        bias = torch.linspace(-2, 2, 3 * 11 * 11).view(3, 1, 11, 11).expand(3, 4, 11, 11).clone().requires_grad_()
        found.append({**step(model, {**batch, "attention_mask": bias}, name)[1], "mask": bias.grad})
    assert found[0]["mask"].abs().sum() > 0
    assert_same(*found)
    assert sorted(rebuilt) == rebuilt_steps(model)


# --- bad input


def test_an_unsupported_architecture(tmp_path, family):
    transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'distilbert'"):
        family.model.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DistilBertModel has no reversible twin"):
        hp.to_reversible(tmp_path)


def test_unsupported_stock_models():
    with pytest.raises(ValueError, match="has no reversible twin"):
        hp.to_reversible(
            transformers.RobertaForCausalLM(
                transformers.RobertaConfig(**FAMILIES["roberta"].config_fields(3), is_decoder=True)
            )
        )
    with pytest.raises(ValueError, match="is_decoder=True"):
        hp.RevRobertaConfig(is_decoder=True)
    with pytest.raises(ValueError, match="not a reversible model"):
        hp.to_stock(stock("ViTModel"))
    with pytest.raises(TypeError, match="no field 'betta'"):
        hp.to_reversible(stock("ViTModel"), betta=1)
    with pytest.raises(ValueError, match="Adapters have to be merged"):
        model = stock("ViTModel")
        model.extra = torch.nn.Linear(2, 2)
        hp.to_reversible(model)


def test_a_stock_configuration(family):
    with pytest.raises(ValueError, match="use Rev"):
        family.model(family.stock_config(**family.config_fields(1, 0.0)))


@pytest.mark.parametrize("beta", [0.3, [0.5], "half", -1])
def test_a_bad_beta(family, beta, tmp_path):
    with pytest.raises(Exception, match="beta"):
        family.build(3, beta=beta)
    with pytest.raises(Exception, match="beta"):
        hp.to_reversible(family.build_stock(), beta=beta)
    family.build_stock().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="beta"):
        family.model.from_pretrained(tmp_path, beta=beta)


def test_a_checkpoint_with_a_bad_beta(family, tmp_path):
    family.build(3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "beta": [0.5, 0.5]}))
    with pytest.raises(ValueError, match="2 entries .* 3 layers"):
        family.model.from_pretrained(tmp_path)


def test_a_wrong_image_size():
    model = FAMILIES["vit"].build(1)
    with pytest.raises(ValueError, match=r"16x12, the model was built for 12x12.*interpolate_pos_encoding=True"):
        model(pixel_values=torch.randn(1, 3, 16, 12))
    with pytest.raises(ValueError, match="1 channels, the model was built for 3"):
        model(pixel_values=torch.randn(1, 1, 12, 12))
    with pytest.raises(ValueError, match="pixel_values"):
        model()
    with pytest.raises(ValueError, match="mask token"):
        model.vit(torch.randn(1, 3, 12, 12), bool_masked_pos=torch.ones(1, 9, dtype=torch.bool))


def test_a_sequence_longer_than_the_positions():
    model = FAMILIES["roberta"].build(1)
    with pytest.raises(ValueError, match="more than 22 tokens .* 30 long"):
        model(input_ids=torch.full((1, 30), 5))
    with pytest.raises(ValueError, match="more than 22 tokens"):
        model(inputs_embeds=torch.randn(1, 30, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_heads_that_do_not_divide_the_width(family):
    row = family.row
    shape = row.small._replace(heads=5, depths=(1,))
    with pytest.raises(ValueError, match=f"a width of {shape.width} (is not a multiple of|and) 5 (attention )?heads"):
        family.model(row.config(shape, **row.small_fields))


@pytest.mark.parametrize("name", ["past_key_values", "encoder_hidden_states", "encoder_attention_mask"])
def test_inputs_of_decoders(name):
    family = FAMILIES["roberta"]
    with pytest.raises(ValueError, match=f"{name}: the model is an encoder"):
        family.build(1)(**family.batch(), **{name: torch.zeros(3, 11, 16)})
    family.build(1)(**family.batch(), **{name: None})


@pytest.mark.parametrize(
    "wrap, way",
    [
        (lambda model: torch.compile(model), "is compiled: give the model in it, `model._orig_mod`"),
        (lambda model: torch.optim.swa_utils.AveragedModel(model), "averages a model.*`model.module`"),
        (lambda model: torch.nn.DataParallel(model), "spreads a model over devices.*`model.module`"),
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["query"])),
            "adds an adapter to a model.*merge_and_unload",
        ),
    ],
)
def test_models_in_other_modules(wrap, way):
    family = FAMILIES["roberta"]
    for function, model in ((hp.to_stock, family.build(1)), (hp.to_reversible, family.build_stock(1))):
        with pytest.raises(TypeError, match=way):
            function(wrap(model))
    with pytest.raises(TypeError, match="a dict is no model"):
        hp.to_reversible({})
    with pytest.raises(ValueError, match="is not a reversible model: convert it"):
        hp.verify(family.build_stock(1), family.batch())
