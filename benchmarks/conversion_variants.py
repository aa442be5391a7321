"""Couplings that the conversion study compares with the package's own."""

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import hf_pareprop as hp
from hf_pareprop.layer_call import named_parameters_of
from hf_pareprop.modeling_rev_roberta import apply_norm


def couple_layers(model: nn.Module) -> None:
    """One step per layer of a reversible RoBERTa instead of one per sub-block."""

    def forward(self, previous, current, *norm, norm_module=None, attention_mask=None, tape, **kwargs):
        def step(state, *norm):
            entered = apply_norm(norm_module, norm, state.to(tape.dtype))
            attended = self.attention.output.LayerNorm(entered + self.attention(entered, attention_mask, **kwargs))
            return entered, attended + self.feed_forward(attended) - entered

        previous, current = tape.layer(self.layer_idx, self, (step,), previous, current, norm)
        return previous, current, *(p.clone() for p in named_parameters_of(self.output.LayerNorm).values())

    model.set_backward_engine("autograd")
    for layer in model.base_model.encoder.layer:
        layer.forward = types.MethodType(forward, layer)


class Predicting(hp.engine.Autograd):
    """Steps that add ``beta * (s[i-1] - p_i)``, with ``p_i = a_i * r_i + b_i`` per channel for the residual ``r_i``.

    Calibrated by least squares in the first forward pass, one step after the other, then fixed.
    """

    def __init__(self) -> None:
        self.fits: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def layer(self, tape, index, record, previous, current):
        beta = record.plan.beta
        for i, step in enumerate(record.steps):
            residual, branch = step(hp.coupling.read(current, record.dtype), *record.inputs)
            if (index, i) not in self.fits:
                x, y = residual.double().flatten(0, -2), previous.double().flatten(0, -2)
                slope = ((x - x.mean(0)) * (y - y.mean(0))).mean(0) / x.var(0, correction=0)
                self.fits[index, i] = slope, y.mean(0) - slope * x.mean(0)
            slope, offset = self.fits[index, i]
            following = residual + branch + beta * (previous - (slope * residual + offset))
            previous, current = current, following.to(previous.dtype)
        return previous, current


def calibrate_predictors(model: nn.Module, probe: Mapping[str, Any]) -> None:
    engine = Predicting()
    base = model.base_model
    base.new_tape = lambda *args, **kwargs: hp.tape.Tape(engine, base.layer_plans)
    with torch.no_grad():
        base(**probe)
