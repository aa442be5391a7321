"""Small random stock models of the families in `hf_pareprop.stock_families`, and batches for them."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

DECODER: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.1,
)
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}

FIELDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": DECODER,
    "MistralForCausalLM": {**DECODER, "sliding_window": 5},
    "Qwen2ForCausalLM": DECODER,
    "Qwen3ForCausalLM": {**DECODER, "head_dim": 8},
    "Gemma3ForCausalLM": {**DECODER, "head_dim": 8, "sliding_window": 5},
    "GPT2LMHeadModel": dict(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "ModernBertForMaskedLM": {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2},
    "Dinov2ForImageClassification": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7, drop_path_rate=0.2
    ),
}
"""Fields of a configuration, by the class of the family that tests train."""

LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def stock_model(name: str, cls: type[PreTrainedModel] | None = None, **fields: Any) -> PreTrainedModel:
    """A random model in training mode. Weights are scaled up so that no branch is negligible.

    Args:
        cls: a class to use instead of that of the name.
    """
    torch.manual_seed(0)
    cls = cls or getattr(transformers, name)
    model = cls(cls.config_class(**{**FIELDS.get(name, DECODER), **fields})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    return model


def stock_batch(name: str) -> dict[str, torch.Tensor]:
    """Three texts, two of them padded, or three images; with labels."""
    generator = torch.Generator().manual_seed(3)
    if "Dinov2" in name:
        return dict(pixel_values=torch.randn(3, 3, 28, 28, generator=generator), labels=torch.tensor([0, 1, 1]))
    ids = torch.randint(3, 97, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 5:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
