"""Compare RevSwin with the stock model: what it computes, which inputs it accepts, and that images are independent."""

import pytest
import torch
import transformers
from families import assert_same, gradients

import hf_pareprop as hp

FIELDS = dict(image_size=24, patch_size=2, embed_dim=24, depths=[2, 3], num_heads=[3, 6], window_size=3, num_labels=3)
FIELDS |= dict(encoder_stride=4)
HEADS = ("Model", "ForImageClassification", "ForMaskedImageModeling", "Backbone")
SIZES = [(24, 24), (30, 22), (12, 40)]
"""Windows fit; do not fit, so that stages are padded; and are longer than high."""


def stock(head="ForImageClassification", **fields):
    """A stock model with weights in which no symmetry hides errors."""
    torch.manual_seed(0)
    model = getattr(transformers, f"Swin{head}")(transformers.SwinConfig(**{**FIELDS, **fields})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(size, count=4):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def loss_of(model, size, autocast=False):
    """A loss on the outputs of the head and of every stage."""
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(
            images(size),
            labels=torch.tensor([0, 1, 2, 0]),
            interpolate_pos_encoding=True,
            output_hidden_states=True,
        )
        loss = outputs.loss + sum(states.float().square().mean() for states in outputs.hidden_states)
    loss.backward()
    return loss.detach(), outputs, torch.get_rng_state()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "drop", [{}, {"drop_path_rate": 0.4, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}]
)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_at_beta_0_is_the_stock_one(size, attention, drop, absolute, autocast):
    theirs = stock(use_absolute_embeddings=absolute, attn_implementation=attention, **{"drop_path_rate": 0.0} | drop)
    ours = hp.to_reversible(theirs, beta=0.0)
    (loss, outputs, rng), (our_loss, our_outputs, our_rng) = (
        loss_of(model, size, autocast) for model in (theirs, ours)
    )
    assert torch.equal(loss, our_loss) and torch.equal(rng, our_rng)
    assert outputs.keys() == our_outputs.keys()
    for name in ("hidden_states", "reshaped_hidden_states"):
        assert all(torch.equal(a, b) for a, b in zip(outputs[name], our_outputs[name], strict=True))
    back = hp.to_stock(ours)
    for parameter, ours_of in zip(back.parameters(), hp.to_stock(with_gradients(ours)).parameters(), strict=True):
        parameter.grad = ours_of.data
    assert_same(gradients(theirs), gradients(back))


def with_gradients(model):
    """A copy of a model whose parameters are the gradients of ``model``, so that converting it renames them."""
    twin = type(model)(model.config)
    for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.data = source.grad.clone()
    return twin


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_reads_stock_checkpoints_and_returns_what_the_stock_one_does(tmp_path, head, attention):
    theirs = stock(head, attn_implementation=attention).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = getattr(hp, f"RevSwin{head}").from_pretrained(
        tmp_path, beta=0.0, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values())
    inputs = {"pixel_values": images((24, 24))}
    if head == "ForMaskedImageModeling":
        inputs["bool_masked_pos"] = torch.arange(4 * 144).view(4, 144) % 3 == 0
    options = {"output_hidden_states": True} | ({"output_attentions": True} if attention == "eager" else {})
    with torch.no_grad():
        a, b = theirs(**inputs, **options), ours.eval()(**inputs, **options)
    assert a.keys() == b.keys() and "hidden_states" in a
    for name in a:
        for x, y in zip(*(v if isinstance(v, tuple) else (v,) for v in (a[name], b[name])), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("beta", [1.0, 0.25, [0.5, 0, 1.0, 0, 0.25], [0, 0, 0.5, 0.5, 0.5]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_with_a_loss_on_every_stage(beta, attention, size, autocast):
    """A list `beta` counts the layers of all stages."""
    model = hp.to_reversible(stock(drop_path_rate=0.4, attn_implementation=attention), beta=beta)
    found = {}
    for engine in ("autograd", "reprop", "pareprop"):
        model.set_backward_engine(engine)
        found[engine] = loss_of(model, size, autocast)[0], gradients(model)
        assert torch.equal(found[engine][0], found["autograd"][0])
        assert_same(found["autograd"][1], found[engine][1])


def test_an_image_leaves_nothing_behind():
    """In the stock model an image as small as a window permanently shrinks windows and turns shifts off."""
    model = hp.to_reversible(stock()).eval()
    with torch.no_grad():
        before = model(images((24, 24))).logits
        for size in ((12, 12), (14, 40), (24, 12)):
            model(images(size))
        assert torch.equal(model(images((24, 24))).logits, before)


@pytest.mark.parametrize("size", [(24, 24), (24, 40), (16, 32)])
def test_masked_image_modeling_of_any_size(size):
    model = hp.to_reversible(stock("ForMaskedImageModeling"), beta=0.5)
    patches = size[0] * size[1] // 4
    mask = torch.arange(4 * patches).view(4, patches) % 2
    found = model(images(size), bool_masked_pos=mask)
    assert found.reconstruction.shape == (4, 3, *size)
    error = (found.reconstruction - images(size)).abs()
    masked = mask.view(4, 1, size[0] // 2, size[1] // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert found.loss.item() == pytest.approx(((error * masked).sum() / masked.sum() / 3).item(), rel=1e-5)


@pytest.mark.parametrize("size", [(24, 24), (10, 14), (6, 6), (3, 5)])
@pytest.mark.parametrize("out_features", [["stage1", "stage2"], ["stem", "stage2"]])
def test_the_backbone(size, out_features):
    """It pads stages that are smaller than a window, as the stock one does."""
    theirs = stock("Backbone", out_features=out_features).eval()
    ours = hp.to_reversible(theirs, beta=0.0)
    assert ours.channels == theirs.channels
    for a, b in zip(theirs(images(size)).feature_maps, ours(images(size)).feature_maps, strict=True):
        assert torch.equal(a, b)
    auto = transformers.AutoBackbone.from_config(ours.config)
    assert type(auto) is hp.RevSwinBackbone
    reversible, found = hp.to_reversible(theirs, beta=0.5).train(), []
    for engine in ("autograd", "pareprop"):
        reversible.set_backward_engine(engine)
        reversible.zero_grad()
        sum(feature.square().sum() for feature in reversible(images(size)).feature_maps).backward()
        found.append(gradients(reversible))
    assert_same(*found)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(num_heads=[3]),
            r"depths=\[2, 3\] has 2 stages and num_heads=\[3\] has 1: give both one number for each",
        ),
        (dict(depths=[2, 0]), r"depths=\[2, 0\]: every stage needs one layer or more"),
        (dict(window_size=0), "window_size=0: a window needs one patch or more"),
        (dict(beta=[0.5, 0.5]), "beta has 2 entries but the model has 5 layers"),
        (dict(beta=0.3), "beta=0.3 is not 0, 1 or a negative power of two"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        hp.RevSwinConfig(**{**FIELDS, **fields})


def test_heads_that_do_not_divide_a_stage():
    with pytest.raises(ValueError, match="a width of 48 is not a multiple of 5 attention heads"):
        hp.RevSwinModel(hp.RevSwinConfig(**{**FIELDS, "num_heads": [3, 5]}))


def test_images_that_do_not_fit():
    model = hp.to_reversible(stock()).eval()
    with pytest.raises(ValueError, match="a stage has 2x6 patches, fewer than a window of window_size=3 on a side"):
        model(images((8, 24)))
    with pytest.raises(ValueError, match="the images have 1 channels, the model was built for 3"):
        model(torch.randn(2, 1, 24, 24))
    with pytest.raises(ValueError, match=r"shape \(3, 24, 24\) are not images of \(batch, channels, height, width\)"):
        model(torch.randn(3, 24, 24))
    absolute = hp.to_reversible(stock(use_absolute_embeddings=True))
    with pytest.raises(
        ValueError, match=r"have 15x12 patches, .* positions for 12x12: .*interpolate_pos_encoding=True"
    ):
        absolute(images((30, 24)))
    masked = hp.to_reversible(stock("ForMaskedImageModeling", encoder_stride=8))
    with pytest.raises(ValueError, match="reconstructed with 48x48: encoder_stride=8 has to lead back"):
        masked(images((24, 24)), bool_masked_pos=torch.zeros(4, 144))
    with pytest.raises(ValueError, match="bool_masked_pos needs a mask token"):
        hp.RevSwinModel(hp.RevSwinConfig(**FIELDS))(images((24, 24)), bool_masked_pos=torch.zeros(4, 144))
