"""Compute what training a decoder takes, from its configuration alone: `hf-pareprop bench --plan`.

A training step of a model with three and with four layers runs on tensors without data (:mod:`accounting`), at two lengths.
Memory grows linearly with the number of layers and of tokens, so these steps give the result for every depth and length.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedConfig, masking_utils
from transformers.initialization import no_init_weights

from ..configuration_reversible import ReversibleConfig
from ..plan import STEPS, betas_per_layer, converted_beta
from ..stock_families import FAMILIES, classes_of
from ..stock_layers import StockLayersModel, couple
from .accounting import Accounting, predict
from .contenders import CHECKPOINTING, STOCK, Contender
from .records import fraction
from .source import CheckpointError

CPU = torch.device("cpu")

FEW, MORE = 3, 4
"""The numbers of layers of the models that are run. The first and the last layer take less than those between."""

LENGTHS = 2**20, 2**21
"""The lengths of the texts that are run, in tokens: long enough that activations make the peak, and not gradients."""

FEW_WORDS = 64
"""The size of the vocabulary in runs where logits must not count."""

NAMES = {"layer": "layers", "sublayer": "sub-blocks"}

CHUNK = 2048
"""If the loss is computed in chunks: the number of tokens in a chunk, whose logits exist at the same time."""


class Training(NamedTuple):
    """What is trained, and in which precision.

    Attributes:
        name: the name to show to users.
        dtype: the dtype of the weights.
        autocast: whether the step computes in bf16 autocast.
        rank: the rank of LoRA on every linear layer of the decoder's layers, in fp32 as in PEFT; None trains all weights.
    """

    name: str
    dtype: torch.dtype
    autocast: bool
    rank: int | None = None


FULL = Training("all weights, fp32, in bf16 autocast", torch.float32, True)
FULL_IN_BF16 = Training("all weights, bf16 throughout", torch.bfloat16, False)
LORA = Training("LoRA of rank 16 on bf16 weights, in bf16 autocast", torch.bfloat16, True, 16)
TRAININGS = FULL, FULL_IN_BF16, LORA


class Way(NamedTuple):
    """One way to train.

    Attributes:
        name: the name to show to users.
        contender: the contender that is run.
        steps: the steps of the reversible model, `"sublayer"` or `"layer"`.
        on_host: whether what layers store is in the host's memory, and comes back one layer at a time.
    """

    name: str
    contender: Contender
    steps: str = "layer"
    on_host: bool = False


def ways(beta: float | None = None) -> list[Way]:
    """Plain training, checkpointing, and reversible training at the default for converted weights (or at ``beta``) and at 1.

    Raises:
        ValueError: ``beta`` is not 1 or a negative power of two.
    """
    if beta is not None and not betas_per_layer(beta, 1)[0]:
        raise ValueError("beta=0 is plain training, which is shown anyway: give 1 or a negative power of two.")
    layers, sub_blocks = (converted_beta(steps) if beta is None else beta for steps in STEPS[::-1])
    coupled = [
        ("layer", layers),
        ("sublayer", sub_blocks),
        ("sublayer", 1.0),
    ]  # whole layers at beta 1 are left out: they take more than sub-blocks
    return [
        Way("plain training", STOCK),
        Way("checkpointing", CHECKPOINTING),
        Way("checkpointing, offloaded", CHECKPOINTING, on_host=True),
        *(
            Way(f"reversible {NAMES[steps]}, beta {fraction(each)}", Contender("reprop", each), steps)
            for steps, each in dict.fromkeys(coupled)
        ),
    ]


class Line(NamedTuple):
    """A number of bytes that grows with the number of tokens: ``fixed + tokens * per_token``."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> float:
        return self.fixed + tokens * self.per_token

    def minus(self, other: "Line", times: int = 1) -> "Line":
        return Line(self.fixed - times * other.fixed, self.per_token - times * other.per_token)


@dataclass(frozen=True)
class Needs:
    """What a way to train takes. Amounts are in bytes.

    Attributes:
        layers: the number of layers.
        width: the width of the hidden states.
        weights: parameters and buffers.
        optimizer: the state of AdamW.
        gradients: the gradients of all parameters that are trained.
        head_gradient: the gradients of the output layer, which come first in the backward pass.
        tied_gradient: the gradient of the embeddings, if they share the weights of the output layer. It is added to that
            layer's gradient.
        stored: what one layer stores from its forward to its backward pass.
        on_host: whether that is in the host's memory.
        at_work: the most that exists in addition while the gradients of one layer are computed: its graph, intermediate
            results, states.
        at_loss: the most that exists in addition while logits, loss and their gradients are computed.
    """

    layers: int
    width: int
    weights: int
    optimizer: int
    gradients: int
    head_gradient: int
    tied_gradient: int
    stored: Line
    on_host: bool
    at_work: Line
    at_loss: Line

    @property
    def bits(self) -> float:
        """The bits that are stored on the device, per element of a hidden state and layer."""
        return 0.0 if self.on_host else 8 * self.stored.per_token / self.width

    @property
    def working_bytes(self) -> float:
        """The bytes of ``at_work`` per element of a hidden state."""
        return self.at_work.per_token / self.width

    def peak(self, tokens: int, chunked: bool) -> float:
        """Bytes at the peak of a training step.

        Args:
            tokens: the number of tokens in the step, in one text without padding.
            chunked: whether the loss is computed for `CHUNK` tokens at a time. Otherwise all logits exist at once.

        The logits exist until the gradients of the loss are computed, because a script usually holds the model's output.

        From the last layer to the first, what is stored shrinks linearly and the gradients grow linearly. So the peak is at one
        of the two ends.
        """
        layer = self.stored.at(tokens)
        stored = 0.0 if self.on_host else self.layers * layer
        if chunked and tokens > CHUNK:
            hidden_states = 2 * tokens * self.width * 4  # the last hidden state and its gradient
            loss = self.at_loss.at(CHUNK) + self.head_gradient + hidden_states
        else:
            loss = self.at_loss.at(tokens)
        first = self.head_gradient + self.at_work.at(tokens)
        last = self.gradients + max(self.at_work.at(tokens) + (0 if self.on_host else layer), self.tied_gradient)
        return self.weights + self.optimizer + max(stored + loss, stored + first, last)

    def longest(self, cap: int, chunked: bool = True) -> int:
        """The largest number of tokens, a multiple of 1024, whose peak stays within ``cap`` bytes; 0 if 1024 are too many."""
        return 1024 * bisect_right(range(1, 2**20 + 1), float(cap), key=lambda n: self.peak(1024 * n, chunked))


def needs(config: PreTrainedConfig, way: Way, training: Training) -> Needs:
    """Compute what training a decoder takes.

    Args:
        config: the configuration of a stock causal language model of Llama, Mistral, Qwen2 or Qwen3.
        way: how it is trained.
        training: what is trained, and in which precision.

    Raises:
        CheckpointError: the model is of another family, or LoRA is asked for but PEFT is not installed.

    Example:
        >>> found = needs(LlamaConfig(num_hidden_layers=4), Way("checkpointing", CHECKPOINTING), FULL_IN_BF16)
        >>> f"{found.bits:.0f} bits"
        '16 bits'
    """
    run = partial(_run, config, way, training)
    few, more, spoken = (
        _line(partial(run, depth, words))
        for depth, words in ((FEW, FEW_WORDS), (MORE, FEW_WORDS), (1, config.vocab_size))
    )
    stored = more.minus(few)
    whole = without_weights(config, training, depth_of(config), config.vocab_size, way)
    trained = sum(p.nbytes for p in whole.parameters() if p.requires_grad)
    head = whole.get_output_embeddings().weight
    tied = head is whole.get_input_embeddings().weight
    head_gradient = head.nbytes if head.requires_grad else 0
    return Needs(
        layers=depth_of(config),
        width=config.hidden_size,
        weights=sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers())),
        optimizer=2 * trained,
        gradients=trained,
        head_gradient=head_gradient,
        tied_gradient=head_gradient if tied else 0,
        stored=stored,
        on_host=way.on_host,
        at_work=few.minus(stored, FEW),
        at_loss=spoken.minus(stored),
    )


def _line(taken: Callable[[int], float]) -> Line:
    (short, long), (at_short, at_long) = LENGTHS, map(taken, LENGTHS)
    slope = (at_long - at_short) / (long - short)
    return Line(at_short - slope * short, slope)


def _run(config: PreTrainedConfig, way: Way, training: Training, depth: int, words: int, tokens: int) -> float:
    """The bytes at the peak of a step, without weights, optimizer and gradients."""
    key = config.to_json_string(), way._replace(name="", on_host=False), training, depth, words, tokens
    if key not in _PREDICTED:
        _PREDICTED[key] = _predicted(config, way, training, depth, words, tokens)
    found = _PREDICTED[key]
    return found.states + found.graphs + found.workspace


_PREDICTED: dict[Any, Accounting] = {}
"""The predictions so far. Ways that differ only in where activations are stored share them."""


def _predicted(
    config: PreTrainedConfig, way: Way, training: Training, depth: int, words: int, tokens: int
) -> Accounting:
    batch = {name: torch.empty(1, tokens, dtype=torch.long, device="meta") for name in ("input_ids", "labels")}
    model = without_weights(config, training, depth, words, way)
    # Transformers looks at values to learn whether texts are packed. Fake tensors have none, so it would make a mask to be
    # sure, and its memory grows with the square of the tokens.
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        return predict(MadeOnMeta(model), way.contender, batch, CPU, training.autocast)


@dataclass(frozen=True)
class MadeOnMeta:
    """Like :class:`~hf_pareprop.tools.contenders.Subject`, but the model is made on the meta device, where PEFT can change it."""

    model: Any

    def build(self, contender: Contender) -> Any:
        contender.prepare(self.model)
        self.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        self.model.tie_weights()
        return self.model.train()


def depth_of(config: PreTrainedConfig) -> int:
    """The number of layers in a decoder's stock configuration."""
    (field,) = ReversibleConfig.depth_fields(0)
    depth: int = getattr(config, field)
    return depth


def without_weights(config: PreTrainedConfig, training: Training, depth: int, words: int, way: Way) -> Any:
    """A model on the meta device.

    Args:
        depth: the number of layers.
        words: the size of the vocabulary.

    Raises:
        CheckpointError: the model is of a family that is not known here, or LoRA is asked for but PEFT is not installed.
    """
    reversible = reversible_class(config.model_type)
    fields = {**config.to_dict(), **ReversibleConfig.depth_fields(depth), "vocab_size": words}
    for name in [name for name in fields if name.endswith("_token_id")]:
        fields[name] = None  # the small vocabulary may not have these tokens
    fields.pop("layer_types", None)  # it has one entry for every layer
    stock: Any = reversible.stock_class
    with torch.device("meta"), no_init_weights():
        model = stock._from_config(type(config)(**fields), dtype=training.dtype, attn_implementation="sdpa")
        model.tie_weights()
        if way.contender.engine is not None:
            couple(model, reversible, {"steps": way.steps})
        return model if training.rank is None else _with_lora(model, training.rank)


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as error:
        raise CheckpointError("computing what LoRA takes needs PEFT: pip install peft.") from error
    layers = {
        name.rpartition(".")[2] for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    adapted = inject_adapter_in_model(LoraConfig(r=rank, task_type="CAUSAL_LM", target_modules=sorted(layers)), model)
    cast_adapter_dtype(adapted, "default", True)
    return adapted


def reversible_class(model_type: str) -> type[StockLayersModel]:
    """The reversible causal language model for a stock model type.

    Raises:
        CheckpointError: there is no such model, or its family does not say what the sub-blocks of a layer are.
    """
    family = FAMILIES.get(model_type)
    if family is None or not family.sub_blocks:
        known = ", ".join(name for name, row in FAMILIES.items() if row.sub_blocks)
        raise CheckpointError(
            f"model_type {model_type!r}: --plan knows {known}. Leave out --plan to measure the model."
        )
    found: type[StockLayersModel] = classes_of(model_type)[f"Rev{family.prefix}ForCausalLM"]
    return found
