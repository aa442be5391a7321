"""The ways to train that are compared: the stock model in several ways, and its reversible twin with several engines.

Some families have no stock classes in transformers. Plain training then uses the reversible class with `beta=0`, so that no
layer is reversible, and the engine `autograd`. That computes and stores what a stock model would.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel
from .convert import architecture_behind, reversible_config, stock_twin, to_stock
from .families import architecture_of
from .graphs import GraphedStep
from .inputs import loss_of
from .timing import release

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        engine: the engine of the reversible model; ``None`` means plain training of the stock model.
        beta: the coupling of the reversible model.
        budget: the memory budget of the reversible model, see ``memory_budget`` of its configuration.
        checkpointing: whether every layer is checkpointed, as with ``gradient_checkpointing=True``.
        selective: whether checkpointed layers keep the results of matrix products and of attention.
        offload: whether saved activations are moved to the host's memory (``torch.autograd.graph.save_on_cpu``).
        compiled: whether a plain model, or the steps of a reversible one, are compiled with ``torch.compile`` for each shape.
        activation_budget: the fraction of the activations that compiled code keeps. It computes the others again.
        graphed: whether the forward and the backward pass are one CUDA graph.
    """

    engine: str | None = None
    beta: float = 0.0
    budget: str | None = None
    checkpointing: bool = False
    selective: bool = False
    offload: bool = False
    compiled: bool = False
    activation_budget: float = 1.0
    graphed: bool = False

    @property
    def name(self) -> str:
        """The name to show to users. Different contenders have different names."""
        if self.engine is not None:
            parts = [self.engine, f"beta {self.beta:g}"]
        elif self.compiled:
            parts = ["torch.compile"]
        elif self.checkpointing:
            parts = ["selective checkpointing" if self.selective else "gradient checkpointing"]
        else:
            parts = ["activations on the CPU" if self.offload else "plain training"]
        if self.budget is not None:
            parts.append(f"{self.budget} kept" if self.budget.endswith("layers") else f"budget of {self.budget}")
        if self.activation_budget < 1:
            parts.append(f"activation budget {self.activation_budget:g}")
        if self.compiled and self.engine is not None:
            parts.append("compiled steps")
        return ", ".join([*parts, "CUDA graph"] if self.graphed else parts)

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: the name, and the fields that are not at their defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"name": self.name, **given}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Contender":
        """The inverse of :meth:`as_dict`."""
        return cls(**{name: value for name, value in found.items() if name != "name"})

    @property
    def predictable(self) -> bool:
        """Whether the accounting can predict its memory. It cannot for compiled code, selective policies and offloading."""
        return not (self.compiled or self.selective or self.graphed or self.offload)

    def prepare(self, model: Any) -> None:
        """Make ``model`` work this way from the next forward pass on. It has to be plain or reversible like the contender."""
        if self.engine is not None:
            model.set_backward_engine(self.engine)
            model.set_beta(self.beta)
            model.set_memory_budget(self.budget)
            model.set_compile_steps(self.compiled)
        else:
            _checkpoint(model, self)

    def retaining(self, layers: int) -> "Contender":
        """The same contender, keeping the graphs of ``layers`` layers."""
        return replace(self, budget=f"{layers} layers")

    def within_gradients(self) -> "Contender":
        """The same contender, keeping as many bytes as the gradients of parameters will take."""
        return replace(self, budget="gradients")

    def as_graph(self) -> "Contender":
        """The same contender as a CUDA graph; a reversible one with compiled steps, which pay within a graph."""
        return replace(self, compiled=self.engine is not None, graphed=True)

    def saving(self) -> Any:
        """A context for the forward pass."""
        pinned = torch.cuda.is_available()
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self.offload else nullcontext()

    def compile(self, model: Any) -> Any:
        """``model``, compiled with a backend of its own, because PyTorch shares compiled code between models by backend."""

        def backend(graph: Any, inputs: Any) -> Any:
            with torch._functorch.config.patch(activation_memory_budget=self.activation_budget):
                return torch._dynamo.lookup_backend("inductor")(graph, inputs)

        return torch.compile(model, dynamic=False, backend=backend)


EXPENSIVE = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
"""Operations whose results selective checkpointing keeps: those that are limited by arithmetic, as in PyTorch's example."""


def checkpointing_name(model: Any) -> str:
    """What the methods of a model call checkpointing: "activation", or "gradient" before transformers 5.23."""
    return "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"


def _checkpoint(model: Any, way: Contender) -> None:
    """Switch activation checkpointing of a model's layers on or off."""
    name = checkpointing_name(model)
    if getattr(model, f"is_{name}_checkpointing") == way.checkpointing:
        return
    if way.checkpointing:
        selective = partial(create_selective_checkpoint_contexts, list(EXPENSIVE))
        options: dict[str, Any] = {"context_fn": selective} if way.selective else {}
        if way.graphed:  # a capture cannot restore random numbers: wrong with dropout, but the speed is the same
            options["preserve_rng_state"] = False
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False, **options})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


STOCK = Contender()
CHECKPOINTING = Contender(checkpointing=True)
OFFLOADING = Contender(offload=True)
SELECTIVE = Contender(checkpointing=True, selective=True)
COMPILED = Contender(compiled=True)
COMPILED_WITHIN = tuple(replace(COMPILED, activation_budget=share) for share in (0.5, 0.1))
STOCK_CONTENDERS = (STOCK, CHECKPOINTING, SELECTIVE, OFFLOADING, COMPILED, *COMPILED_WITHIN)


def stock_contenders(device: torch.device) -> list[Contender]:
    """Ways to train a stock model, without offloading to the CPU if the model is there already."""
    return [way for way in STOCK_CONTENDERS if device.type != "cpu" or not way.offload]


def reversible_contenders(
    betas: Sequence[float], engines: Sequence[str] = ("autograd", "reprop", "pareprop")
) -> tuple[Contender, ...]:
    return tuple(Contender(engine, float(beta)) for beta in betas for engine in engines)


def faster(ways: Sequence[Contender], device: torch.device) -> tuple[Contender, ...]:
    """Faster variants of reversible ``ways``, and plain training to compare: compiled steps, and CUDA graphs on a GPU."""
    compiled = [replace(way, compiled=True) for way in ways]
    if device.type != "cuda":
        return tuple(compiled)
    graphed = (STOCK, CHECKPOINTING, *ways, *compiled)
    return (*compiled, *(replace(way, graphed=True) for way in graphed))


def with_free_budget(ways: Sequence[Contender]) -> tuple[Contender, ...]:
    """``ways``, and each pareprop among them once more with the budget that costs no memory."""
    with_it = ([way, way.within_gradients()] if way.engine == "pareprop" else [way] for way in ways)
    return tuple(chain.from_iterable(with_it))


def plain_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of the model that plain training uses instead of a reversible one."""
    if architecture_behind(model_class, config).has_stock_classes:
        return stock_twin(model_class, config)
    plain: Any = copy.deepcopy(config)
    plain.beta, plain.backward_engine, plain.memory_budget = 0.0, "autograd", None
    return model_class, plain


def to_plain(model: Any) -> Any:
    """The model that plain training uses instead of a reversible one, with the same weights."""
    if architecture_behind(type(model), model.config).has_stock_classes:
        return to_stock(model)
    plain = copy.deepcopy(model)
    Contender("autograd").prepare(plain)
    return plain


@dataclass(frozen=True)
class Subject:
    """The model to train: a reversible class and its configuration. The stock twin follows from them."""

    model_class: type[ReversiblePreTrainedModel]
    config: PreTrainedConfig

    @classmethod
    def of(cls, class_name: str, config: PreTrainedConfig) -> "Subject":
        """The subject for the stock class and the configuration of a checkpoint.

        Raises:
            ValueError: the class has no reversible twin, or the configuration needs something that the twin cannot do.
        """
        architecture, head = architecture_of(class_name)
        return cls(architecture.heads[head], reversible_config(config, architecture, head, {}))

    def build(self, contender: Contender) -> PreTrainedModel:
        """A model of random weights for ``contender``, in training mode."""
        model_class: type[PreTrainedModel] = self.model_class
        config = self.config
        if contender.engine is None:
            model_class, config = plain_twin(self.model_class, config)
        model = _random(model_class, config)
        contender.prepare(model)
        return model.train()


def _random(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights. It uses SDPA if it can, whatever the configuration says."""
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    model: PreTrainedModel = model_class._from_config(copy.deepcopy(config), attn_implementation=attention)
    return model


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """The optimizer that `Trainer` uses by default."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)


def forward_backward(model: Callable[..., Any], batch: Batch, contender: Contender, device: torch.device, bf16: bool):
    """Run the forward and the backward pass as a contender does. Gradients are left in ``.grad``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), contender.saving():
        outputs = model(**batch)  # held during the backward pass, as the accounting counts them
        loss = loss_of(outputs)
    loss.backward()


class Twins:
    """Plain models and their reversible twin. They share the tensors of their weights and the optimizer.

    So contenders can take turns, and each has all the memory that it would have alone. Some contenders change a plain model
    permanently, so each of them has its own: checkpointing adds hooks, and compiled code depends on the hooks that exist.
    """

    def __init__(self, subject: Subject, device: torch.device):
        reversible: Any = _random(subject.model_class, subject.config)
        self.reversible = reversible
        self.reversible.to(device).train()
        self.device = device
        self._architecture = architecture_behind(subject.model_class, subject.config)
        self._head = self._architecture.head_of(subject.model_class)
        self._models: dict[Contender | None, Any] = {}
        self._pairs: dict[Any, list[tuple[torch.nn.Parameter, torch.nn.Parameter]]] = {}
        self.plain = self._plain_model(STOCK)
        own = dict(self.plain.named_parameters())
        self._pairs[self.reversible] = [(own[name], twin) for name, twin in self._twins(self.plain).items()]
        self._optimizer = make_optimizer(self.plain)
        self._retentions: dict[Contender, Any] = {}
        self._compiled: dict[Contender, Any] = {}
        self._graph: tuple[Contender, GraphedStep] | None = None  # only one at a time, because it keeps its memory

    def step(self, contender: Contender, batch: Batch, bf16: bool) -> None:
        """One training step: forward, backward, optimizer, gradients freed."""
        model = self._plain_model(contender) if contender.engine is None else self.reversible
        contender.prepare(model)
        if contender.engine is not None:  # a model of its own, which remembers what was measured
            runner = model.layer_runner
            runner.retention = self._retentions.setdefault(contender, runner.retention)
        try:
            if contender.graphed:
                self._graphed(contender, model, batch, bf16)(**batch)
            else:
                forward_backward(self._callable(contender, model, batch, bf16), batch, contender, self.device, bf16)
            for own, used in self._pairs[model]:
                if used.grad is not None:
                    own.grad = used.grad[len(used) - len(own) :]
            self._optimizer.step()
        finally:
            for own, used in self._pairs[model]:
                own.grad = used.grad = None

    def static_bytes(self) -> int:
        """Bytes in memory between two steps: weights, buffers, and the optimizer's state after its first step."""
        tensors = [*self.reversible.parameters(), *self.plain.buffers()]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def _plain_model(self, contender: Contender) -> Any:
        key = contender if contender.checkpointing or contender.compiled else None
        if key not in self._models:
            model: Any = to_plain(self.reversible)
            used = dict(model.named_parameters())
            for name, twin in self._twins(model).items():
                # Without the extra rows that the reversible model has before those of BERT's position table.
                used[name].data = twin.data[len(twin) - len(used[name]) :]
            self._models[key] = model
            own = dict(self._models[None].named_parameters())
            self._pairs[model] = [(own[name], parameter) for name, parameter in used.items()]
        return self._models[key]

    def _twins(self, plain: Any) -> dict[str, torch.nn.Parameter]:
        """The reversible model's parameters by the names of a plain model."""
        given = dict(self.reversible.named_parameters(remove_duplicate=False))
        names = (name for name, _ in plain.named_parameters())
        return {name: given[self._architecture.reversible_name(name, self._head, given)] for name in names}

    def _graphed(self, contender: Contender, model: Any, batch: Batch, bf16: bool) -> GraphedStep:
        if self._graph is None or self._graph[0] != contender:
            self.forget_graph()
            self._graph = contender, GraphedStep(model, batch, autocast=torch.bfloat16 if bf16 else None)
        return self._graph[1]

    def forget_graph(self) -> None:
        """Free the memory of the last CUDA graph."""
        self._graph = None
        release(self.device)

    def _callable(self, contender: Contender, model: Any, batch: Batch, bf16: bool) -> Any:
        if not contender.compiled or contender.engine is not None:
            return model
        if contender not in self._compiled:
            self._compiled[contender] = compiled = contender.compile(model)
            # Two passes before anything is timed: the first sets a field of the configuration, so the second compiles again.
            for _ in range(2):
                forward_backward(compiled, batch, contender, self.device, bf16)
            model.zero_grad(set_to_none=True)
        return self._compiled[contender]
