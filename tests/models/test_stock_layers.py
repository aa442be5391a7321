"""Stock models that keep their layers: reversible by class, in gradients, generation, conversion and remote code."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial

import peft
import pytest
import torch
import transformers
from elsewhere import PREAMBLE
from families import assert_same, cast, gradients, step
from stock_models import DECODER, FIELDS, LLAMA_LIKE, stock_batch, stock_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_pareprop as hp
from hf_pareprop import stock_families
from hf_pareprop.tools.memory import memory_growth

BETAS = {"1": 1.0, "1/2": 0.5, "1/128": 1 / 128, "mixed": [0.5, 0, 1.0], "0": 0}


def reversible(name, **fields):
    return hp.to_reversible(stock_model(name), **fields)


def assert_engines_agree(model, batch, rebuilt, steps=1, **options):
    loss, grads, rng = step(model, batch, "autograd", **options)
    assert len(grads) > 2 and all(torch.isfinite(g).all() for g in grads.values())
    coupled = [i for i, plan in enumerate(model.layer_plans) if plan.reversible]
    for engine in ("reprop", "pareprop"):
        rebuilt.clear()
        again = step(model, batch, engine, **options)
        assert sorted(rebuilt) == [(i, j) for i in coupled for j in range(steps)]
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])
        assert torch.equal(rng, again[2])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("beta", BETAS)
def test_engines_agree_with_autograd(name, attention, precision, beta, rebuilt):
    model, batch = reversible(name, beta=BETAS[beta]), stock_batch(name)
    model.set_attn_implementation(attention)
    if precision == "bf16":
        model, batch = model.to(torch.bfloat16), cast(batch, torch.bfloat16)
    assert_engines_agree(model, batch, rebuilt, autocast=precision == "autocast")


@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("beta", BETAS)
def test_sub_blocks_of_models_like_llama(name, precision, beta, rebuilt):
    model, batch = reversible(name, beta=BETAS[beta], steps="sublayer"), stock_batch(name)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    assert_engines_agree(model, batch, rebuilt, steps=2, autocast=precision == "autocast")


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("steps", ["layer", "sublayer"])
@pytest.mark.parametrize("beta", [1.0, 1 / 128])
def test_cuda_engines_agree(name, steps, beta):
    """Dropout of attention is drawn on the device. A rebuild draws it again while gradients of another layer are computed."""
    if steps == "sublayer" and name not in LLAMA_LIKE:
        pytest.skip("has no sub-blocks")
    model = reversible(name, beta=beta, steps=steps).cuda()
    batch = {each: tensor.cuda() for each, tensor in stock_batch(name).items()}
    loss, grads, _ = step(model, batch, "autograd", autocast=True)
    for engine in ("reprop", "pareprop"):
        again = step(model, batch, engine, autocast=True)
        assert torch.equal(loss, again[0])
        assert_same(grads, again[1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIELDS)
def test_cuda_replays_are_ordinary_steps(name):
    model = reversible(name, beta=0.5).cuda()
    batch = {each: tensor.cuda() for each, tensor in stock_batch(name).items() if each != "attention_mask"}
    graphed = hp.GraphedStep(model, batch, autocast=torch.bfloat16)
    torch.manual_seed(7)
    loss, found = graphed(**batch).clone(), gradients(model)
    reference = step(model, batch, "autograd", autocast=True)
    assert torch.equal(loss, reference[0])
    assert_same(found, reference[1])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("steps", ["layer", "sublayer"])
def test_the_stock_model_at_beta_0(name, steps):
    if steps == "sublayer" and name not in LLAMA_LIKE:
        with pytest.raises(ValueError, match="steps='sublayer'.*Use steps='layer'"):
            reversible(name, steps=steps)
        return
    stock, batch = stock_model(name), stock_batch(name)
    model = hp.to_reversible(stock, beta=0, steps=steps)
    found = []
    for each in (stock, model):
        torch.manual_seed(7)
        output = each(**batch, output_hidden_states=True)
        output.loss.backward()
        found.append((output, {n: p.grad for n, p in each.named_parameters() if p.grad is not None}))
    (a, grads), (b, again) = found
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True))
    assert_same(grads, again)


@pytest.mark.parametrize("name", FIELDS)
def test_there_and_back(name):
    """The defaults of converted weights; the stock model is left as it is, and returns with the same tensors and classes."""
    stock = stock_model(name)
    before, classes = copy.deepcopy(stock.state_dict()), [type(m) for m in stock.modules()]
    model = hp.to_reversible(stock)
    assert (model.config.beta, model.config.steps, model.config.grid_bits) == (1 / 128, "layer", 12)
    assert type(model) is getattr(hp, f"Rev{name}") and isinstance(model, type(stock)) and model.training
    assert [type(m) for m in stock.modules()] == classes and not hasattr(stock.config, "beta")
    back = hp.to_stock(model)
    assert [type(m) for m in back.modules()] == classes and back.config.to_dict() == stock.config.to_dict()
    for state in (model.state_dict(), back.state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)
    step(back, stock_batch(name))
    again = hp.to_reversible(model, beta=0.5)
    assert again.config.beta == 0.5 and model.config.beta == 1 / 128


def test_wrong_fields():
    with pytest.raises(TypeError, match="RevLlamaConfig has no field 'betta'"):
        hp.to_reversible(stock_model("LlamaForCausalLM"), betta=1)
    wrong = {"beta": 0.3, "grid_bits": 0, "memory_budget": 1, "steps": "block", "compile_steps": 1}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=f"{field}="):
            hp.to_reversible(stock_model("LlamaForCausalLM"), **{field: value})


@pytest.mark.parametrize("name", FIELDS)
def test_from_scratch(name, rebuilt):
    """Models made from their configurations have beta 1."""
    cls = getattr(hp, f"Rev{name}")
    torch.manual_seed(0)
    model = cls(cls.config_class(**FIELDS[name])).train()
    assert model.config.beta == 1
    assert_engines_agree(model, stock_batch(name), rebuilt)


@pytest.mark.parametrize("name", FIELDS)
def test_stock_checkpoints_load(name, tmp_path):
    """They load directly, with other arguments of from_pretrained. Auto classes load a reversible checkpoint."""
    stock, batch = stock_model(name).eval(), stock_batch(name)
    stock.save_pretrained(tmp_path / "stock")
    cls = getattr(hp, f"Rev{name}")
    model, info = cls.from_pretrained(tmp_path / "stock", beta=0, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
    model = cls.from_pretrained(tmp_path / "stock", dtype=torch.bfloat16, backward_engine="reprop")
    assert (model.dtype, model.config.beta, model.config.backward_engine) == (torch.bfloat16, 1 / 128, "reprop")
    with pytest.raises(ValueError, match="beta=0.3"):
        cls.from_pretrained(tmp_path / "stock", beta=0.3)
    hp.to_reversible(str(tmp_path / "stock"), beta=0.25).eval().save_pretrained(tmp_path / "reversible")
    auto = next(auto for auto, path in cls.auto_map.items() if path.endswith(f".{cls.__name__}"))
    again = getattr(transformers, auto).from_pretrained(tmp_path / "reversible")
    assert type(again) is cls and again.config.beta == 0.25
    assert cls.from_pretrained(tmp_path / "reversible", beta=1.0).config.beta == 1


STRANGER = f"""{PREAMBLE}
source, reference, again = sys.argv[1:4]
autos = sys.argv[4:]
batch, logits = torch.load(reference)
model = getattr(transformers, autos[0]).from_pretrained(source, trust_remote_code=True)
assert torch.equal(model.eval()(**batch).logits, logits)
model.train()(**batch).loss.backward()
assert all(p.grad is not None for layer in model.encoder_layers for p in layer.parameters() if p.requires_grad)
model.save_pretrained(again)
for auto in autos:
    found = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True)
    assert type(found).__name__.startswith("Rev") and type(found.encoder_layers[0]).__name__.startswith("Rev"), type(found)
print("LOADED")
"""


@pytest.mark.parametrize(
    "name", [name if "Llama" in name else pytest.param(name, marks=pytest.mark.slow) for name in FIELDS]
)
def test_remote_code(name, tmp_path):
    """Every head of the family loads where the package is not installed."""
    model, batch = reversible(name, beta=0.5).eval(), stock_batch(name)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), tmp_path / "reference.pt")
    autos = [auto for auto in model.auto_map if auto != "AutoConfig"]
    autos.sort(key=lambda auto: not model.auto_map[auto].endswith(f".{type(model).__name__}"))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    arguments = [tmp_path / "model", tmp_path / "reference.pt", tmp_path / "again", *autos]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=300,
    )
    assert "LOADED" in result.stdout, result.stderr[-2000:]


DECODERS = [name for name in FIELDS if name.endswith(("ForCausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("steps", ["layer", "sublayer"])
def test_generation_with_a_cache(name, options, steps):
    """With a cache the tokens are the same as without one, for prompts that are padded on the left."""
    if steps == "sublayer" and name not in LLAMA_LIKE:
        pytest.skip("it has no sub-blocks")
    model = reversible(name, beta=1 / 32, steps=steps).eval()
    prompts = stock_batch(name)["input_ids"][:, :6].clone()
    prompts[0, :3] = 0
    common = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=(prompts != 0).long())
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    expected = model.generate(prompts, use_cache=False, **beams, **common)
    assert torch.equal(model.generate(prompts, use_cache=True, **options, **common), expected)
    assert expected.unique().numel() > 3


def cache_in(output):
    return output.get("cache", output.get("past_key_values"))


@pytest.mark.parametrize("name", DECODERS)
def test_no_cache_in_training(name, rebuilt):
    """A rebuild would write to a cache a second time. If a cache is given, or asked for in eval mode, activations are stored."""
    model, batch = reversible(name, beta=0.5), stock_batch(name)
    for engine in ("autograd", "reprop"):
        model.set_backward_engine(engine)
        assert cache_in(model(**batch)) is None
        assert cache_in(model(**batch, use_cache=True)) is None
    model.eval()
    ids = batch["input_ids"]
    found = []
    for engine in ("autograd", "reprop"):
        model.set_backward_engine(engine)
        model.zero_grad(set_to_none=True)
        cache = cache_in(model(input_ids=ids[:, :6], use_cache=True))
        assert cache.get_seq_length() == 6
        argument = "past_key_values"  # transformers renamed it, and takes both
        model(input_ids=ids[:, 6:], **{argument: cache}).logits.sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert not rebuilt
    assert_same(*found)


@pytest.mark.parametrize("name", FIELDS)
def test_adapters(name):
    """LoRA and DoRA on every linear layer."""
    # PEFT makes new parameters of the transposed weights of GPT-2 in every forward pass with DoRA, which is refused.
    for dora in (False, True) if name != "GPT2LMHeadModel" else (False,):
        found = []
        for engine in ("autograd", "reprop", "pareprop"):
            model = reversible(name, beta=1 / 8)
            torch.manual_seed(2)
            config = peft.LoraConfig(
                r=2, target_modules="all-linear", use_dora=dora, lora_dropout=0.1, init_lora_weights=False
            )
            wrapped = peft.get_peft_model(model, config).train()
            model.set_backward_engine(engine)
            torch.manual_seed(3)
            wrapped(**stock_batch(name)).loss.backward()
            found.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
        assert len(found[0]) >= 12
        assert_same(found[0], found[1])
        assert_same(found[0], found[2])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens(kind):
    """Prompts reach the layers as hidden states. Prefixes reach them as a cache, so activations are stored."""
    found = []
    for engine in ("autograd", "reprop"):
        model = reversible("LlamaForCausalLM", beta=1 / 8)
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
        model.set_backward_engine(engine)
        torch.manual_seed(3)
        wrapped(**stock_batch("LlamaForCausalLM")).loss.backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    assert found[0] and all(g.abs().sum() > 0 for g in found[0].values())
    assert_same(*found)


def test_packed_sequences(rebuilt):
    """Position ids start again within a row. The stock model handles them if it has no cache."""
    ids = stock_batch("LlamaForCausalLM")["input_ids"]
    positions = torch.cat([torch.arange(6), torch.arange(8)]).expand(3, -1)
    batch = dict(input_ids=ids, position_ids=positions, labels=ids)
    stock = stock_model("LlamaForCausalLM").eval()
    model = hp.to_reversible(stock, beta=0)
    with torch.no_grad():
        expected = stock(**batch, use_cache=False).logits
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
        assert not torch.equal(stock(input_ids=ids, use_cache=False).logits, expected)
    assert_engines_agree(hp.to_reversible(stock, beta=0.25).train(), batch, rebuilt)


def test_tied_weights(tmp_path, rebuilt):
    model = hp.to_reversible(stock_model("LlamaForCausalLM", tie_word_embeddings=True), beta=0.5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for each in (model, again, hp.to_stock(model), copy.deepcopy(model)):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    assert_engines_agree(model, stock_batch("LlamaForCausalLM"), rebuilt)


def test_logits_to_keep():
    model = reversible("LlamaForCausalLM")
    ids = stock_batch("LlamaForCausalLM")["input_ids"]
    assert model(input_ids=ids, logits_to_keep=2).logits.shape == (3, 2, 97)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_variants_of_rotary_positions(kind, rebuilt):
    more = {"yarn": {}, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **more.get(kind, {})}
    if kind in more:
        rope["original_max_position_embeddings"] = 32
    model = hp.to_reversible(stock_model("LlamaForCausalLM", rope_parameters=rope), beta=0.5)
    assert_engines_agree(model, stock_batch("LlamaForCausalLM"), rebuilt)


def test_outputs_that_are_asked_for(rebuilt):
    """Hidden states are what layers return, and losses on them are right. Attention maps need stored activations."""
    model, batch = reversible("LlamaForCausalLM", beta=0.5), stock_batch("LlamaForCausalLM")
    found = []
    for engine in ("autograd", "reprop", "pareprop"):
        model.set_backward_engine(engine)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        output = model(**batch, output_hidden_states=True)
        assert len(output.hidden_states) == 4
        (output.loss + sum(h.square().mean() for h in output.hidden_states)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert len(rebuilt) == 6
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    rebuilt.clear()
    model.set_attn_implementation("eager")
    output = model(**batch, output_attentions=True)
    assert [a.shape for a in output.attentions] == [(3, 4, 14, 14)] * 3
    output.loss.backward()
    assert not rebuilt


def test_other_uses(rebuilt):
    """Copies, pickles, one beta per layer, fewer layers, activation checkpointing that scripts switch on."""
    batch = stock_batch("LlamaForCausalLM")
    for model in (
        copy.deepcopy(reversible("LlamaForCausalLM", beta=0.5)),
        pickle.loads(pickle.dumps(reversible("LlamaForCausalLM", beta=0.5))),
    ):
        assert_engines_agree(model, batch, rebuilt)
    model.set_beta([0.5, 0, 1.0])
    assert_engines_agree(model, batch, rebuilt)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_engines_agree(model, batch, rebuilt)
    model.gradient_checkpointing_disable()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.beta = 2, 0.5
    assert_engines_agree(model, batch, rebuilt)
    assert inspect.signature(model.model.forward) == inspect.signature(hp.to_stock(model).model.forward)


def test_memory_does_not_grow_with_depth():
    model = reversible("LlamaForCausalLM", beta=1 / 128)
    ids = torch.randint(3, 97, (8, 60))
    found = memory_growth(model.train(), dict(input_ids=ids, labels=ids))
    assert found.stored > 100_000 and found.share < 0.05


def test_states_out_of_range():
    stock = stock_model("LlamaForCausalLM")
    with torch.no_grad():
        stock.model.embed_tokens.weight.mul_(1e7)
    model, batch = hp.to_reversible(stock, beta=0.25), stock_batch("LlamaForCausalLM")
    assert model(**batch).loss.isnan()
    with pytest.warns(UserWarning, match="at grid_bits=12 they have to stay below 262144"):
        model(**batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_left_out_or_run_again_by_others(reentrant):
    batch = stock_batch("LlamaForCausalLM")
    model = reversible("LlamaForCausalLM", beta=0.5)
    model.config.num_hidden_layers = 2
    with pytest.raises(RuntimeError, match="ran 2 of 3 layers: a layer that is left out"):
        model(**batch)
    model = reversible("LlamaForCausalLM", beta=0.5)
    with pytest.raises(RuntimeError, match="called outside of the forward pass of its model"):
        model.model.layers[0](torch.zeros(1, 3, 32))
    reference = step(model, batch, "autograd")[1]
    for layer in model.model.layers:
        layer.forward = lambda *args, forward=layer.forward, **kwargs: checkpoint(
            partial(forward, **kwargs), *args, use_reentrant=reentrant
        )
    if reentrant:
        with pytest.raises(RuntimeError, match="somebody else's checkpointing"):
            step(model, batch, "reprop")
    else:  # it finds nothing to store, and so nothing to run again
        assert_same(reference, step(model, batch, "reprop")[1])


OTHERS = {
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "CohereForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Lfm2ForCausalLM": {},
    "ElectraForMaskedLM": {},
    "MambaForCausalLM": {"state_size": 4},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},  # which calls the decoder in its base model
}


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_without_a_name(name, rebuilt, tmp_path):
    """They are tested when they are converted. They cannot be saved, because there is no code to save with them."""
    stock = stock_model(name, **OTHERS[name])
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{name} has no reversible twin: .*to_reversible.model, steps='layer'"):
        hp.to_reversible(stock, beta=0.25)
    model = hp.to_reversible(stock, beta=0.25, steps="layer")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in model.parameters())
    assert_engines_agree(model, stock_batch("LlamaForCausalLM"), rebuilt)
    back = hp.to_stock(model)
    assert type(back) is type(stock) and all(
        torch.equal(v, back.state_dict()[k]) for k, v in stock.state_dict().items()
    )
    with pytest.raises(
        ValueError, match="made for this model alone and cannot be loaded again: save hf_pareprop.to_stock"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_that_calls_past_its_base_model(rebuilt):
    """The layers are run by the decoder in the base model of an OPT, so that is what keeps budgets."""
    stock, batch = stock_model("OPTForCausalLM", **OTHERS["OPTForCausalLM"]), stock_batch("LlamaForCausalLM")
    model = hp.to_reversible(stock, beta=0.5, steps="layer", memory_budget="1 layers")
    assert model.layer_runner is model.model.decoder is not model.base_model
    _, grads, _ = step(model, batch, "autograd")
    for _ in range(2):  # the budget is known in the second step
        rebuilt.clear()
        assert_same(step(model, batch, "reprop")[1], grads)
    assert len(rebuilt) == 2
    model.set_memory_budget("3 layers")
    step(model, batch, "reprop")
    rebuilt.clear()
    step(model, batch, "reprop")
    assert not rebuilt


def test_models_that_take_neither_texts_nor_images():
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_length=40,
        num_mel_bins=16,
    )
    stock = transformers.ASTForAudioClassification(config)
    with pytest.raises(ValueError, match="needs a random text or image that the stock model takes"):
        hp.to_reversible(stock, steps="layer")


def test_router_losses(rebuilt):
    """Router logits leave the layer, which therefore stores its activations while they are asked for."""
    model = hp.to_reversible(stock_model("MixtralForCausalLM", num_local_experts=4), beta=0.25, steps="layer")
    rebuilt.clear()
    batch = stock_batch("LlamaForCausalLM")
    found = []
    for engine in ("autograd", "reprop"):
        model.set_backward_engine(engine)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        output = model(**batch, output_router_logits=True)
        assert output.aux_loss > 0
        output.loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert not rebuilt
    assert_same(*found)


class Odd(GradientCheckpointingLayer):
    """A layer that is not a function of its input, does not map one hidden state to the next, or is left out at times."""

    kind = ""
    seen = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, shared, **kwargs):
        Odd.seen += 1
        found = hidden_states + self.linear(hidden_states)
        if self.kind == "counts":
            return found * (1 + Odd.seen)
        if self.kind == "returns more":
            return found, hidden_states
        if self.kind == "shares":
            found = found + shared.get("before", 0)
            shared["before"] = found
        return found


class OddConfig(transformers.PreTrainedConfig):
    model_type = "odd"
    num_hidden_layers: int = 3
    vocab_size: int = 20


class OddModel(transformers.PreTrainedModel):
    config_class = OddConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Odd() for _ in range(3))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden, shared = self.embed(input_ids), {}
        for i, layer in enumerate(self.layers):
            if Odd.kind == "drops" and self.training and i == 1:
                continue
            found = layer(hidden, shared)
            hidden = found[0] if isinstance(found, tuple) else found
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)


@pytest.mark.parametrize(
    "kind, why",
    [
        ("counts", "does not compute what the stock model does|are not those of the forward pass"),
        ("returns more", "returns more than the next hidden state"),
        ("shares", "does not compute what the stock model does|neither a parameter of the layer"),
        ("drops", "ran 2 of 3 layers"),
        ("", None),
    ],
)
def test_what_is_not_right_is_refused(kind, why, monkeypatch):
    monkeypatch.setattr(Odd, "kind", kind)
    torch.manual_seed(0)
    model = OddModel(OddConfig())
    if why is None:
        return assert_engines_of_odd(hp.to_reversible(model, beta=0.5, steps="layer"))
    with pytest.raises(ValueError, match=f"OddModel cannot be made reversible: .*({why})"):
        hp.to_reversible(model, beta=0.5, steps="layer")


def assert_engines_of_odd(model):
    found = []
    for engine in ("autograd", "reprop"):
        model.set_backward_engine(engine)
        model.zero_grad(set_to_none=True)
        model(torch.arange(12).view(2, 6)).last_hidden_state.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same(*found)


def test_models_with_several_chains_are_refused():
    t5 = transformers.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration cannot be made reversible: it has 2 lists of layers"
    ):
        hp.to_reversible(transformers.T5ForConditionalGeneration(t5), steps="layer")


@pytest.mark.parametrize("name", FIELDS)
def test_verify(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hp.verify(reversible(name, beta=0.5), stock_batch(name)).exact


def test_the_table():
    """Every stock class that a row names exists in this version of transformers and has layers of the named class."""
    for model_type, family in stock_families.FAMILIES.items():
        classes = stock_families.classes_of(model_type)
        for head in family.heads.values():
            assert getattr(transformers, family.prefix + head) is classes[f"Rev{family.prefix}{head}"].stock_class
            assert hasattr(hp, f"Rev{family.prefix}{head}")
    with pytest.raises(AttributeError, match="RevLlamaForNothing"):
        _ = stock_families.RevLlamaForNothing
    assert DECODER["num_hidden_layers"] == 3
