"""How the memory of a training step grows with depth."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..modeling_reversible import ReversiblePreTrainedModel

Step = Callable[[], None]

SHARE = 0.1
"""What a rebuilt layer may add of a stored one's activations: side bits at a small beta take some per cent."""

BOOKKEEPING = 2**16
"""Bytes that a layer may add whatever the inputs: on a CPU the states of the random number generator are 10 KB."""


@dataclass(frozen=True)
class Growth:
    """Bytes that one more layer adds to the peak of a training step, parameters and gradients left out.

    Attributes:
        rebuilt: with the model's engine.
        stored: with the engine ``autograd``, which stores activations as the stock model does.
        engine: the one that was measured; on a CPU ``reprop`` stands for ``pareprop``, whose worker thread the profiler
            does not see, and which holds one sub-block's activations more, whatever the depth.
    """

    rebuilt: float
    stored: float
    engine: str

    @property
    def share(self) -> float:
        return self.rebuilt / self.stored

    @property
    def flat(self) -> bool:
        """Whether memory hardly grows with depth."""
        return self.rebuilt <= max(SHARE * self.stored, BOOKKEEPING)

    def __str__(self) -> str:
        return (
            f"one more layer adds {self.rebuilt / 2**20:.3f} MB with {self.engine}, {self.stored / 2**20:.2f} MB where "
            f"activations are stored ({100 * self.share:.1f} %)"
        )


def memory_growth(model: ReversiblePreTrainedModel, batch: Mapping[str, Any]) -> Growth:
    """Measured on copies of the model with random weights: of half and of the whole depth (four at least) for its
    engine, and of one and two layers for ``autograd``, which may not fit at the whole depth. Where there are stages,
    the deepest one has so many layers, and every other stage has one.

    Every layer is reversible in them, at the smallest ``beta`` of the model that is not 0: conventional layers store
    activations, of which there is nothing to measure.

    Raises:
        ValueError: no layer of the model is reversible.
    """
    config = model.config
    betas = [plan.beta for plan in config.layer_plans() if plan.reversible]
    if not betas:
        raise ValueError("no layer of the model is reversible: all betas are 0.")
    engine = config.backward_engine
    if model.device.type == "cpu" and engine == "pareprop":
        engine = "reprop"
    deep = max(4, *config.stage_depths)  # from one layer to two more changes than the depth
    shallow = deep // 2

    def peak(depth: int, name: str) -> int:
        return _peak_of(model, batch, depth, min(betas), name)

    rebuilt = (peak(deep, engine) - peak(shallow, engine)) / (deep - shallow)
    return Growth(rebuilt, float(peak(2, "autograd") - peak(1, "autograd")), engine)


def _peak_of(model, batch: Mapping[str, Any], depth: int, beta: float, engine: str) -> int:
    config = copy.deepcopy(model.config)
    fields = config.depth_fields(depth, len(config.stage_depths))
    fields |= {"beta": beta, "backward_engine": engine, "memory_budget": None}
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        like = type(model)._from_config(config, dtype=model.dtype).to(model.device).train()
        # The gradient of a large table, made at the end of the backward, would hide all that happens before it.
        like.get_input_embeddings().requires_grad_(False)

        def step() -> None:
            like(**batch)[0].float().sum().backward()

        step()  # allocates the gradients
        return peak_bytes(step, model.device)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The peak of memory while ``step`` runs, on top of what was allocated before it.

    On a CPU as PyTorch's profiler sees the allocations of the calling thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
