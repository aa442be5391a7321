"""Adapters of PEFT that were trained on a reversible model, and the beta that they were trained at."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hf_pareprop as hp
from hf_pareprop import adapters

BETA = 0.25


@pytest.fixture
def checkpoint(tmp_path):
    """A stock checkpoint of a text classifier."""
    from test_architectures import stock

    stock("RobertaForSequenceClassification").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reversible(checkpoint, beta):
    return hp.RevRobertaForSequenceClassification.from_pretrained(checkpoint, beta=beta)


def outputs(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 16).reshape(2, 6)).logits


def trained(checkpoint, **fields):
    model = get_peft_model(reversible(checkpoint, BETA), LoraConfig(r=2, target_modules=["query"], **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def test_an_adapter_reloads_onto_a_model_with_the_same_beta(checkpoint, tmp_path):
    model = trained(checkpoint, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(reversible(checkpoint, BETA), tmp_path / "adapter")
    assert torch.equal(outputs(model), outputs(again))
    with pytest.raises(ValueError, match=r"trained at beta=0.25, and the model has beta=0.03125.*beta=0.25\)"):
        PeftModel.from_pretrained(reversible(checkpoint, 1 / 32), tmp_path / "adapter")


def test_an_adapter_remembers_what_was_coupled(checkpoint, tmp_path):
    """At the same beta a model with whole layers as steps is another model."""
    whole = hp.RevRobertaForSequenceClassification.from_pretrained(checkpoint, beta=BETA, steps="layer")
    model = get_peft_model(whole, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained at beta=0.25, steps='layer', and the model has beta=0.25: load it"):
        PeftModel.from_pretrained(reversible(checkpoint, BETA), tmp_path / "adapter")
    again = hp.RevRobertaForSequenceClassification.from_pretrained(checkpoint, beta=BETA, steps="layer")
    PeftModel.from_pretrained(again, tmp_path / "adapter")


def test_adapters_of_transformers(checkpoint, tmp_path):
    """`add_adapter`, and `save_pretrained` of the model, which then saves the adapter."""
    pytest.importorskip("peft", minversion="0.22", reason="transformers takes no older one")
    model = reversible(checkpoint, BETA)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    again = reversible(checkpoint, BETA)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(model), outputs(again))
    with pytest.raises(ValueError, match="trained at beta=0.25"):
        reversible(checkpoint, 1.0).load_adapter(str(tmp_path / "adapter"))


def test_beta_is_changed_in_training(checkpoint, tmp_path):
    """The last beta is saved. A model may also be changed after loading."""
    model = trained(checkpoint, task_type="SEQ_CLS")
    model.get_base_model().set_beta(0.5)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(reversible(checkpoint, 0.5), tmp_path / "adapter")
    assert torch.equal(outputs(model), outputs(again))
    with pytest.raises(ValueError, match="trained at beta=0.5"):
        PeftModel.from_pretrained(reversible(checkpoint, BETA), tmp_path / "adapter")


def test_an_adapter_without_a_task(checkpoint, tmp_path, monkeypatch):
    """Without a task type PEFT saves its own description of the base model, so a message says what to remember."""
    said = []
    monkeypatch.setattr(adapters.logger, "warning_once", said.append)
    trained(checkpoint).save_pretrained(tmp_path / "adapter")
    assert "load it onto a model with beta=0.25: to_reversible(base, beta=0.25)" in said[0]
