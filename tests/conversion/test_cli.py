"""The command line as users call it: what it makes, what it prints, and what it refuses without leaving files behind."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import WORDS, assert_one_line, edit, names_in, save_tokenizer
from families import FAMILIES
from huggingface_hub import ModelCard
from loopback import Hub, Repository
from safetensors.torch import load_file, save_file
from stock_models import stock_model
from test_architectures import stock

import hf_pareprop as hp
from hf_pareprop.tools import commands
from hf_pareprop.tools.cards import model_card
from hf_pareprop.tools.families import STOCK_CLASSES
from hf_pareprop.tools.memory import Growth
from hf_pareprop.tools.output import MANIFEST, digest
from hf_pareprop.tools.records import layers_in_words, width_of
from hf_pareprop.tools.verify import Report
from hf_pareprop.tools.weights import SAFETENSORS


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["--version"]])
def test_help_takes_no_pytorch(arguments):
    """Importing PyTorch would take seconds."""
    program = (
        "import sys; sys.argv = ['/bin/hf-pareprop', *sys.argv[1:]]\nfrom hf_pareprop.tools.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "False"), result.stderr
    assert hp.__version__ in result.stdout or "Usage: hf-pareprop" in result.stdout


def test_the_card(src, run, tmp_path):
    """It has the licence and the languages of the base model, what was left out, and how to go back."""
    (src / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en, de]\ntags: [mine]\nmetrics: [f1]\n---\n\n# A model\n"
    )
    weights = load_file(src / "model.safetensors")
    save_file(weights | {"roberta.extra.weight": torch.ones(2)}, src / "model.safetensors", metadata={"format": "pt"})
    run("convert", src, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.metrics) == ("mit", ["en", "de"], None)
    assert (
        "| weights of the base model left out | roberta.extra.weight |" in card.text
        and "| licence | mit |" in card.text
    )
    assert (
        "hf_pareprop.RevRobertaForSequenceClassification.from_pretrained" in card.text
        and "hf-pareprop export" in card.text
    )
    for broken in ("---\nlicense: [\n---\n", "no metadata", "---\n- a list\n---\n"):
        (src / "README.md").write_text(broken)
        run("convert", src, tmp_path / "out", "--overwrite")
        assert "not stated by the base model" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_training(tmp_path):
    """The accuracy is metadata that the Hub shows."""
    model = FAMILIES["vit"].build(2)
    card = model_card(
        model, model_name="digits", base_model="trained from scratch", dataset="scikit-learn's digits", accuracy=0.978
    )
    card.save(tmp_path / "README.md")
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "accuracy",
        0.978,
        "scikit-learn's digits",
    )
    assert result.task_type == "image-classification"


@pytest.mark.parametrize("field, value", [("num_labels", 10**9), ("num_labels", 1e30)])
def test_numbers_that_no_memory_holds(field, value, src, run, tmp_path):
    edit(src, **{field: value})
    assert_one_line(run("convert", src, tmp_path / "out", status=1), f"{field}={json.dumps(value)}", "below 10000000")


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"intermediate_size": 40},
            "intermediate.dense.bias has the shape (64,), and a RobertaForSequenceClassification of",
        ),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=NaN: a value other than NaN"),
        ({"hidden_dropout_prob": float("inf")}, "hidden_dropout_prob=Infinity: a value other than"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5: a probability from 0 to 1 is expected"),
    ],
)
def test_fields_are_named(fields, message, src, run, tmp_path):
    edit(src, **fields)
    assert_one_line(run("convert", src, tmp_path / "out", status=1), message)


def test_a_field_that_nobody_may_set(src, run, tmp_path):
    """For this field transformers logs a whole page; the command shows one line."""
    run("convert", src, tmp_path / "out")
    edit(tmp_path / "out", stage_depths=3)
    assert_one_line(run("verify", tmp_path / "out", status=1), "stage_depths")


def test_what_is_in_the_way_stays(src, run, tmp_path):
    """Files with the names that an interrupted run leaves, and a manifest that is an endless link, are not deleted."""
    out = tmp_path / "out"
    for name in (".out.hf-pareprop-old", ".out.hf-pareprop"):
        (tmp_path / name).write_text("mine")
        assert_one_line(run("convert", src, out, status=1), name, "move or delete it yourself")
        assert (tmp_path / name).read_text() == "mine" and not out.exists()
        (tmp_path / name).unlink()
    out.mkdir()
    (out / MANIFEST).symlink_to("/dev/zero")
    assert_one_line(run("convert", src, out, "--overwrite", status=1), "there is no list of what it wrote")


@pytest.mark.parametrize("size", ["0GB", "-1GB", "lots", "9" * 400 + "GB"])
def test_bad_sizes_of_shards(size, src, run, tmp_path):
    said = run("convert", src, tmp_path / "out", f"--max-shard-size={size}", status=1)
    assert_one_line(said, "--max-shard-size", "not a size, such as 5GB")
    assert len(said) < 1200


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 10**9}, {"vocab_size": 2 * 10**9}])
def test_bench_of_a_model_that_no_memory_holds(fields, src, run):
    edit(src, **fields)
    assert_one_line(run("bench", src, "--no-compile", status=1), "has weights of", "is every size in it right?")


@pytest.mark.slow
def test_bench_says_when_nothing_runs(src, run, monkeypatch):
    """The reason is not a lack of memory."""
    tokens = torch.full((1, 8), 10**6)  # not in the vocabulary
    batch = dict(input_ids=tokens, labels=torch.zeros(1, dtype=torch.long))
    monkeypatch.setattr(commands, "batch_for", lambda *args: batch)
    said = run("bench", src, "--rounds", 1, "--batch-size", 1, "--max-length", 8, "--no-compile", status=1)
    assert "no way to train" in said and "Traceback" not in said and "Nothing trains" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem", ["multi_label_classification", pytest.param("regression", marks=pytest.mark.every_case)]
)
def test_bench_of_every_kind_of_classifier(problem, src, run):
    edit(src, problem_type=problem)
    run("bench", src, "--rounds", 1, "--batch-size", 1, "--max-length", 8, "--no-compile")


@pytest.mark.parametrize(
    "place, message", [("/dev/null/out", "/dev/null is not a directory"), ("/proc/out", "cannot write beside")]
)
@pytest.mark.skipif(sys.platform != "linux", reason="where nothing can be made is another place elsewhere")
def test_places_where_nothing_can_be_made(place, message, src, run):
    assert_one_line(run("convert", src, place, status=1), place, message, "ame another")


@pytest.mark.parametrize("place", ["out", "new/out"])
def test_nothing_is_written_into_the_source(place, src, run, tmp_path):
    before = sorted(src.rglob("*"))
    assert_one_line(run("convert", src, src / place, status=1), "is inside the source", "name another directory")
    assert sorted(src.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert"], "SRC"),
        (["convert", "a"], "OUT"),
        (["nope"], "nope"),
        (["convert", "a", "b", "--nope", "3"], "--nope"),
        (["verify", "a", "--batch-size", "0"], "--batch-size"),
        (["bench", "a", "--rounds", "many"], "--rounds"),
        (["convert", "a", "b", "--dtype", "int8"], "int8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, message, run):
    """The error is one line like every other error, without a page of usage."""
    said = run(*arguments, status=2)
    assert said.startswith("error: ") and "--help" in said
    assert_one_line(said, message)


def test_no_arguments(run):
    assert "Usage: " in run()


def test_links_that_lead_nowhere(src, run, tmp_path):
    for name, target in (("loop", "loop"), ("gone", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert_one_line(run("convert", tmp_path / name, tmp_path / "out", status=1), name, "leads to no directory")


def test_empty_names(src, run, tmp_path):
    """An empty name would be the current directory."""
    assert_one_line(run("convert", "", tmp_path / "out", status=1), "is empty: give a directory")
    for command in (
        ("convert", src, ""),
        ("convert", src, tmp_path / "out", "--data", ""),
        ("bench", src, "--out", ""),
    ):
        assert "it is empty: name a path" in run(*command, status=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layers", "9" * 5000), "is not a range of layers from 0 to 2"),
        (("--layers", "0-" + "9" * 5000), "is not a range of layers from 0 to 2"),
        (("--beta", "0.3"), "beta=0.3 is not 0, 1 or a negative power of two"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_numbers(options, message, src, run, tmp_path):
    said = run("convert", src, tmp_path / "out", *options, status=1)
    assert_one_line(said, message)
    assert len(said) < 500


def test_data_that_is_no_file(src, run, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    said = run("convert", src, tmp_path / "out", "--data", tmp_path / "pipe.txt", status=1)
    assert_one_line(said, "pipe.txt is neither a file nor a directory")


def test_an_image_processor_that_cannot_work(run, tmp_path):
    from PIL import Image

    stock("ViTForImageClassification").save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size=12).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (12, 12)).save(tmp_path / "image.png")
    path = tmp_path / "vit" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_factor": "x"}))
    said = run("convert", tmp_path / "vit", tmp_path / "out", "--data", tmp_path / "image.png", status=1)
    assert_one_line(said, "cannot prepare", "image.png", "preprocessor_config.json")


@pytest.mark.slow
def test_the_installed_command(src, tmp_path):
    """It loads the package only when it runs a command: it converts, and reads what it wrote."""
    command = Path(sys.executable).with_name("hf-pareprop")
    for arguments in (("convert", src, tmp_path / "out"), ("verify", tmp_path / "out")):
        result = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_names_of_the_package():
    """The package has all names that it lists, and raises an error for others."""
    assert all(hasattr(hp, name) for name in hp.__all__) and len(set(hp.__all__)) == len(hp.__all__)
    assert {"RevViTForImageClassification", "RevSwinBackbone", "to_stock", "verify"} <= set(hp.__all__)
    hp.load()
    assert len(set(hp.__all__)) == len(hp.__all__) and callable(hp.verify)
    with pytest.raises(AttributeError, match="no attribute 'RevGPT'; it has BetaSchedule"):
        _ = hp.RevGPT


@pytest.mark.parametrize("name", sorted(STOCK_CLASSES))
def test_there_and_back(name, run, tmp_path):
    """For every architecture and head: identical tensors, and a stock checkpoint without any code."""
    stock(name).save_pretrained(tmp_path / "stock")
    before = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    out = run("convert", tmp_path / "stock", tmp_path / "reversible")
    config = STOCK_CLASSES[name][0].heads["Model"].config_class.from_pretrained(tmp_path / "reversible")
    first = config.stage_depths[0] - 1
    coupling = (
        f"layers 0-{first}: reversible, beta 0.03125, int32 states below 16384 in steps of 2**-16, 5 side bits kept"
    )
    assert f"{name}, {layers_in_words(config)} layers, {width_of(config)} wide" in out and coupling in out
    run("export", tmp_path / "reversible", tmp_path / "back")
    a, b = (load_file(tmp_path / which / "model.safetensors") for which in ("stock", "back"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert not list((tmp_path / "back").glob("*.py"))
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("stock", "back")]
    assert configs[0] == configs[1]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert names_in(tmp_path) == ["back", "reversible", "stock"]


def test_a_conversion_loads_anywhere(run, src, texts, tmp_path):
    """Tokenizer and code are in the checkpoint: a process without the package classifies a text."""
    out = run("convert", src, tmp_path / "out", "--beta", 0.25, "--data", texts)
    assert "3 inputs: hidden states cosine 0." in out and "predictions the same in" in out
    assert "copied  tokenizer.json, tokenizer_config.json" in out
    program = """
import sys, transformers
sys.modules["hf_pareprop"] = None
name = sys.argv[1]
model = transformers.AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
assert model.config.beta == 0.25
print(tuple(model(**tokenizer(["w1 w2", "w3 w4"], return_tensors="pt")).logits.shape))
"""
    home = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=home, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "(2, 3)" in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| coupling (`beta`) | 0.25 |" in card and "converted, not trained since; on 3 inputs" in card


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "RobertaForQuestionAnswering", "RobertaForMultipleChoice"])
def test_fidelity_of_every_kind_of_head(name, run, texts, tmp_path):
    stock(name).save_pretrained(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock")
    out = run("convert", tmp_path / "stock", tmp_path / "out", "--beta", 1, "--data", texts)
    assert "hidden states cosine" in out and "predictions the same in" in out
    same = run("convert", tmp_path / "stock", tmp_path / "same", "--beta", 0, "--data", texts)
    assert "hidden states bit-equal, predictions the same in 100.0 %" in same


def test_images(run, tmp_path):
    from PIL import Image

    stock("ViTForImageClassification").save_pretrained(tmp_path / "stock")
    processor = dict(image_processor_type="ViTImageProcessor", size=dict(height=12, width=12), do_resize=True)
    (tmp_path / "stock" / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 16), (80 * i, 10, 200)).save(tmp_path / "images" / f"{i}.png")
    out = run("convert", tmp_path / "stock", tmp_path / "out", "--data", tmp_path / "images")
    assert "3 inputs: hidden states cosine 0.9" in out and "copied  preprocessor_config.json" in out
    assert "holds: 3 reversible layers" in run("verify", tmp_path / "out", "--data", tmp_path / "images" / "1.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert "broken.png is not an image" in run("verify", tmp_path / "out", "--data", tmp_path / "images", status=1)


def test_whole_layers(run, src, texts, tmp_path):
    """Conversion there and back, at the default beta of whole layers. The card says what is coupled."""
    said = run("convert", src, tmp_path / "out", "--steps", "layer", "--data", texts)
    assert "layers 0-2: reversible, beta 0.0078125, int32 states below" in said
    assert "7 side bits kept per element and layer" in said
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.steps, model.config.beta) == ("layer", 1 / 128)
    assert "| what is coupled (`steps`) | whole layers |" in (tmp_path / "out" / "README.md").read_text()
    assert "holds: 3 reversible layers" in run("verify", tmp_path / "out")
    run("export", tmp_path / "out", tmp_path / "back")
    there, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    assert "steps" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert "'block' is not one of" in run("convert", src, tmp_path / "no", "--steps", "block", status=2)


def test_a_decoder(run, texts, tmp_path):
    """Conversion there and back, with the generation settings. Its tokenizer has no padding token."""
    # Words must not be a token whose embedding is zero, because then there is no cosine.
    stock_model("LlamaForCausalLM", pad_token_id=96).save_pretrained(tmp_path / "stock")
    save_tokenizer(tmp_path / "stock")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "stock")
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.pad_token, None
    tokenizer.save_pretrained(tmp_path / "stock")
    said = run("convert", tmp_path / "stock", tmp_path / "out", "--data", texts)
    assert "layers 0-2: reversible, beta 0.0078125" in said and "7 side bits kept per element and layer" in said
    assert re.search(r"3 inputs: hidden states cosine (0\.9|1\.0)", said), said
    assert "generation_config.json" in said.split("copied")[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A decoder." in card and "text-generation" in card
    assert "holds: 3 reversible layers" in run("verify", tmp_path / "out", "--data", texts)
    run("export", tmp_path / "out", tmp_path / "back")
    there, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is transformers.LlamaForCausalLM


def test_options(run, src, tmp_path):
    said = run(
        *("convert", src, tmp_path / "out", "--layers", "1-2", "--dtype", "bfloat16", "--grid-bits", 12, "--beta", 0.5)
    )
    assert "layers 0-0: conventional, activations stored" in said
    assert "layers 1-2: reversible, beta 0.5, int32 states below 262144 in steps of 2**-12, 1 side bits kept" in said
    model = hp.RevRobertaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.beta == [0.0, 0.5, 0.5] and model.config.grid_bits == 12 and model.dtype == torch.bfloat16
    run("convert", src, tmp_path / "out", "--layers", "0,2", "--overwrite")
    assert hp.RevRobertaForSequenceClassification.from_pretrained(tmp_path / "out").config.beta == [
        0.03125,
        0,
        0.03125,
    ]
    assert names_in(tmp_path) == ["out", "stock"]


def test_shards(run, tmp_path):
    model = stock("RobertaForMaskedLM")
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 2
    run("convert", tmp_path / "stock", tmp_path / "out", "--max-shard-size", "20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    run("export", tmp_path / "out", tmp_path / "back")
    back = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
    next((tmp_path / "stock").glob("*.safetensors")).unlink()
    assert "cannot be read" in run("convert", tmp_path / "stock", tmp_path / "new", status=1)
    (tmp_path / "stock" / "model.safetensors.index.json").write_text("{")
    assert "is not readable JSON" in run("convert", tmp_path / "stock", tmp_path / "new", status=1)
    assert names_in(tmp_path) == ["back", "out", "stock"]


def test_pickled_weights(run, src, tmp_path):
    torch.save(load_file(src / "model.safetensors"), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    assert "add --allow-pickle" in run("convert", src, tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()
    run("convert", src, tmp_path / "out", "--allow-pickle")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"roberta.embeddings.LayerNorm.bias": Evil()}, src / "pytorch_model.bin")
    run("convert", src, tmp_path / "worse", "--allow-pickle", status=1)
    assert names_in(tmp_path) == ["out", "stock"]


@pytest.mark.slow
def test_a_checkpoint_on_the_hub(src, tmp_path):
    """It is given by its id. An id that does not exist is an error."""
    hub = Hub()
    hub.repositories["someone/stock"] = repository = Repository()
    repository.files = {path.name: path.read_bytes() for path in src.iterdir()}
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    program = "from hf_pareprop.tools.cli import main; main()"
    try:
        good, bad = (
            subprocess.run(
                [sys.executable, "-c", program, "convert", name, str(tmp_path / "out" / name)],
                capture_output=True,
                text=True,
                env=env,
            )
            for name in ("someone/stock", "someone/else")
        )
    finally:
        hub.stop()
    assert good.returncode == 0, good.stderr
    card = (tmp_path / "out" / "someone" / "stock" / "README.md").read_text()
    assert "base_model: someone/stock" in card and "| base model | someone/stock |" in card
    assert bad.returncode == 1 and "neither a directory nor a model that the Hub provides" in bad.stderr
    assert names_in(tmp_path / "out" / "someone") == ["stock"]


def test_what_stock_transformers_leaves_out(run, tmp_path):
    """A checkpoint with a pooler that its class has no place for, and one without the pooler that its class wants."""
    stock("RobertaForMaskedLM").save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    save_file({**load_file(file), "roberta.pooler.dense.bias": torch.zeros(32)}, file, {"format": "pt"})
    assert "left out  roberta.pooler.dense.bias" in run("convert", tmp_path / "stock", tmp_path / "a")
    type(stock("BertModel"))(stock("BertModel").config, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    assert "has no pooler" in run("convert", tmp_path / "bare", tmp_path / "b")
    run("export", tmp_path / "b", tmp_path / "c")
    assert (
        load_file(tmp_path / "c" / "model.safetensors").keys()
        == load_file(tmp_path / "bare" / "model.safetensors").keys()
    )


def test_verify(run, src, texts, tmp_path):
    run("convert", src, tmp_path / "out")
    for options in ((), ("--data", texts), ("--autocast", "bf16", "--engine", "reprop")):
        out = run("verify", tmp_path / "out", *options)
        assert "step  holds: 3 reversible layers: rebuilt states bit-equal, gradients bit-equal, loss bit-equal" in out
        assert "of 16384\n" in out and "memory  holds: one more layer adds" in out
    assert "is not a reversible model" in run("verify", src, status=1)
    assert "not a device" in run("verify", tmp_path / "out", "--device", "abacus", status=1)
    edit(tmp_path / "out", beta=0)
    assert "nothing to verify" in run("verify", tmp_path / "out", status=1)


@pytest.mark.parametrize(
    "report, found",
    [
        (Report(rebuilt={0: 3}, loss_equal=True, gradients_equal=True), "different in 3 elements"),
        (Report(loss_equal=True, gradient_error=0.1), "gradients off by up to 1.0e-01"),
        (Report(gradients_equal=True), "loss different"),
    ],
)
def test_a_model_that_falls_short(report, found, run, src, tmp_path, monkeypatch):
    run("convert", src, tmp_path / "out")
    monkeypatch.setattr(commands, "verify_step", lambda model, batch: report)
    out = run("verify", tmp_path / "out", status=1)
    assert "step  FALLS SHORT: " in out and found in out and "memory  holds" in out


def test_memory_that_grows_falls_short(run, src, tmp_path, monkeypatch):
    run("convert", src, tmp_path / "out")
    monkeypatch.setattr(commands, "memory_growth", lambda model, batch: Growth(2e6, 1e7, "reprop"))
    out = run("verify", tmp_path / "out", status=1)
    assert "step  holds" in out and "memory  FALLS SHORT: one more layer adds 1.907 MB with reprop" in out


def test_what_a_training_step_refuses_falls_short(run, src, tmp_path):
    """Only the engine that stores activations can train float states. The error is one line, without a traceback."""
    run("convert", src, tmp_path / "out")
    edit(tmp_path / "out", grid_bits=None)
    out = run("verify", tmp_path / "out", status=1)
    assert "float states, which only the engine autograd can train" in out
    assert "grid_bits=None leaves states floats" in out


@pytest.mark.parametrize("how", ["truncated", "no header", "empty"])
def test_damaged_weights(how, run, src, tmp_path):
    file = src / SAFETENSORS[0]
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "no header": b"\xff" * 400, "empty": b""}[how])
    damaged = file.read_bytes()
    assert "are damaged" in run("convert", src, tmp_path / "out", status=1)
    assert names_in(tmp_path) == ["stock"] and file.read_bytes() == damaged


def test_bad_checkpoints(run, src, tmp_path):
    out = tmp_path / "out"
    edit(src, hidden_size=64)
    assert "not those of its configuration" in run("convert", src, out, status=1)
    edit(src, hidden_size=32, num_hidden_layers=4)
    assert "lacks 16 tensors of RobertaForSequenceClassification" in run("convert", src, out, status=1)
    edit(src, num_hidden_layers=3, architectures=["RobertaForCausalLM"])
    assert "RobertaForCausalLM has no reversible twin: the classes that have one are ViTModel" in run(
        "convert", src, out, status=1
    )
    edit(src, model_type="distilbert", architectures=["DistilBertModel"])
    assert "DistilBertModel has no reversible twin" in run("convert", src, out, status=1)
    edit(src, model_type="unheard-of")
    assert 'model_type="unheard-of"' in run("convert", src, out, status=1)
    (src / "config.json").write_text("[1, 2")
    assert "is not readable JSON" in run("convert", src, out, status=1)
    (src / "config.json").write_text("[1, 2]")
    assert "not a JSON object" in run("convert", src, out, status=1)
    (src / "tokenizer_config.json").write_text("{,")
    stock("RobertaForSequenceClassification").config.save_pretrained(src)
    edit(src, architectures=["RobertaForSequenceClassification"])
    assert "tokenizer_config.json is not readable JSON" in run("convert", src, out, status=1)
    (src / "config.json").unlink()
    assert "has no config.json" in run("convert", src, out, status=1)
    (src / "config.json").write_text("{}")
    assert run("convert", src, out, status=1)
    assert names_in(tmp_path) == ["stock"]


def test_missing_weights(run, src, tmp_path):
    (src / "model.safetensors").unlink()
    assert "has no weights" in run("convert", src, tmp_path / "out", status=1)
    assert "there is no such directory" in run("convert", tmp_path / "nowhere", tmp_path / "out", status=1)
    assert "is a file: give the directory" in run("convert", src / "config.json", tmp_path / "out", status=1)


def test_weights_that_are_not_numbers(run, src, tmp_path):
    weights = load_file(src / "model.safetensors")
    weights["classifier.dense.bias"][3] = float("nan")
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    assert "classifier.dense.bias" in run("convert", src, tmp_path / "out", status=1)
    (src / "model.safetensors").unlink()
    torch.save(weights, src / "pytorch_model.bin")
    said = run("convert", src, tmp_path / "out", "--allow-pickle", status=1)
    assert "not finite in classifier.dense.bias" in said
    assert names_in(tmp_path) == ["stock"]


def test_bad_options(run, src, texts, tmp_path):
    out = tmp_path / "out"
    assert "beta=0.3 is not 0, 1 or a negative power of two" in run("convert", src, out, "--beta", 0.3, status=1)
    for layers in ("2-3", "2-1", "-1", "a", "", "0-1,7"):
        assert "not a range of layers from 0 to 2" in run("convert", src, out, "--layers", layers, status=1)
    for bits in (0, 23):
        assert f"grid_bits={bits} is not" in run("convert", src, out, "--grid-bits", bits, status=1)
    assert "no text in it" in run("convert", src, out, "--data", _empty(tmp_path), status=1)
    assert "does not exist" in run("convert", src, out, "--data", tmp_path / "x", status=1)
    assert "not plain text" in run("convert", src, out, "--data", src / "config.json", status=1)
    assert "--dtype" in run("convert", src, out, "--dtype", "int8", status=2)
    (src / "tokenizer.json").unlink()
    (src / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in run("convert", src, out, "--data", texts, status=1)
    assert not out.exists()


def _empty(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    return tmp_path / "empty.txt"


def test_what_exists_is_kept(run, src, tmp_path):
    out = tmp_path / "out"
    run("convert", src, out, "--beta", 0.5)
    assert "add --overwrite" in run("convert", src, out, status=1)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    edit(src, num_hidden_layers=4)
    run("convert", src, out, "--overwrite", status=1)
    assert written == {path.name: path.read_bytes() for path in out.iterdir()}
    edit(src, num_hidden_layers=3)
    run("convert", src, out, "--overwrite")
    assert hp.RevRobertaConfig.from_pretrained(out).beta == 1 / 32
    assert "is the source itself" in run("export", out, out, "--overwrite", status=1)
    assert names_in(tmp_path) == ["out", "stock"]


def test_only_what_this_package_wrote_is_replaced(run, src, tmp_path):
    """Not replaced: somebody else's directory, one with an added file, one that was trained into, and a link."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    out = tmp_path / "out"
    run("convert", src, out)
    (out / "notes").mkdir()
    (out / "notes" / "thesis.txt").write_text("precious")
    trained = tmp_path / "trained"
    run("convert", src, trained)
    hp.RevRobertaForSequenceClassification.from_pretrained(trained, beta=0.5).save_pretrained(trained)
    (tmp_path / "link").symlink_to(trained)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, reason in (
        (mine, "there is no list of what it wrote"),
        (out, "notes/thesis.txt came or went since"),
        (trained, "model.safetensors changed since"),
        (tmp_path / "link", "is a link"),
        (src / "config.json", "is a file"),
        (src, "there is no list of what it wrote"),
        (tmp_path, "there is no list of what it wrote"),
    ):
        for command in ("convert", "bench"):
            options = ("--out", target) if command == "bench" else (target,)
            assert reason in run(command, src, *options, "--overwrite", status=1), target
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_source_within_the_target_is_kept(run, src, tmp_path):
    """It is kept even if this package wrote the target and nothing in it has changed."""
    out = tmp_path / "out"
    run("convert", src, out)
    src.rename(out / "stock")
    files = {path.relative_to(out).as_posix(): digest(path) for path in out.rglob("*") if path.is_file()}
    del files[MANIFEST]
    (out / MANIFEST).write_text(json.dumps({"files": files}))
    assert "holds the source" in run("convert", out / "stock", out, "--overwrite", status=1)
    assert (out / "stock" / "config.json").exists()


PROGRAM = """
import sys, time
from hf_pareprop.tools import cli, conversion
write = conversion.Conversion.write
def slowly(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(30)
conversion.Conversion.write = slowly
cli.main()
"""


def with_default_signals():
    """Set signals to their defaults: tests may run where some are ignored, for example under nohup."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def begin(src, out, *options):
    """Start a conversion that stops after it has written its files and before it moves them to their place."""
    command = [sys.executable, "-c", PROGRAM, "convert", str(src), str(out), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=with_default_signals
    )
    while "written" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_behind(name, src, tmp_path):
    process = begin(src, tmp_path / "new" / "out")
    process.send_signal(getattr(signal, name))
    process.wait(timeout=20)
    assert process.returncode != 0 and names_in(tmp_path) == ["stock"]


@pytest.mark.slow
def test_two_conversions_to_one_place(run, src, tmp_path):
    first = begin(src, tmp_path / "out")
    assert "another process is writing" in run("convert", src, tmp_path / "out", status=1)
    first.kill()
    first.wait()
    assert names_in(tmp_path) == [".out.hf-pareprop", ".out.hf-pareprop-lock", "stock"]
    assert "removed .out.hf-pareprop, which an interrupted run had left" in run("convert", src, tmp_path / "out")
    assert names_in(tmp_path) == ["out", "stock"]


def test_what_a_killed_run_was_replacing_comes_back(run, src, tmp_path):
    run("convert", src, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.hf-pareprop-old")
    assert "exists" in run("convert", src, tmp_path / "out", status=1)
    assert names_in(tmp_path) == ["out", "stock"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_full_disk(command, run, src, tmp_path):
    """A limit on the size of files makes writing the weights fail."""
    old = tmp_path / "old"
    run("convert", src, old)
    before = names_in(old)
    target = tmp_path / "new"
    program = "import sys; from hf_pareprop.tools.cli import main; main()"
    for out, options in ((target, []), (old if command == "convert" else target, ["--overwrite"])):
        result = subprocess.run(
            [sys.executable, "-c", program, command, str(src if command == "convert" else old), str(out), *options],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        )
        assert result.returncode == 1, result.stdout + result.stderr
        assert result.stderr.startswith("error: cannot write") and "Nothing was left there" in result.stderr
    assert names_in(old) == before and names_in(tmp_path) == ["old", "stock"]


def bench(*arguments):
    return ("bench", "--no-compile", "--rounds", 1, *arguments)


@pytest.mark.slow
def test_bench(run, src, texts, tmp_path):
    said = run(*bench(src, "--data", texts, "--batch-size", 3, "--out", tmp_path / "report"))
    found = json.loads((tmp_path / "report" / "bench.json").read_text())
    names = [row["contender"]["name"] for row in found["rows"]]
    assert names[:3] == ["plain training", "gradient checkpointing", "selective checkpointing"]
    ways = ("reprop, beta {}", "pareprop, beta {}", "pareprop, beta {}, budget of gradients")
    assert names[3:] == [way.format(beta) for beta in ("0.03125", "1") for way in ways]
    assert all(len(row["ms"]) == 1 and row["batch_size"] == 3 for row in found["rows"])
    assert all(name in said for name in names) and "largest batch" in said and "states" in said
    assert all((row["activation_bytes"] or 0) > 0 for row in found["rows"] if "selective" not in row["contender"])
    assert all(row["largest_batch"] for row in found["rows"] if "selective" not in row["contender"])
    assert "TrainingArguments(" in said
    assert found["recommendation"] in said and found["torch"] == torch.__version__
    assert names_in(tmp_path / "report") == [MANIFEST, "bench.json", "bench.png"]


@pytest.mark.slow
def test_bench_within_a_cap(run, src, tmp_path):
    """A way that does not fit at the requested batch size is measured at its largest batch."""
    sizes = ("--batch-size", 4096, "--memory-cap", "16MB", "--out", tmp_path / "report")
    said = run(*bench(src, "--max-length", 20, *sizes))
    found = json.loads((tmp_path / "report" / "bench.json").read_text())["rows"]
    rows = {row["contender"]["name"]: row for row in found}
    assert 1 < rows["plain training"]["batch_size"] < rows["reprop, beta 1"]["batch_size"] < 4096
    assert all(sum(row["predicted"].values()) <= 16 * 2**20 for row in rows.values() if row["predicted"])
    assert "Accumulate gradients over" in said and "nothing fits" in said


@pytest.mark.slow
def test_bench_of_a_reversible_checkpoint(run, src, tmp_path):
    run("convert", src, tmp_path / "reversible")
    assert "RevRobertaForSequenceClassification" in run(*bench(tmp_path / "reversible"))


def test_bench_refuses(run, src, tmp_path):
    assert "there is no such directory" in run(*bench(tmp_path / "nowhere"), status=1)
    assert "below the weights" in run(*bench(src, "--memory-cap", "0.1MB"), status=1)
    for cap in ("lots", "16", "-1GB", "0GB"):
        assert "not an amount of memory, such as 16GB" in run(*bench(src, "--memory-cap", cap), status=1)
    assert "beta=0.3" in run(*bench(src, "--beta", 0.3), status=1)
    assert "not a device of PyTorch" in run(*bench(src, "--device", "abacus"), status=1)
    assert "measured on a CPU and on CUDA" in run(*bench(src, "--device", "meta"), status=1)
    if not torch.cuda.is_available():
        assert "finds no CUDA device here" in run(*bench(src, "--device", "cuda"), status=1)
    (tmp_path / "out").mkdir()
    assert "add --overwrite" in run(*bench(src, "--out", tmp_path / "out"), status=1)
    edit(src, architectures=["DistilBertModel"], model_type="distilbert")
    assert "DistilBertModel" in run(*bench(src, "--out", tmp_path / "new"), status=1)
    assert names_in(tmp_path) == ["out", "stock"]


def test_help(run):
    assert all(command in run("--help") for command in ("convert", "export", "verify", "bench"))


def test_sizes_of_the_tests_fit():
    """The sizes that the messages in the tests above name."""
    assert len(WORDS) == FAMILIES["roberta"].row.small_fields["vocab_size"]
    assert FAMILIES["vit"].row.small_fields["image_size"] == 12
