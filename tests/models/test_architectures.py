"""Every stock architecture and head that can be converted: compare with the stock model at beta = 0, and convert back."""

import pytest
import torch
import transformers
from families import FAMILIES

import hf_pareprop as hp
from hf_pareprop.tools.families import ARCHITECTURES, STOCK_CLASSES

FAMILY_OF = {a.model_type: family for family in FAMILIES.values() for a in family.row.architectures}
NEW = sorted(name for name, (a, _) in STOCK_CLASSES.items() if a is not FAMILY_OF[a.model_type].row.architectures[0])
"""test_stock.py has the others."""


def stock(name, **fields):
    family = FAMILY_OF[STOCK_CLASSES[name][0].model_type]
    fields = {**family.config_fields(3, 0.1), **fields}
    if "Question" in name:
        fields["num_labels"] = 2
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial biases and tokens are zeros, which hide a wrong name
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.tie_weights()
    return model


def batch_for(name):
    batch = FAMILY_OF[STOCK_CLASSES[name][0].model_type].batch()
    batch.pop("labels")
    if "MaskedImage" in name:
        batch["bool_masked_pos"] = torch.arange(27).reshape(3, 9) % 2 == 0
    if "Bert" in name or "Roberta" in name:
        batch["input_ids"][batch["attention_mask"] == 0] = 0 if name.startswith("Bert") else 1
        batch["token_type_ids"] = torch.arange(33).reshape(3, 11) % 2
    if "Choice" in name:
        batch = {k: torch.stack([v, v.flip(0)], dim=1) for k, v in batch.items()}
    return batch


def assert_same_function(model, converted, batch):
    """Assert bit-equal outputs, except at padding, which has positions in BERT."""
    with torch.no_grad():
        expected, found = model(**batch), converted(**batch)
    assert list(expected) == list(found)
    mask = batch.get("attention_mask")
    for name in expected:
        a, b = expected[name], found[name]
        if mask is not None and a.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", NEW)
def test_beta_zero_is_the_stock_model(name, tmp_path):
    model = stock(name)
    model.save_pretrained(tmp_path)
    # Tensors mapped from a file are aligned differently, which picks other kernels for tiny matrices: like with like.
    mapped = STOCK_CLASSES[name][0].model_type in ("xlm-roberta", "camembert")
    loaded = type(model).from_pretrained(tmp_path) if mapped else model
    for source, reference in ((model, model), (str(tmp_path), loaded)):
        converted = hp.to_reversible(source, beta=0)
        assert converted.config.beta == 0
        assert_same_function(reference, converted, batch_for(name))
    assert hp.to_reversible(model).config.beta == 1 / 32


@pytest.mark.parametrize("name", NEW)
def test_there_and_back_is_the_identity(name, tmp_path):
    model = stock(name)
    converted = hp.to_reversible(model, beta=0.25)
    converted.save_pretrained(tmp_path)
    for reversible in (converted, type(converted).from_pretrained(tmp_path)):
        back = hp.to_stock(reversible)
        assert type(back) is type(model)
        assert back.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())
        fields = [{k: v for k, v in m.config.to_dict().items() if k not in VARYING} for m in (model, back)]
        assert fields[0] == fields[1]


VARYING = {"architectures", "dtype", "transformers_version", "_name_or_path"}


@pytest.mark.parametrize("name", [n for n in NEW if n.startswith(("XLM", "Camembert"))])
def test_the_same_layout_loads_straight_in(name, tmp_path):
    model = stock(name)
    model.save_pretrained(tmp_path)
    architecture, head = STOCK_CLASSES[name]
    converted, info = architecture.heads[head].from_pretrained(tmp_path, beta=0, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_function(type(model).from_pretrained(tmp_path), converted, batch_for(name))
    assert type(hp.to_stock(converted)) is type(model)


@pytest.mark.parametrize("name", ["BertModel", "DeiTModel"])
def test_another_layout_is_converted_first(name, tmp_path):
    model = stock(name)
    model.save_pretrained(tmp_path)
    architecture, head = STOCK_CLASSES[name]
    with pytest.raises(ValueError, match="has to be converted first: use hf_pareprop.to_reversible"):
        architecture.heads[head].from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["BertModel", "DeiTModel"])
def test_a_model_without_a_pooler(name):
    model = type(stock(name))(stock(name).config, add_pooling_layer=False).eval()
    converted = hp.to_reversible(model, beta=0)
    assert converted.pooler is None
    assert_same_function(model, converted, batch_for(name))
    assert hp.to_stock(converted).pooler is None


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DeiTForImageClassification"])
def test_a_converted_model_is_rebuilt_bit_for_bit(name, beta):
    converted = hp.to_reversible(stock(name), beta=beta).train()
    labels = torch.tensor([0, 2, 1])
    report = hp.verify(converted, {**batch_for(name), "labels": labels})
    assert report.exact and report.gradients_equal


@pytest.mark.parametrize("size", [12, 16])
def test_interpolated_positions_with_a_distillation_token(size):
    model = stock("DeiTForImageClassification")
    batch = dict(pixel_values=torch.randn(2, 3, size, size), interpolate_pos_encoding=True)
    assert_same_function(model, hp.to_reversible(model, beta=0), batch)


def test_a_class_of_ones_own():
    class Mine(hp.RevRobertaModel):
        pass

    assert (
        type(hp.to_stock(Mine(hp.RevRobertaConfig(**FAMILIES["roberta"].config_fields(1)))))
        is transformers.RobertaModel
    )


def test_what_has_no_twin():
    with pytest.raises(ValueError, match="hidden_act='relu'.*convert BertModel"):
        hp.to_reversible(stock("BertForMaskedLM", hidden_act="relu"))
    with pytest.raises(ValueError, match="pad_token_id is None"):
        hp.to_reversible(stock("BertModel", pad_token_id=None))
    with pytest.raises(ValueError, match="DeiTForImageClassificationWithTeacher has no reversible twin"):
        hp.to_reversible(transformers.DeiTForImageClassificationWithTeacher(stock("DeiTModel").config))
    with pytest.raises(ValueError, match="stock_model_type='gpt2' is not None or one of vit, deit"):
        hp.RevViTConfig(stock_model_type="gpt2")


def test_the_readme_lists_what_converts():
    import pathlib

    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    for model_type, architecture in ARCHITECTURES.items():
        library = architecture.library
        assert (f"{library.name}'s `{model_type}" if library else f"`{model_type}`") in readme


OTHER_ORDER = {"bert", "xlm-roberta", "camembert"}
"""Models that are converted to RoBERTa's form. Their stock classes have the position table or the head at another place."""


@pytest.mark.parametrize("name", [n for n, (a, _) in STOCK_CLASSES.items() if a.model_type not in OTHER_ORDER])
def test_the_order_of_parameters(name):
    """It is that of the stock model, so that the state of an optimizer fits both."""
    model = stock(name)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i)
    found = [parameter.flatten()[0].item() for parameter in hp.to_reversible(model).parameters()]
    assert found == list(range(len(found)))
