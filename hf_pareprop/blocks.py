"""The parts that layers of all families share, and the loop that runs the layers."""

# mypy: disable-error-code="override,arg-type,union-attr,operator,assignment"
# The types of stock configurations say "optional" where a field is always set; module attributes are Tensor | Module.
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modeling_reversible import HiddenState, requested
from .tape import Tape
from .torch_private import own_parameters, shares_memory, views_of_flat_parameter

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of transformers."""


def height_and_width(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def activation(name_or_module: Any) -> nn.Module:
    return ACT2FN[name_or_module] if isinstance(name_or_module, str) else name_or_module


class PatchEmbeddings(nn.Module):
    """Maps images `(batch, channels, height, width)` to patch embeddings `(batch, patches, width)`."""

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.image_size = height_and_width(config.image_size)
        self.patch_size = height_and_width(config.patch_size)
        self.grid = tuple(i // p for i, p in zip(self.image_size, self.patch_size, strict=True))
        self.projection = nn.Conv2d(config.num_channels, width, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


def attention_mask_for(config: Any, embeddings: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask for attention layers, made from a padding mask; `None` if nothing is masked.

    Without a padding mask, transformers returns `None` by itself, except 5.17 in the capture of a CUDA graph. With the mask
    that it makes there, PyTorch would choose another attention kernel than in the same step outside of a graph.
    """
    if attention_mask is None and config._attn_implementation in ("eager", "sdpa"):
        return None
    return create_bidirectional_mask(config=config, inputs_embeds=embeddings, attention_mask=attention_mask)


def refuse_decoder_inputs(inputs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an input is given that only a decoder can use.
    """
    for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name}: the model is an encoder, which cannot use it; leave it out, or use the stock model."
            )


def check_channels(pixel_values: Tensor, channels: int) -> None:
    """
    Raises:
        ValueError: `pixel_values` are not images, or have another number of channels.
    """
    if pixel_values.dim() != 4:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} are not images of (batch, channels, height, width)."
        )
    if pixel_values.shape[1] != channels:
        raise ValueError(f"the images have {pixel_values.shape[1]} channels, the model was built for {channels}.")


def masked(embeddings: Tensor, mask: Tensor, mask_token: Tensor | None) -> Tensor:
    """Replace patch embeddings `(batch, patches, width)` by the mask token where `mask`, `(batch, patches)`, is 1.

    Raises:
        ValueError: the model has no mask token.
    """
    if mask_token is None:
        raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
    tokens = mask_token.expand(*embeddings.shape[:2], -1)
    where = mask.unsqueeze(-1).type_as(tokens)
    return embeddings * (1.0 - where) + tokens * where


def resized_positions(positions: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Resize position embeddings `(1, patches, width)` to a grid of patches of another size, by bicubic interpolation."""
    planes = positions.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    planes = nn.functional.interpolate(planes, size=tuple(size), mode="bicubic", align_corners=False)
    return planes.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(hidden_states: Tensor, grid: Sequence[int]) -> Tensor:
    """Reshape hidden states `(batch, patches, width)` of a grid to a feature map `(batch, width, rows, columns)`."""
    return hidden_states.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    if module.softmax_in_fp32:
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    else:
        weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-head self-attention through the attention interface of transformers.

    Args:
        config: the configuration of the model.
        width: the width of the states, a multiple of `heads`.
        heads: the number of attention heads.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    softmax_in_fp32 = True

    def __init__(self, config: Any, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} is not a multiple of {heads} attention heads.")
        self.config = config
        self.attention_head_size = width // heads
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        bias = getattr(config, "qkv_bias", True)
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def attention_function(self) -> Attend:
        """The attention function that the configuration names now.

        A layer passes it to its steps, so that a rebuild uses the function of the forward pass.
        """
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, attend: Attend, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        output, weights = attend(
            self,
            self.query(hidden_states).view(heads).transpose(1, 2),
            self.key(hidden_states).view(heads).transpose(1, 2),
            self.value(hidden_states).view(heads).transpose(1, 2),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class Dense(nn.Module):
    """A linear layer, called `dense` as in checkpoints, and the module that follows it."""

    def __init__(self, in_features: int, out_features: int, then: nn.Module):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.then = then

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.then(self.dense(hidden_states))


def apply_norm(module: nn.Module | None, parameters: Sequence[Tensor], state: Tensor) -> Tensor:
    """Apply the norm `module` to `state`, with `parameters` in place of its own. Before the first layer there is no norm."""
    if module is None:
        return state
    if torch.jit.is_tracing() or (not torch.compiler.is_compiling() and _has(module, parameters)):
        return module(state)  # with its own parameters, on which hooks of others may have left something
    return functional_call(module, dict(zip(_parameter_names(module), parameters, strict=True)), (state,))


def _has(module: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Whether the module's own parameters are these, or aliases of them."""
    own = [parameter for parameter in module.parameters() if parameter is not None]
    pairs = zip(own, parameters, strict=False)
    return len(own) == len(parameters) and all(
        a is b or (shares_memory(a, b) and a.requires_grad == b.requires_grad) for a, b in pairs
    )


def _parameter_names(module: nn.Module, prefix: str = "") -> list[str]:
    """The names of a module's parameters.

    The module's identity is not used, so that code compiled for one module serves all modules like it.
    """
    own = {**own_parameters(module), **views_of_flat_parameter(module)}  # FSDP1 may have one under both
    here = [prefix + name for name, parameter in own.items() if parameter is not None]
    inner = (_parameter_names(inside, f"{prefix}{name}.") for name, inside in module._modules.items() if inside)
    return [*here, *(name for names in inner for name in names)]


class DropPath(nn.Module):
    """In training, drops whole samples of a branch at the rate `drop_prob` and scales up the others (Huang et al. 2016).

    Compiled code reads the rate from a tensor, so that layers with different rates share the code.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    @property
    def drop_prob(self) -> float:
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, drop_prob: float) -> None:
        self._drop_prob, self._drops = drop_prob, drop_prob > 0
        self._keep = torch.tensor(1 - drop_prob, device="cpu")

    def forward(self, branch: Tensor) -> Tensor:
        if not (self._drops and self.training):
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        if torch.compiler.is_compiling():
            kept = torch.rand(shape, device=branch.device) < self._keep
            return branch * (kept / self._keep).to(branch.dtype)
        return self.drop(branch, shape, 1 - self._drop_prob)

    def drop(self, branch: Tensor, shape: tuple[int, ...], keep: float) -> Tensor:
        """Draw and scale as transformers does."""
        return branch.div(keep) * torch.rand(shape, dtype=branch.dtype, device=branch.device).add(keep).floor()


class TimmDropPath(DropPath):
    def drop(self, branch: Tensor, shape: tuple[int, ...], keep: float) -> Tensor:
        """Draw and scale as timm does."""
        return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)


class Pooler(nn.Module):
    """Reads the first token of `(batch, length, width)` states."""

    def __init__(self, width: int, pooled_width: int, act: Any):
        super().__init__()
        self.dense = nn.Linear(width, pooled_width)
        self.activation = activation(act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class Layer(nn.Module):
    """A layer of a reversible model. Its `forward` describes its steps and passes them to the tape."""

    gradient_checkpointing = False
    """Set by transformers. It affects conventional layers only, because reversible layers store no activations."""

    changes_shape = False
    """Whether the layer's output has another shape than its input. Then it cannot be reversible: see :mod:`transition`."""


class Encoder(nn.Module):
    """Runs layers, in one or several stages, with a tape.

    Args:
        config: the configuration of the model.
        make_layer: makes a layer. It is for encoders that have all layers in one list, `layer`, as text models and ViT do.
            A family with stages overrides :meth:`stages` instead.
    """

    def __init__(self, config: Any, make_layer: Callable[[Any], nn.Module] | None = None):
        super().__init__()
        self.config = config
        if make_layer is not None:
            self.layer = nn.ModuleList(make_layer(config) for _ in range(config.num_hidden_layers))
        self.hidden_state = HiddenState()

    def stages(self) -> list[nn.ModuleList]:
        """The layers of every stage."""
        return [self.layer]

    def finish(self, hidden_states: Tensor, tape: Tape) -> Tensor:
        """Turn the hidden state that a layer returned into the one that the stock encoder would return."""
        return tape.finish(hidden_states)

    def forward(self, embeddings: Tensor, *inputs: Any, tape: Tape, **kwargs: Any) -> Tensor:
        """Run all layers on the embeddings and return the last hidden state.

        Args:
            embeddings: the first hidden states.
            inputs: what every layer reads besides the hidden state.
            tape: the tape of this forward pass.
        """
        reads_each_layer = requested("output_hidden_states", self.config, kwargs)
        layers = [layer for stage in self.stages() for layer in stage]
        output, hidden_states = embeddings, tape.start(embeddings)
        for i, layer in enumerate(layers):
            hidden_states = layer(hidden_states, *inputs, tape=tape, **kwargs)
            if reads_each_layer or i == len(layers) - 1:
                before, output = output, self.finish(hidden_states, tape)
                self.hidden_state(before, output)
        return output
