"""MViTv2: at beta = 0 the model of timm, bit for bit; its checkpoints in and out; bad input refused."""

import hashlib
import json

import pytest
import torch
from families import assert_same, gradients, step
from safetensors.torch import load_file, save_file
from timm_alone import import_timm
from transformers import AutoModelForImageClassification, TimmWrapperConfig

import hf_pareprop as hp
from hf_pareprop.configuration_rev_mvit import ARCHITECTURES
from hf_pareprop.tools import cli, timm_checkpoint
from hf_pareprop.tools.timm_checkpoint import save_timm_checkpoint

SMALL = dict(image_size=32, embed_dim=24, depths=[2, 3], num_heads=[1, 3], num_labels=3)
TINY = dict(architecture="mvitv2_tiny", image_size=64, num_channels=1)

PARAMETERS = {
    "mvitv2_tiny": "242 a13594d34b09b0de",
    "mvitv2_small": "380 9cd9b1fa3a04e12b",
    "mvitv2_base": "564 906e3fdc945c9602",
    "mvitv2_large": "1116 474c946de1e1a6db",
    "mvitv2_small_cls": "381 bacb29051e780101",
    "mvitv2_base_cls": "565 9160142ef04b1ecb",
    "mvitv2_large_cls": "1117 3217f692c3694206",
    "mvitv2_huge_cls": "1853 8f45a06423869e3e",
}
"""How many parameters timm's models have, and a digest of their names and shapes in order."""


@pytest.fixture(scope="module")
def timm():
    return import_timm()


@pytest.fixture(scope="module")
def hub(timm, tmp_path_factory):
    """A small checkpoint in the form that timm's have on the Hub, and its model."""
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("mvitv2_tiny", num_classes=5, img_size=64, in_chans=1).eval()
    folder = tmp_path_factory.mktemp("hub")
    save_for_hf(model, folder, safe_serialization=True, model_config=dict(label_names=list("abcde")))
    return folder, model


def build(scale=2.0, **fields):
    torch.manual_seed(0)
    model = hp.RevMViTForImageClassification(hp.RevMViTConfig(**{**SMALL, **fields})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def batch(labels=True, size=32):
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))
    return dict(pixel_values=pixels, labels=torch.tensor([0, 2, 1, 1])) if labels else dict(pixel_values=pixels)


def timm_name(name):
    return name.removeprefix("mvit.")


def listed(parameters):
    return [(timm_name(name), tuple(parameter.shape)) for name, parameter in parameters]


def digest(parameters):
    lines = [f"{name} {shape}" for name, shape in listed(parameters)]
    return f"{len(lines)} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def on_meta(architecture):
    with torch.device("meta"):
        return hp.RevMViTForImageClassification(hp.RevMViTConfig(architecture=architecture, num_labels=1000))


def twin(timm, model):
    """The model of timm with the weights of a reversible one."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = model.config
    names = ("embed_dim", "num_heads", "expand_attn", "use_cls_token")
    cfg = MultiScaleVitCfg(depths=tuple(config.depths), **{name: getattr(config, name) for name in names})
    rate = config.drop_path_rate
    found = MultiScaleVit(cfg, img_size=config.image_size, num_classes=config.num_labels, drop_path_rate=rate)
    found.load_state_dict({timm_name(name): tensor for name, tensor in model.state_dict().items()})
    return found.train(model.training)


def load(cls, folder, **options):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_names_and_shapes_are_those_of_timm(architecture):
    assert digest(on_meta(architecture).named_parameters()) == PARAMETERS[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PARAMETERS)
def test_timm_has_those_names_and_shapes(timm, architecture):
    with torch.device("meta"):
        stock = timm.create_model(architecture, num_classes=1000)
    assert listed(stock.named_parameters()) == listed(on_meta(architecture).named_parameters())
    assert [*stock.state_dict()] == [timm_name(name) for name in on_meta(architecture).state_dict()]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["", "drop path"])
@pytest.mark.parametrize("expand", [False, True], ids=["mlp widens", "attention widens"])
@pytest.mark.parametrize("cls", [False, True], ids=["patches", "cls token"])
def test_beta_0_is_timm(timm, cls, expand, rate, autocast):
    model = build(beta=0.0, use_cls_token=cls, expand_attn=expand, drop_path_rate=rate)
    stock, inputs = twin(timm, model), batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        found = model(**inputs, output_hidden_states=True)
        torch.manual_seed(1)
        logits = stock(inputs["pixel_values"])
        torch.manual_seed(1)
        _, stages = stock.forward_intermediates(inputs["pixel_values"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
    assert torch.equal(found.logits, logits) and torch.equal(found.loss, loss)
    for index, expected in zip((2, 5), stages, strict=True):
        patches = found.hidden_states[index][:, int(cls) :].unflatten(1, expected.shape[2:]).permute(0, 3, 1, 2)
        assert patches.dtype == expected.dtype and torch.equal(patches, expected)
    found.loss.backward()
    loss.backward()
    assert_same({timm_name(name): grad for name, grad in gradients(model).items()}, gradients(stock))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("expand", [False, True], ids=["mlp widens", "attention widens"])
@pytest.mark.parametrize("cls", [False, True], ids=["patches", "cls token"])
@pytest.mark.parametrize("beta", [1.0, 1 / 32])
def test_engines_agree(beta, cls, expand, autocast):
    model = build(beta=beta, use_cls_token=cls, expand_attn=expand, drop_path_rate=0.3)
    loss, expected, state = step(model, batch(), "autograd", autocast=autocast)
    for engine in ("reprop", "pareprop"):
        again, found, state_again = step(model, batch(), engine, autocast=autocast)
        assert torch.equal(again, loss) and torch.equal(state_again, state)
        assert_same(found, expected)


@pytest.mark.parametrize("expand, expected", [(True, (2, 5)), (False, (1, 2, 4, 5))])
def test_blocks_that_change_the_shape_are_known(rebuilt, expand, expected):
    model = build(depths=[2, 3, 1], num_heads=1, expand_attn=expand)
    assert model.config.transitions == expected
    assert tuple(i for i, layer in enumerate(model.encoder_layers) if layer.changes_shape) == expected
    step(model, batch(), "reprop")
    once = {position for position, _ in rebuilt if (position, 1) not in rebuilt}
    assert once == set(expected) and {position for position, _ in rebuilt} == set(range(6))


def test_a_block_may_pool_and_widen_at_once(timm):
    model = build(depths=[1, 1], beta=0.0, expand_attn=False).eval()
    assert model.config.transitions == (0, 1)
    pixels = batch(labels=False)
    with torch.no_grad():
        assert torch.equal(model(**pixels).logits, twin(timm, model)(pixels["pixel_values"]))


def test_outputs():
    model = build(scale=1.0, use_cls_token=True).eval()
    with torch.no_grad():
        found = model.base_model(**batch(labels=False), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape[1:]) for state in found.hidden_states] == [(65, 24)] * 3 + [(17, 48)] * 3
    assert [tuple(map_.shape[1:]) for map_ in found.attentions] == [(1, 65, 5)] * 2 + [(3, 17, 17)] + [(3, 17, 5)] * 2
    assert torch.allclose(found.attentions[0].sum(-1), torch.ones(()))
    assert torch.equal(found.last_hidden_state, model.mvit.norm(found.hidden_states[-1]))
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])
    pooled = build(scale=1.0).eval().base_model(**batch(labels=False))
    assert torch.equal(pooled.pooler_output, pooled.last_hidden_state.mean(1))


def test_new_weights():
    model = build(scale=1.0, use_cls_token=True)
    attention = model.mvit.stages.get_submodule("1.blocks.0.attn")
    assert all(0.005 < p.std() < 0.04 for p in (attention.rel_pos_h, attention.qkv.weight, model.mvit.cls_token))
    assert 0.15 < attention.pool_q.weight.std() < 0.25  # uniform within 1/3


@pytest.mark.parametrize("cls", ["RevMViTForImageClassification", "RevMViTModel"])
def test_a_checkpoint_of_timm_loads(hub, cls):
    folder, stock = hub
    model = load(getattr(hp, cls), folder, beta=0.0)
    config = model.config
    assert (config.architecture, config.image_size, config.num_channels) == ("mvitv2_tiny", 64, 1)
    assert config.id2label == dict(enumerate("abcde")) and config.label2id["c"] == 2
    assert config.timm_pretrained_cfg["license"] == "apache-2.0"
    pixels = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        features = stock.forward_features(pixels)
        assert torch.equal(model.base_model(pixels).last_hidden_state, features)
        if hasattr(model, "head"):
            assert torch.equal(model(pixels).logits, stock.forward_head(features))


@pytest.fixture
def wrapper(timm, monkeypatch):
    """transformers' TimmWrapper, which takes timm for missing without torchvision."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as found

    monkeypatch.setattr(found, "timm", timm, raising=False)
    monkeypatch.setattr(found, "requires_backends", lambda *arguments: None)
    monkeypatch.setattr(timm_checkpoint, "is_timm_available", lambda: True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["RevMViTForImageClassification", "RevMViTModel"])
def test_a_checkpoint_of_the_wrapper_loads(wrapper, tmp_path, cls):
    names = list("abcd")
    config = TimmWrapperConfig(architecture="mvitv2_tiny", num_labels=4, id2label=dict(enumerate(names)))
    stock = wrapper.TimmWrapperForImageClassification(config)
    stock.save_pretrained(tmp_path / "stock")
    assert all(name.startswith("timm_model.") for name in load_file(tmp_path / "stock" / "model.safetensors"))
    model = load(getattr(hp, cls), tmp_path / "stock", beta=0.5)
    assert model.config.id2label == dict(enumerate(names))
    given = stock.timm_model.state_dict()
    assert all(torch.equal(given[timm_name(name)], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == model.state_dict().keys()
    again = load(getattr(hp, cls), tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("head", ["ForImageClassification", "Model"])
def test_a_model_in_the_wrapper_there_and_back(wrapper, head):
    config = TimmWrapperConfig(architecture="mvitv2_tiny", num_labels=4, model_args={"img_size": 64, "in_chans": 1})
    config.id2label, config.label2id = dict(enumerate("abcd")), dict(zip("abcd", range(4), strict=True))
    stock = getattr(wrapper, f"TimmWrapper{head}")(config).eval()
    next(stock.parameters()).requires_grad_(False)
    model = hp.to_reversible(stock, beta=0)
    assert type(model) is getattr(hp, f"RevMViT{head}") and not model.training
    again = hp.to_stock(model)
    assert type(again) is type(stock) and again.config.id2label == model.config.id2label == config.id2label
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in stock.parameters()]
    pixels = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        if head == "Model":
            wanted, found, back = (m(pixels).pooler_output for m in (stock, model, again))
        else:
            wanted, found, back = (m(pixels).logits for m in (stock, model, again))
        assert torch.equal(found, wanted) and torch.equal(back, wanted)


def test_only_the_familys_models_in_the_wrapper_have_a_twin(wrapper):
    stock = wrapper.TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet18"))
    with pytest.raises(
        ValueError, match="'resnet18', which has no reversible twin: of timm's models only MViTv2 has one"
    ):
        hp.to_reversible(stock)


def test_the_way_back_takes_timm(monkeypatch):
    monkeypatch.setattr(timm_checkpoint, "is_timm_available", lambda: False)
    model = hp.RevMViTModel(hp.RevMViTConfig(**TINY))
    with pytest.raises(ImportError, match="pip install timm.*hf-pareprop export writes"):
        hp.to_stock(model)


def test_stock_checkpoints_become_reversible_at_the_default_beta(hub):
    folder, _ = hub
    assert hp.RevMViTConfig.from_pretrained(folder).beta == 1 / 32
    fields = dict(num_labels=7, ignore_mismatched_sizes=True)
    assert hp.RevMViTForImageClassification.from_pretrained(folder, **fields).head.fc.out_features == 7


def test_there_and_back(hub, timm, tmp_path):
    folder, stock = hub
    hp.RevMViTForImageClassification.from_pretrained(folder, beta=1.0).save_pretrained(tmp_path / "rev")
    model = load(AutoModelForImageClassification, tmp_path / "rev")
    assert type(model) is hp.RevMViTForImageClassification and model.config.beta == 1
    save_timm_checkpoint(model, tmp_path / "back")
    assert_files_equal(folder, tmp_path / "back")
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    pixels = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels), stock(pixels))
    assert again.pretrained_cfg["mean"] == [0.449] and again.num_classes == 5  # as saved by timm, of grey images
    assert load(hp.RevMViTForImageClassification, tmp_path / "back").config.id2label == dict(enumerate("abcde"))


def assert_files_equal(folder, other):
    given, found = (load_file(place / "model.safetensors") for place in (folder, other))
    assert given.keys() == found.keys() and all(torch.equal(given[name], found[name]) for name in given)
    given, found = (json.loads((place / "config.json").read_text()) for place in (folder, other))
    for arguments in (given.pop("model_args"), found.pop("model_args")):
        assert arguments["img_size"] in (64, [64, 64]) and arguments["in_chans"] == 1
    assert given == found


def test_a_model_without_a_head_goes_to_timm(timm, tmp_path):
    torch.manual_seed(0)
    model = hp.RevMViTModel(hp.RevMViTConfig(**TINY, beta=0.0)).eval()
    save_timm_checkpoint(model, tmp_path)
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(stock(pixels), model(pixels).pooler_output)
    assert stock.pretrained_cfg["mean"] == [0.449] and stock.num_classes == 0


def test_the_command_exports_for_timm(timm, tmp_path, capsys):
    torch.manual_seed(0)
    model = hp.RevMViTForImageClassification(hp.RevMViTConfig(**TINY, num_labels=3)).eval()
    model.save_pretrained(tmp_path / "rev")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.25], "image_std": [0.5]}
    (tmp_path / "rev" / "preprocessor_config.json").write_text(json.dumps(processor))
    cli.app(["export", str(tmp_path / "rev"), str(tmp_path / "stock")], standalone_mode=False)
    said = capsys.readouterr().out
    assert "timm's mvitv2_tiny" in said and "preprocessor_config.json" in said
    stock = timm.create_model(f"local-dir:{tmp_path / 'stock'}", pretrained=True).eval()
    assert tuple(stock.pretrained_cfg["mean"]) == (0.25,) and stock.num_classes == 3
    model.set_beta(0.0)
    pixels = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(stock(pixels), model(pixels).logits)


def test_what_timm_does_not_have_is_not_exported(tmp_path):
    for fields in (SMALL, {**TINY, "mlp_ratio": 3.0}, {**TINY, "depths": [1, 2, 3, 2]}):
        with pytest.raises(ValueError, match="timm has no MViTv2 with .*mvitv2_huge_cls"):
            save_timm_checkpoint(hp.RevMViTModel(hp.RevMViTConfig(**fields)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(architecture="mvitv2_giant"), "mvitv2_giant.*mvitv2_tiny.*mvitv2_huge_cls"),
        (dict(architecture="resnet50"), "resnet50.*mvitv2_tiny"),
        (dict(model_args=dict(global_pool="")), "global_pool='avg'"),
        (dict(model_args=dict(qk_norm=True)), "qk_norm"),
        (dict(pretrained_cfg=dict(input_size=[3, 64, 96])), "64x96"),
    ],
)
def test_other_checkpoints_of_timm_are_refused(tmp_path, given, message):
    config = {"architecture": "mvitv2_tiny", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **given}))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hp.RevMViTModel.from_pretrained(tmp_path, beta=1.0)


def test_an_architecture_gives_the_fields_that_are_not_given():
    for name, fields in ARCHITECTURES.items():
        config = hp.RevMViTConfig(architecture=name)
        assert {field: getattr(config, field) for field in fields} == {**fields, "depths": [*fields["depths"]]}
        assert config.architecture == name and config.hidden_size == 8 * fields["embed_dim"]
        assert hp.RevMViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config = hp.RevMViTConfig(architecture="mvitv2_large", depths=[1, 1, 2, 1])
    assert config.depths == [1, 1, 2, 1] and config.embed_dim == 144 and not config.expand_attn
    assert config.architecture is None and config.timm_name() is None
    assert hp.RevMViTConfig().timm_name() == "mvitv2_base" and hp.RevMViTConfig().architecture is None


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(architecture="mvitv2_giant"), "mvitv2_giant.*mvitv2_tiny.*mvitv2_huge_cls"),
        (dict(depths=[]), r"depths=\[\]"),
        (dict(depths=[2, 0]), r"depths=\[2, 0\]"),
        (dict(embed_dim=[24]), r"embed_dim=\[24\].*2 stages"),
        (dict(num_heads=[1, 2, 4]), r"num_heads=\[1, 2, 4\].*2 stages"),
        (dict(embed_dim=25, num_heads=3), "width of 25 and 3 heads"),
        (dict(image_size=36), "image_size=36.*multiple of 8 such as 56"),
        (dict(image_size=0), "image_size=0.*multiple of 8"),
        (dict(image_size=[32, 40]), "image_size=.32, 40.*one number"),
        (dict(drop_path_rate=1.0), "drop_path_rate=1.0"),
        (dict(hidden_dropout_prob=-0.1), "hidden_dropout_prob=-0.1"),
        (dict(mlp_ratio=0.0), "mlp_ratio=0.0"),
        (dict(beta=[1.0] * 4), "beta"),
    ],
)
def test_bad_configurations_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        hp.RevMViTConfig(**{**SMALL, **given})


def test_a_configuration_is_checked_again_when_a_model_is_made_or_loaded(tmp_path):
    config = hp.RevMViTConfig(architecture="mvitv2_tiny")
    config.depths = [1, 2, 5, 3]
    with pytest.raises(ValueError, match="architecture='mvitv2_tiny'.*depths=.1, 2, 5, 3.*None"):
        hp.RevMViTModel(config)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size=36"):
        hp.RevMViTModel.from_pretrained(tmp_path, image_size=36)


def test_images_of_another_size_are_refused():
    model = build()
    for shape, message in (
        ((1, 3, 24, 24), "24x24.*32x32"),
        ((1, 3, 32, 40), "32x40.*32x32"),
        ((1, 1, 32, 32), "1 channels.*3"),
        ((3, 32, 32), "not images"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="pixel_values"):
        model()


def test_drop_path_rates_do_not_depend_on_the_dtype(tmp_path):
    build(drop_path_rate=0.3).save_pretrained(tmp_path)
    half = hp.RevMViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rates = [layer.drop_path.drop_prob for layer in half.encoder_layers]
    assert rates == torch.linspace(0, 0.3, 5).tolist() and half.dtype == torch.bfloat16


@pytest.mark.parametrize("stages", [1, 3])
def test_depth_fields(stages):
    config = hp.RevMViTConfig(**hp.RevMViTConfig.depth_fields(4, stages))
    assert config.stage_depths == (1,) * (stages - 1) + (4,) and config.num_hidden_layers == stages + 3
