"""One forward pass through a chain of reversible layers."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .coupling import enter, merge_pair
from .lanes import Session
from .layer_call import LayerCall, Pair, Step
from .plan import LayerPlan
from .retention import Retention


class Engine(Protocol):
    """How one reversible layer is run, and with it how it is differentiated."""

    def layer(self, tape: "Tape", index: int, record: LayerCall, previous: Tensor, current: Tensor) -> Pair: ...


class Tape:
    """One forward pass through a chain of layers, and the states rebuilt from it in the backward pass.

    A tape belongs to one forward pass: two forwards before a backward, nested or interleaved models and evaluation in
    between each have their own. It is kept alive by the autograd graph and by nothing else.

    Args:
        engine: one of :data:`ENGINES`.
        plans: the coupling of every layer, from :func:`coupling.plan_layers`.
        retention: how many of the last layers keep their graphs, and how many below those their products; by default none.
    """

    dtype: torch.dtype
    """The compute dtype: that of the embeddings."""

    def __init__(self, engine: "Engine", plans: Sequence[LayerPlan], retention: Retention | None = None):
        self.engine = engine
        self.plans = plans
        self.retention = retention or Retention()
        self.graphs_from = self.products_from = len(plans)
        self.records: dict[int, LayerCall] = {}
        self.pairs: dict[int, Pair] = {}
        self.ahead: dict[int, Any] = {}

    def start(self, embeddings: Tensor) -> Pair:
        """The first pair, ``s[-1] = s[0] = embeddings``; their dtype becomes the compute dtype."""
        self.dtype = embeddings.dtype
        graphs, products = self.retention.plan(embeddings, self.plans)
        self.graphs_from = len(self.plans) - graphs
        self.products_from = self.graphs_from - products
        return embeddings, embeddings

    @torch.compiler.disable  # a compiled forward and an eager recomputation would differ in bits
    def layer(
        self,
        index: int,
        module: nn.Module,
        steps: Sequence[Step],
        previous: Tensor,
        current: Tensor,
        inputs: tuple[Tensor, ...] = (),
    ) -> Pair:
        """Apply layer ``index`` to a pair of states and return the next pair, of the same shape.

        To be called from ``module.forward``, so that what wraps modules (FSDP2, hooks) is in place.

        Args:
            module: owner of the parameters that ``steps`` use.
            steps: two or more.
            inputs: tensors that steps read besides the state and may need a gradient; passed to every step.
        """
        plan = self.plans[index]
        if not plan.reversible:
            return _conventional(steps, current.to(self.dtype), inputs)
        if plan.opens:
            previous, current = enter(previous, plan), enter(current, plan)
        elif current.dtype != (expected := torch.promote_types(plan.state_dtype, self.dtype)):
            raise RuntimeError(
                f"layer {index} got its states in {current.dtype}, the layer below returned {expected}: something casts "
                "inputs of layers, and the states could not be rebuilt. With FSDP2 set cast_forward_inputs=False in the "
                "MixedPrecisionPolicy."
            )
        record = LayerCall(module, steps, plan, self.dtype, inputs)
        return self.engine.layer(self, index, record, previous, current)

    def rebuilt(self, index: int, pair: Pair) -> None:
        """Take the inputs of layer ``index``, rebuilt in its backward: the outputs of the layer below."""
        if not self.plans[index].opens:
            self.pairs[index - 1] = pair

    def look_ahead(self, index: int, session: Session) -> None:
        """Begin to rebuild the last step of layer ``index`` before its own backward is called.

        Only where its states and parameters already are: under FSDP2 and ZeRO-3 the parameters come with the layer's
        own backward, and a model may be spread over devices.
        """
        record, pair = self.records[index], self.pairs[index]
        if record.resident() and record.contexts[-1].device == pair[0].device:
            self.ahead[index] = session.start(partial(record.rebuild, len(record.steps) - 1, *pair, True))

    def finish(self, previous: Tensor, current: Tensor, after: int = -1) -> Tensor:
        """The hidden state that the pair after layer ``after`` stands for, in the compute dtype."""
        return merge_pair(previous, current, self.plans[after].beta).to(self.dtype)


def _conventional(steps: Sequence[Step], current: Tensor, inputs: tuple[Tensor, ...]) -> Pair:
    """A stock layer: the residual is added back, activations are stored by autograd."""
    previous = current
    for step in steps:
        residual, branch = step(current, *inputs)
        previous, current = current, residual + branch
    return previous, current
