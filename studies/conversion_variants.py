"""A coupling that the conversion study compares with the package's own."""

import types

from torch import Tensor, nn

from hf_pareprop.blocks import apply_norm
from hf_pareprop.layer_call import named_parameters_of
from hf_pareprop.tape import Tape


def couple_layers(model: nn.Module) -> None:
    """Make every layer of a reversible RoBERTa one step, instead of every sub-block."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tape: Tape, **kwargs) -> Tensor:
        norm_module, norm = tape.norm
        dtype = tape.dtype
        attend = self.attention.self.attention_function()

        def step(state: Tensor, mask: Tensor | None, *norm: Tensor) -> tuple[Tensor, Tensor]:
            entered = apply_norm(norm_module, norm, state.to(dtype))
            attention = self.attention(entered, mask, attend=attend, **kwargs)
            attended = self.attention.output.LayerNorm(entered + attention)
            return entered, attended + self.feed_forward(attended) - entered

        hidden_states = tape.layer(self, (step,), hidden_states, (attention_mask, *norm))
        own = self.output.LayerNorm
        tape.norm = own, tuple(p.clone() for p in named_parameters_of(own).values())
        return hidden_states

    for layer in model.base_model.encoder.layer:
        layer.forward = types.MethodType(forward, layer)
