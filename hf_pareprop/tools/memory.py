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
"""A rebuilt layer may add this fraction of the activations of a stored layer. Side bits at a small beta take a few per cent."""

BOOKKEEPING = 2**16
"""A layer may add this many bytes in any case. On a CPU the states of the random number generator take 10 KB."""


@dataclass(frozen=True)
class Growth:
    """The bytes that one more layer adds to the peak of a training step, without parameters and gradients.

    Attributes:
        rebuilt: bytes with the model's engine.
        stored: bytes with the engine ``autograd``, which stores activations as the stock model does.
        engine: the engine that was measured. On a CPU ``reprop`` is measured instead of ``pareprop``, because the profiler
            does not see the worker thread. ``pareprop`` holds the activations of one more step, at any depth.
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
    """Measure how the memory of a training step grows with depth.

    It uses copies of the model with random weights. For the model's engine they have half of its depth and the whole depth
    (at least four layers). For ``autograd``, which may not fit at the whole depth, they have one layer and two layers. In a
    model with stages, the deepest stage has that many layers, and every other stage has one.

    In the copies every layer is reversible, at the smallest ``beta`` of the model that is not 0. Conventional layers store
    their activations anyway.

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
    deep = max(4, *config.stage_depths)  # between one layer and two, more changes than the depth
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
        # The gradient of a large table is created at the end of the backward, and would hide everything before.
        like.get_input_embeddings().requires_grad_(False)

        def step() -> None:
            like(**batch)[0].float().sum().backward()

        step()  # allocates the gradients
        return peak_bytes(step, model.device)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The peak of memory while ``step`` runs, in bytes on top of what was allocated before.

    On a CPU, PyTorch's profiler counts the allocations of the calling thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profiling(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def profiling(**options: Any) -> profile:
    """PyTorch's profiler with these options, without the lines that it prints when it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(**options)
