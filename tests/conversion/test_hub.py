"""A model that is saved or pushed loads where hf_pareprop is not installed, can be trained there, and saved again."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import PREAMBLE
from families import FAMILIES
from loopback import USER, Hub
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_pareprop as hp

PACKAGE = Path(hp.__file__).parent

# Arguments: a directory or repository, the reference file, Auto class.
STRANGER = f"""{PREAMBLE}
source, reference, auto, again = sys.argv[1:5]
batch, logits = torch.load(reference)
cls = getattr(transformers, auto)
model = cls.from_pretrained(source, trust_remote_code=True)
assert torch.equal(model.eval()(**batch).logits, logits)
assert model.config.backward_engine == "pareprop"
optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
model(**batch).loss.backward()
assert all(p.grad is not None for layer in model.encoder_layers for p in layer.parameters())
optimizer.step()
trained = model.eval()(**batch).logits
assert not torch.equal(trained, logits)
model.save_pretrained(again)
reloaded = cls.from_pretrained(again, trust_remote_code=True).eval()
assert torch.equal(reloaded(**batch).logits, trained)
for other in sys.argv[5:]:
    getattr(transformers, other).from_pretrained(again, trust_remote_code=True)
print("LOADED")
"""


@pytest.fixture
def env(tmp_path):
    """A process environment without a network, with caches of its own."""
    return {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def stranger(env, cwd, *args):
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert "LOADED" in result.stdout, result.stderr[-2000:]


def reference_for(family, model, path):
    batch = family.batch()
    torch.save((batch, model.eval()(**batch).logits.detach()), path)


@pytest.mark.parametrize("beta", [pytest.param(1.0, marks=pytest.mark.slow), [0.5, 0, 0.25]])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_loads_elsewhere(name, beta, tmp_path, env):
    family = FAMILIES[name]
    model = family.build(3, 0.1, beta=beta)
    model.save_pretrained(tmp_path / "model")
    reference_for(family, model, tmp_path / "reference.pt")
    auto = next(a for a, c in model.auto_map.items() if c.endswith("." + type(model).__name__))
    others = [
        a for a in model.auto_map if a not in (auto, "AutoModelForMultipleChoice", "AutoBackbone")
    ]  # that one reads no folders
    stranger(env, tmp_path, tmp_path / "model", tmp_path / "reference.pt", auto, tmp_path / "again", *others)


def test_the_auto_map_names_every_head(family, tmp_path):
    model = family.build(1)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == model.auto_map
    for reference in model.auto_map.values():
        module, cls = reference.split(".")
        mark, _, code = (tmp_path / f"{module}.py").read_text().partition("\n")
        assert mark.startswith("# Written by hf_pareprop") and code == (PACKAGE / f"{module}.py").read_text()
        assert hasattr(sys.modules[f"hf_pareprop.{module}"], cls)
        assert getattr(hp, cls).__module__ == f"hf_pareprop.{module}"


@pytest.mark.parametrize("content", ["# mine", "# Written by hf_pareprop, SHA-256 0\n", None])
def test_code_of_somebody_else_is_not_replaced(content, tmp_path):
    """Code of the package that was changed afterwards is not replaced either."""
    model = FAMILIES["vit"].build(1)
    file = tmp_path / "engine.py"
    if content is None:
        model.save_pretrained(tmp_path)
        content = file.read_text() + "# mine"
    file.write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="engine.py is not replaced by the code of the model"):
        model.save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    file.unlink()
    for _ in range(2):  # its own is
        model.save_pretrained(tmp_path)


def test_auto_classes_know_the_package(tmp_path):
    """If the package is installed, its code is used, and trust_remote_code is not needed."""
    model = FAMILIES["roberta"].build(1)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path)) is hp.RevRobertaModel
    assert type(AutoModel.from_config(hp.RevViTConfig(num_hidden_layers=1))) is hp.RevViTModel


@pytest.mark.slow
def test_push_to_hub_and_back(tmp_path, env):
    family = FAMILIES["roberta"]
    model = family.build(2, 0.1, beta=0.5)
    model.save_pretrained(tmp_path / "local")
    reference_for(family, model, tmp_path / "reference.pt")
    hub = Hub()
    env = {**env, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token"}
    del env["HF_HUB_OFFLINE"]
    push = (
        "import sys, hf_pareprop as hp; "
        "m = hp.RevRobertaForSequenceClassification.from_pretrained(sys.argv[1]); m.push_to_hub('small')"
    )
    try:
        command = [sys.executable, "-W", "ignore", "-c", push, str(tmp_path / "local")]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr[-2000:]
        files = hub.repositories[f"{USER}/small"].files
        assert {
            "config.json",
            "model.safetensors",
            "modeling_rev_roberta.py",
            "engine.py",
            "README.md",
        } <= files.keys()
        assert b"hf_pareprop" in files["README.md"]
        stranger(
            env,
            tmp_path,
            f"{USER}/small",
            tmp_path / "reference.pt",
            "AutoModelForSequenceClassification",
            tmp_path / "again",
            "AutoModelForMaskedLM",
        )
    finally:
        hub.stop()


def test_a_subclass_that_fsdp_derives_is_saved_as_the_original(tmp_path):
    """FSDP2 changes the class of a model to one defined in torch, whose file must not be saved as the model's code."""
    model = FAMILIES["vit"].build(1)
    cls = type(model)
    model.__class__ = type(f"FSDP{cls.__name__}", (cls,), {"__module__": "torch.distributed.fsdp"})
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == cls.auto_map
    assert config.architectures == [cls.__name__]
    assert (tmp_path / "modeling_rev_vit.py").exists()


def runtime_files():
    return sorted(file for file in PACKAGE.glob("*.py") if file.name not in ("__init__.py", "version.py"))


@pytest.mark.parametrize("file", runtime_files(), ids=lambda file: file.name)
def test_runtime_files_travel(file):
    """They only use `from .sibling import name`: transformers cannot copy other imports next to a checkpoint."""
    siblings = {f.stem for f in runtime_files()}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                top = name.split(".")[0]
                optional = {"triton"} if file.name == "fused.py" else set()
                assert top in {"torch", "transformers"} | optional or top in sys.stdlib_module_names, name


@pytest.mark.slow
def test_triton_is_optional():
    """Only builds of PyTorch for CUDA include Triton."""
    code = "import sys; sys.modules['triton'] = None; from hf_pareprop import coupling; print(coupling.runs_fused(None, None, None))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr[-2000:]


def engine_files():
    of_models = ("configuration_", "modeling_", "adapters", "blocks", "heads", "remote_code", "stock_")
    return [file.stem for file in runtime_files() if not file.stem.startswith(of_models)]


@pytest.mark.parametrize("name", engine_files())
def test_the_engine_knows_nothing_of_transformers(name):
    assert "transformers" not in {
        alias.split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
        for alias in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_code_is_written_once(family, tmp_path, monkeypatch):
    """A model, its configuration and transformers each try to write it."""
    written = []
    for name in ("write_bytes", "write_text"):
        write = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda self, *a, write=write, **k: (written.append(self.name), write(self, *a, **k))
        )
    monkeypatch.setattr(shutil, "copy", lambda *args: pytest.fail(f"copies {args}"))
    family.build(1).save_pretrained(tmp_path)
    assert sorted(written) == sorted(path.name for path in tmp_path.glob("*.py"))


def test_a_configuration_alone_carries_its_code(tmp_path):
    hp.RevViTConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_rev_vit.RevViTConfig"
    }
    assert {"configuration_rev_vit.py", "configuration_reversible.py", "plan.py"} <= set(os.listdir(tmp_path))
