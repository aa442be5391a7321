"""`SFTTrainer` of TRL, where it is installed."""

import random

import datasets
import pytest
import torch
from stock_models import stock_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

import hf_pareprop as hp

trl = pytest.importorskip("trl", exc_type=ImportError)


def words():
    """A tokenizer of 97 words, as many as the model knows."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def trained(engine, folder, options):
    """The losses of four steps, and the weights after them."""
    choose = random.Random(0)
    texts = [" ".join(f"w{choose.randrange(4, 97)}" for _ in range(choose.randrange(5, 20))) for _ in range(24)]
    set_seed(0)
    trainer = trl.SFTTrainer(
        hp.to_reversible(stock_model("LlamaForCausalLM"), beta=0.25, backward_engine=engine),
        args=trl.SFTConfig(
            str(folder),
            max_steps=4,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            **options,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=words(),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32, "padding_free": False}], ids=str)
def test_engines_agree(options, tmp_path, rebuilt):
    """With its defaults, and with packed texts."""
    losses, weights = trained("autograd", tmp_path, options)
    assert len(losses) == 4 and len(set(losses)) > 1 and not rebuilt
    for engine in ("reprop", "pareprop"):
        again, found = trained(engine, tmp_path, options)
        assert again == losses and rebuilt
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
