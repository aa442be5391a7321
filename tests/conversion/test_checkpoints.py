"""Checkpoints from other people: foreign code is not read or copied, nothing is dropped silently, and bad input is refused."""

import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch
import transformers
from checkpoints import assert_one_line, edit, names_in, save_tokenizer
from safetensors.torch import load_file, save_file
from test_architectures import stock

import hf_pareprop as hp

LEADS_OUT = "leads out of the checkpoint"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# --- code


def test_no_code_that_a_source_names_is_carried_along(run, src, tmp_path):
    edit(
        src,
        auto_map={"AutoModel": "evil/repo--model.Evil"},
        custom_pipelines={"evil": {"impl": "evil.Pipeline"}},
        attn_implementation="evil/kernel",
    )
    config = json.loads((src / "tokenizer_config.json").read_text())
    write(src / "tokenizer_config.json", {**config, "auto_map": {"AutoTokenizer": [None, "evil/repo--tok.Evil"]}})
    write(
        src / "preprocessor_config.json",
        {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.E"}},
    )
    write(src / "processor_config.json", {"inner": [{"custom_pipelines": "evil", "kept": 1}]})
    (src / "evil.py").write_text("raise SystemExit('evil')")
    said = run("convert", src, tmp_path / "out")
    assert "config.json: auto_map, custom_pipelines, attn_implementation left out" in said
    assert "tokenizer_config.json: auto_map left out" in said and "not copied  evil.py" in said
    for file in (tmp_path / "out").glob("*.json"):
        assert "evil" not in file.read_text(), file
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"inner": [{"kept": 1}]}
    assert not (tmp_path / "out" / "evil.py").exists()
    (tmp_path / "out" / "mine.py").write_text("pass")
    (tmp_path / "out" / "blocks.py").write_text("pass")
    assert "not copied  blocks.py, mine.py\n" in run("export", tmp_path / "out", tmp_path / "back")
    assert not any("evil" in file.read_text() for file in (tmp_path / "back").glob("*.json"))


def test_a_tokenizer_with_code_is_not_run(run, src, texts, tmp_path):
    write(
        src / "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    )
    (src / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (src / "tokenizer.json").unlink()
    (src / "vocab.json").write_text("{}")
    assert "has no tokenizer that can be loaded" in run("convert", src, tmp_path / "out", "--data", texts, status=1)
    assert names_in(tmp_path) == ["stock", "texts.txt"]


# --- files


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_files_elsewhere_are_not_read(name, run, src, tmp_path):
    file, secret = src / name, tmp_path / "secret"
    secret.write_bytes(file.read_bytes() if file.exists() else b"{}")
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    assert LEADS_OUT in run("convert", src, tmp_path / "out", status=1)
    assert names_in(tmp_path) == ["secret", "stock"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "{}/secret.safetensors", "link.safetensors"])
def test_shards_elsewhere_are_not_read(shard, run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    (src / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (src / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard.format(tmp_path))}
    write(src / "model.safetensors.index.json", index)
    assert LEADS_OUT in run("convert", src, tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()


def test_the_cache_of_the_hub_is_made_of_links(run, src, tmp_path):
    blobs, version = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    version.mkdir(parents=True)
    for i, file in enumerate(sorted(src.iterdir())):
        file.rename(blobs / str(i))
        (version / file.name).symlink_to(os.path.relpath(blobs / str(i), version))
    run("convert", version, tmp_path / "out")
    (tmp_path / "secret").write_text("{}")
    (version / "added_tokens.json").symlink_to(tmp_path / "secret")
    assert LEADS_OUT in run("convert", version, tmp_path / "new", status=1)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file(kind, run, src, tmp_path):
    (src / "vocab.json").mkdir() if kind == "directory" else os.mkfifo(src / "vocab.json")
    assert "vocab.json is not a file" in run("convert", src, tmp_path / "out", status=1)


def test_a_pickle_behind_an_index_of_safetensors(run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    torch.save(weights, src / "weights.bin")
    write(src / "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, "weights.bin")})
    assert "add --allow-pickle" in run("convert", src, tmp_path / "out", status=1)
    run("convert", src, tmp_path / "out", "--allow-pickle")
    assert all(torch.equal(t, weights[n]) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": "a"}])
def test_damaged_indices(index, run, src, tmp_path):
    (src / "model.safetensors").unlink()
    write(src / "model.safetensors.index.json", index)
    said = run("convert", src, tmp_path / "out", status=1)
    assert "is not an index of weights" in said or "is not a JSON object" in said


# --- what is kept


def save_sentence_encoder(folder, pooling):
    stock("BertModel").save_pretrained(folder)
    save_tokenizer(folder)
    types = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", pooling)]
    write(folder / "modules.json", [dict(idx=i, name=str(i), path=p, type=t) for i, (p, t) in enumerate(types)])
    write(folder / "sentence_bert_config.json", {"max_seq_length": 20, "model_args": {"trust_remote_code": True}})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "find: "}})
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})


def test_a_sentence_encoder_stays_one(run, tmp_path):
    """Its modules, pooling, length and prompts are copied, to the reversible checkpoint and back."""
    save_sentence_encoder(tmp_path / "stock", "sentence_transformers.models.Pooling")
    said = run("convert", tmp_path / "stock", tmp_path / "out")
    assert "copied  1_Pooling/config.json" in said and "sentence_bert_config.json: trust_remote_code left out" in said
    run("export", tmp_path / "out", tmp_path / "back")
    for folder in ("out", "back"):
        for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
        found = json.loads((tmp_path / folder / "sentence_bert_config.json").read_text())
        assert found == {"max_seq_length": 20, "model_args": {}}


def test_modules_of_a_sentence_encoder_that_are_foreign(run, tmp_path):
    save_sentence_encoder(tmp_path / "stock", "custom_st.Pooling")
    assert "it takes custom_st.Pooling, which is foreign code" in run("convert", tmp_path / "stock", tmp_path / "out")
    assert not {"modules.json", "1_Pooling"} & set(names_in(tmp_path / "out"))
    save_sentence_encoder(tmp_path / "stock", "sentence_transformers.models.Pooling")
    (tmp_path / "stock" / "1_Pooling" / "pytorch_model.bin").write_bytes(b"")
    assert "is a pickle" in run("convert", tmp_path / "stock", tmp_path / "new", status=1)
    modules = json.loads((tmp_path / "stock" / "modules.json").read_text())
    write(tmp_path / "stock" / "modules.json", [{**modules[1], "path": "../secret"}])
    write(tmp_path / "secret" / "config.json", {})
    assert LEADS_OUT in run("convert", tmp_path / "stock", tmp_path / "new", status=1)


@pytest.mark.parametrize("way", ["in memory", "from_pretrained", "command"])
def test_untied_weights_under_a_tied_configuration(way, run, tmp_path):
    model = stock("RobertaForMaskedLM")
    type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False})).save_pretrained(
        tmp_path / "stock"
    )
    edit(tmp_path / "stock", tie_word_embeddings=True)
    model = type(model).from_pretrained(tmp_path / "stock").eval()
    assert model.lm_head.decoder.weight is not model.roberta.embeddings.word_embeddings.weight
    if way == "in memory":
        twin = hp.to_reversible(model, beta=0)
    elif way == "from_pretrained":
        twin = hp.RevRobertaForMaskedLM.from_pretrained(tmp_path / "stock", beta=0)
    else:
        run("convert", tmp_path / "stock", tmp_path / "out", "--beta", 0)
        twin = hp.RevRobertaForMaskedLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(4, 26).view(2, 11)
    with torch.no_grad():
        assert torch.equal(twin.eval()(ids).logits, model(ids).logits)
        assert torch.equal(hp.to_stock(twin)(ids).logits, model(ids).logits)


def test_equal_weights_under_a_tied_configuration_are_tied(run, tmp_path):
    """Old checkpoints hold tied weights twice."""
    stock("RobertaForMaskedLM").save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    weights = load_file(file)
    twice = {"lm_head.decoder.weight": weights["roberta.embeddings.word_embeddings.weight"].clone()}
    save_file({**weights, **twice}, file, {"format": "pt"})
    run("convert", tmp_path / "stock", tmp_path / "out")
    model = hp.RevRobertaForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_cannot_be_trained(dtype, run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    name = "roberta.encoder.layer.1.output.dense.weight"
    save_file({**weights, name: weights[name].to(dtype)}, src / "model.safetensors", {"format": "pt"})
    said = run("convert", src, tmp_path / "out", status=1)
    assert name in said and str(dtype).removeprefix("torch.") in said and "dequantized" in said


def test_eight_bit_floats(run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    name = "roberta.encoder.layer.1.output.dense.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, src / "model.safetensors", {"format": "pt"})
    assert f"holds {name} as F8_E4M3" in run("convert", src, tmp_path / "out", status=1)


def test_buffers_of_old_checkpoints(run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    positions = {"roberta.embeddings.position_ids": torch.arange(40).unsqueeze(0)}
    save_file({**weights, **positions}, src / "model.safetensors", {"format": "pt"})
    run("convert", src, tmp_path / "out")


def test_fewer_layers_than_weights(run, src, tmp_path):
    edit(src, num_hidden_layers=2)
    said = run("convert", src, tmp_path / "out")
    assert "left out  roberta.encoder.layer.2.attention.output.LayerNorm.bias" in said


def test_each_tensor_keeps_its_dtype(run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    name = "roberta.encoder.layer.1.output.dense.weight"
    save_file({**weights, name: weights[name].bfloat16()}, src / "model.safetensors", {"format": "pt"})
    for size in ("5GB", "20KB"):
        run("convert", src, tmp_path / size, "--max-shard-size", size)
        found = {n: t for file in (tmp_path / size).glob("*.safetensors") for n, t in load_file(file).items()}
        assert found[name].dtype == torch.bfloat16 and found.keys() == weights.keys()
        assert all(torch.equal(found[n], weights[n].to(found[n].dtype)) for n in weights)
    run("convert", src, tmp_path / "half", "--dtype", "float16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert hp.RevRobertaConfig.from_pretrained(tmp_path / "half").dtype == torch.float16


@pytest.mark.slow
def test_memory_of_a_conversion(src, tmp_path):
    """Converting a sharded checkpoint takes less memory than the checkpoint, beyond what the command takes without one."""
    config = transformers.RobertaConfig(
        num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=3072, vocab_size=8000
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "large", max_shard_size="50MB")
    size = sum(file.stat().st_size for file in (tmp_path / "large").iterdir())

    def peak(source):
        program = (
            "import resource, sys; from hf_pareprop.tools.cli import app; app(sys.argv[1:], standalone_mode=False); "
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-W", "ignore", "-c", program, "convert", str(source), f"{source}-out"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return 1024 * int(said.rpartition("PEAK ")[2])

    assert size > 300e6
    assert peak(tmp_path / "large") - peak(src) < 0.5 * size


# --- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(hidden_size=0), "hidden_size=0: a number above 0"),
        (dict(num_attention_heads=-4), "num_attention_heads=-4: a number above 0"),
        (dict(vocab_size=0), "vocab_size=0: "),
        (dict(num_hidden_layers="three"), 'num_hidden_layers="three"'),
        (dict(num_hidden_layers=[3]), "num_hidden_layers=[3]"),
        (dict(num_hidden_layers=math.inf), "num_hidden_layers=Infinity: "),
        (dict(num_hidden_layers=math.nan), "num_hidden_layers=NaN: "),
        (dict(hidden_size=None), "hidden_size=null"),
        (dict(hidden_size=1e3), "hidden_size=1000.0"),
        (
            dict(num_hidden_layers=10**9),
            "num_hidden_layers=1000000000: these are 1000000000 layers, but its weights are 57",
        ),
        (dict(num_hidden_layers=1001), "these are 1001 layers, but its weights are 57 tensors"),
        (dict(vocab_size=10**12), "vocab_size=1000000000000: a number of at most"),
        (
            dict(vocab_size=10**9),
            "32000 million weights, far more than its files have: correct it. Its largest number is vocab_",
        ),
        (dict(hidden_size=10**400), f"hidden_size=1{59 * '0'} …: a number of at most"),
        (dict(num_attention_heads=5), "attention heads"),
        (
            dict(hidden_act="nonsense"),
            'hidden_act="nonsense", with which there is no RobertaForSequenceClassification',
        ),
        (dict(add_cross_attention=True), "add_cross_attention=true, with which there is no Roberta"),
        (dict(architectures="RobertaForMaskedLM"), 'architectures="RobertaForMaskedLM", which names no class'),
        (dict(architectures=[7]), "architectures=[7], which names no class"),
        (dict(architectures=[]), "architectures=[], which names no class"),
        (dict(model_type=7), "model_type=7, which transformers"),
        (dict(model_type=None), "model_type=null, which transformers"),
        (dict(dtype=[]), "dtype=[]: null or the name of a type of PyTorch"),
        (dict(dtype="float33"), 'dtype="float33": null or the name of a type of PyTorch'),
        (dict(id2label=3), "id2label=3: null or an object"),
        (dict(id2label={"a": "b"}), 'id2label={"a": "b"}: null or an object'),
        (dict(label2id="no"), 'label2id="no": null or an object'),
        (dict(pad_token_id=None), "pad_token_id=null: a token from 0 to 60 is expected"),
        (dict(pad_token_id=-5), "pad_token_id=-5: a token from 0 to 60 is expected"),
        (dict(pad_token_id=23), "max_position_embeddings=24 leaves no token a position"),
        (dict(use_cache="yes"), 'use_cache="yes": true or false is expected'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_configurations(fields, message, run, src, tmp_path):
    edit(src, **fields)
    for command in ("convert", "bench"):
        said = run(command, src, *([tmp_path / "out"] if command == "convert" else ["--no-compile"]), status=1)
        assert "Traceback" not in said and said.startswith("error: ") and said.count("\n") <= 1, said
        assert command == "bench" or message in said, said
    assert names_in(tmp_path) == ["stock"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(pretrained_cfg="x"), 'pretrained_cfg="x": null or an object is expected'),
        (dict(pretrained_cfg=[]), "pretrained_cfg=[]: null or an object is expected"),
        (dict(pretrained_cfg={"mean": 0.5}), "numbers for each channel as mean and std is expected"),
        (dict(architecture="mvitv9_tiny"), 'architecture="mvitv9_tiny"'),
        (dict(architecture=None), "architecture=null"),
        (dict(num_classes=-1), "num_classes=-1: a whole number is expected"),
    ],
    ids=str,
)
def test_bad_configurations_of_timm(fields, message, run, tmp_path):
    given = dict(architecture="mvitv2_tiny", num_classes=5, pretrained_cfg={"input_size": [3, 64, 64]})
    write(tmp_path / "timm" / "config.json", {**given, **fields})
    save_file({"head.fc.bias": torch.zeros(5)}, tmp_path / "timm" / "model.safetensors")
    assert_one_line(run("convert", tmp_path / "timm", tmp_path / "out", status=1), message)
    assert names_in(tmp_path) == ["timm"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(architectures=[]), "architectures=[], which names no class"),
        (
            dict(model_type="rev_vit"),
            'model_type="rev_vit", and a RevRobertaForSequenceClassification has "rev_roberta"',
        ),
        (dict(beta=3), "beta"),
        (dict(grid_bits="many"), "grid_bits"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["export", "verify"])
def test_bad_configurations_of_reversible_checkpoints(command, fields, message, run, src, tmp_path):
    run("convert", src, tmp_path / "rev")
    edit(tmp_path / "rev", **fields)
    said = run(command, tmp_path / "rev", *([tmp_path / "out"] if command == "export" else []), status=1)
    assert_one_line(said, message)
    assert names_in(tmp_path) == ["rev", "stock"]


def test_several_tokens_may_end_a_text(run, src, tmp_path):
    edit(src, eos_token_id=[2, 3])
    run("convert", src, tmp_path / "rev")
    run("export", tmp_path / "rev", tmp_path / "back")


def test_more_layers_than_weights(run, src, tmp_path):
    edit(src, num_hidden_layers=900)
    assert "these are 900 layers, but its weights are 57 tensors" in run("convert", src, tmp_path / "out", status=1)


def test_deep_json(run, src, tmp_path):
    depth = 100_000
    for name in ("tokenizer_config.json", "config.json"):
        (src / name).write_text('{"a": ' * depth + "1" + "}" * depth)
        assert f"{name} is nested too deeply" in run("convert", src, tmp_path / "out", status=1)
    assert names_in(tmp_path) == ["stock"]


def test_a_header_that_lies(run, src, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (src / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "are damaged" in run("convert", src, tmp_path / "out", status=1)


def test_a_long_line(run, src, tmp_path):
    """Only as much of a line is read as the requested tokens can take; the rest is skipped."""
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 " * 2_000_000 + "\n" + "w2 w3\n")
    said = run("convert", src, tmp_path / "out", "--data", texts)
    assert "2 inputs: hidden states cosine" in said


def test_calibration_chooses_the_grid(run, src, texts, tmp_path):
    """The finest grid of at most 22 bits with room for eight times the largest state, unless a grid is given."""
    run("convert", src, tmp_path / "small", "--data", texts)
    assert hp.RevRobertaConfig.from_pretrained(tmp_path / "small").grid_bits == 22
    weights = load_file(src / "model.safetensors")
    name = "roberta.encoder.layer.1.output.LayerNorm.bias"
    weights[name][3] = 30_000.0  # beyond the default's 16,384
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    said = run("convert", src, tmp_path / "large", "--data", texts)
    bits = hp.RevRobertaConfig.from_pretrained(tmp_path / "large").grid_bits
    assert 8 * 30_000 < 2 ** (30 - bits) <= 16 * 40_000 and f"grid  {bits} bits; states reach 2.9" in said
    run("convert", src, tmp_path / "given", "--data", texts, "--grid-bits", 10)
    assert hp.RevRobertaConfig.from_pretrained(tmp_path / "given").grid_bits == 10
    weights[name][3] = 1e30
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    assert "too large for any grid" in run("convert", src, tmp_path / "none", "--data", texts, status=1)


def test_an_image_bomb(run, tmp_path):
    from PIL import Image

    stock("ViTForImageClassification").save_pretrained(tmp_path / "stock")
    processor = dict(image_processor_type="ViTImageProcessor", size=dict(height=12, width=12), do_resize=True)
    write(tmp_path / "stock" / "preprocessor_config.json", processor)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    said = run("convert", tmp_path / "stock", tmp_path / "out", "--data", tmp_path / "bomb.png", status=1)
    assert "bomb.png is not an image that can be read" in said


@pytest.mark.slow
def test_without_a_network(tmp_path):
    program = "from hf_pareprop.tools.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", program, "convert", "someone/model", str(tmp_path / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 1 and "there is no such directory, and the Hub is unreachable" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_damaged_companions(content, name, run, src, tmp_path):
    """They are refused before the weights are written, even if nothing is measured with them."""
    (src / name).write_bytes(content.encode("latin1"))
    said = run("convert", src, tmp_path / "out", status=1).splitlines()[-1]
    assert said.startswith("error: ") and f"{name} is not " in said and "download or save it again" in said
    assert names_in(tmp_path) == ["stock"]


def test_the_tokenizer_of_another_model(run, src, texts, tmp_path):
    save_tokenizer(src, tokenizer_class="PreTrainedTokenizerFast")
    edit(src, vocab_size=30, pad_token_id=1)
    weights = load_file(src / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"] = weights["roberta.embeddings.word_embeddings.weight"][:30]
    save_file({n: t.contiguous() for n, t in weights.items()}, src / "model.safetensors", metadata={"format": "pt"})
    texts.write_text("w1 w50\n")
    said = run("convert", src, tmp_path / "out", "--data", texts, status=1)
    assert_one_line(said, "makes token 55", "the model has vocab_size=30")


def test_a_tokenizer_that_cannot_pad(run, src, texts, tmp_path):
    config = json.loads((src / "tokenizer_config.json").read_text())
    write(src / "tokenizer_config.json", {**config, "pad_token": None})
    said = run("convert", src, tmp_path / "out", "--data", texts, status=1)
    assert_one_line(said, "cannot prepare", "does not have a padding token", "Look at its tokenizer_config.json")


@pytest.mark.parametrize("path", [".", "", "..", "/etc", "1_Pooling/../.."])
def test_paths_of_the_modules_of_a_sentence_encoder(path, run, tmp_path):
    save_sentence_encoder(tmp_path / "src", "sentence_transformers.models.Pooling")
    (tmp_path / "src" / "other.bin").write_bytes(b"a pickle")
    write(tmp_path / "src" / "modules.json", [{"path": path, "type": "sentence_transformers.models.Transformer"}])
    leads_out = path not in (".", "")
    said = run("convert", tmp_path / "src", tmp_path / "out", status=int(leads_out))
    assert f"a module at {path}" in said if leads_out else not (tmp_path / "out" / "other.bin").exists()


@pytest.mark.parametrize(
    "odd, message",
    [
        (lambda: torch.zeros(32).to_sparse(), "which is sparse"),
        (lambda: torch.zeros(32, device="meta"), "which is without values"),
        (lambda: {"inner": torch.zeros(32)}, "is not a dictionary of tensors by name"),
        (lambda: pathlib.PurePosixPath("x"), "holds objects other than tensors"),
    ],
)
def test_pickles_of_what_is_no_weight(odd, message, run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    torch.save({**weights, "classifier.dense.bias": odd()}, src / "pytorch_model.bin")
    said = run("convert", src, tmp_path / "out", "--allow-pickle", status=1)
    assert_one_line(said, message)
    assert "weights_only" not in said and names_in(tmp_path) == ["stock"]


@pytest.mark.parametrize("content", [b"", b"hello", b".", b"\x80\x02h\x05.", b"PK\x03\x04" + bytes(40)])
def test_damaged_pickles(content, run, src, tmp_path):
    (src / "model.safetensors").unlink()
    (src / "pytorch_model.bin").write_bytes(content)
    said = run("convert", src, tmp_path / "out", "--allow-pickle", status=1)
    assert_one_line(said, "pytorch_model.bin cannot be read: ", "save")


@pytest.mark.parametrize("value", [5, "x", [], {"a": 1}, ["a"]])
def test_an_image_processor_whose_mean_is_none(value, run, tmp_path):
    config = hp.RevMViTConfig(architecture="mvitv2_tiny", image_size=64, num_labels=3)
    hp.RevMViTForImageClassification(config).save_pretrained(tmp_path / "rev")
    write(tmp_path / "rev" / "preprocessor_config.json", {"image_mean": value})
    said = run("export", tmp_path / "rev", tmp_path / "out", status=1)
    assert f"preprocessor_config.json says image_mean={json.dumps(value)}: a number for each channel" in said
    assert names_in(tmp_path) == ["rev"]
