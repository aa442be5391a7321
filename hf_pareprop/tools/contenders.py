"""What a user could train with: the stock model in several ways, and its reversible twin with several engines.

A family that has no stock classes in transformers is trained plainly as the reversible class itself, with no layer
reversible (`beta=0`) and the engine `autograd`: that computes and stores what a stock model would.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_reversible import ReversiblePreTrainedModel
from .convert import architecture_behind, reversible_config, stock_twin, to_stock
from .families import architecture_of

Batch = Mapping[str, Any]

WITHIN_GRADIENTS = "budget of gradients"
"""What the names of contenders with that budget end with."""


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: for people.
        engine: of the reversible model; ``None`` is plain training, of the stock model.
        beta: of the reversible model.
        budget: of memory, by which its last layers keep graphs and results of linear layers.
        checkpointing: activation checkpointing of every layer, as ``gradient_checkpointing=True`` does it.
        selective: where it checkpoints, keep the results of matrix products and of attention all the same.
        offload: saved activations wait in the host's memory (``torch.autograd.graph.save_on_cpu``).
        compiled: ``torch.compile``, for each shape anew.
        activation_budget: share of the activations that compiled code keeps; it computes the others again.
    """

    name: str
    engine: str | None = None
    beta: float = 0.0
    budget: str | None = None
    checkpointing: bool = False
    selective: bool = False
    offload: bool = False
    compiled: bool = False
    activation_budget: float = 1.0

    @property
    def predictable(self) -> bool:
        """Whether the accounting knows its memory: what compilers and policies keep is known after they have run."""
        return not (self.compiled or self.selective)

    def prepare(self, model: Any) -> None:
        """Have ``model``, plain or reversible as this contender is, work this way from the next forward pass on."""
        if self.engine is not None:
            model.set_backward_engine(self.engine)
            model.set_beta(self.beta)
            model.set_memory_budget(self.budget)
        else:
            _checkpoint(model, self.checkpointing, self.selective)

    def retaining(self, layers: int) -> "Contender":
        """The same with the graphs of so many layers kept."""
        return replace(self, name=f"{self.name}, {layers} layers kept", budget=f"{layers} layers")

    def within_gradients(self) -> "Contender":
        """The same with as much kept as the gradients of parameters will take."""
        return replace(self, name=f"{self.name}, {WITHIN_GRADIENTS}", budget="gradients")

    def saving(self) -> Any:
        """The context in which the forward pass runs."""
        return (
            torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext()
        )

    def compile(self, model: Any) -> Any:
        """``model`` as this contender runs it. PyTorch shares compiled code between models with the same backend."""

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
"""Operations whose results selective checkpointing keeps: those bound by arithmetic, as in PyTorch's own example."""


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(list(EXPENSIVE))


def _checkpoint(model: Any, on: bool, selective: bool) -> None:
    """Switch activation checkpointing of a model's layers, which transformers 5.23 renamed."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if getattr(model, f"is_{name}_checkpointing") == on:
        return
    if on:
        getattr(model, f"{name}_checkpointing_enable")(
            {"use_reentrant": False, **({"context_fn": _selective_contexts} if selective else {})}
        )
    else:
        getattr(model, f"{name}_checkpointing_disable")()


STOCK = Contender("plain training")
CHECKPOINTING = Contender("gradient checkpointing", checkpointing=True)
OFFLOADING = Contender("activations on the CPU", offload=True)
SELECTIVE = Contender("selective checkpointing", checkpointing=True, selective=True)
COMPILED = Contender("torch.compile", compiled=True)
COMPILED_WITHIN = tuple(
    Contender(f"torch.compile, activation budget {share:g}", compiled=True, activation_budget=share)
    for share in (0.5, 0.1)
)
STOCK_CONTENDERS = (STOCK, CHECKPOINTING, SELECTIVE, OFFLOADING, COMPILED, *COMPILED_WITHIN)


def reversible_contenders(
    betas: Sequence[float], engines: Sequence[str] = ("autograd", "reprop", "pareprop")
) -> tuple[Contender, ...]:
    return tuple(Contender(f"{engine}, beta {beta:g}", engine, beta) for beta in betas for engine in engines)


def with_free_budget(ways: Sequence[Contender]) -> tuple[Contender, ...]:
    """``ways``, and each pareprop among them once more with what it can keep for free."""
    return tuple(
        way for given in ways for way in ([given, given.within_gradients()] if given.engine == "pareprop" else [given])
    )


def plain_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of what plain training trains instead of a reversible model."""
    if architecture_behind(model_class, config).has_stock_classes:
        return stock_twin(model_class, config)[1:]
    plain: Any = copy.deepcopy(config)
    plain.beta, plain.backward_engine, plain.memory_budget = 0.0, "autograd", None
    return model_class, plain


def to_plain(model: Any) -> Any:
    """What plain training trains instead of a reversible model, with the same weights."""
    if architecture_behind(type(model), model.config).has_stock_classes:
        return to_stock(model)
    plain = copy.deepcopy(model)
    Contender("plain", engine="autograd", beta=0.0).prepare(plain)
    return plain


@dataclass(frozen=True)
class Subject:
    """What is trained: a reversible class with a configuration, which its stock twin follows from; any weights."""

    model_class: type[ReversiblePreTrainedModel]
    config: PreTrainedConfig

    @classmethod
    def of(cls, class_name: str, config: PreTrainedConfig) -> "Subject":
        """Of the stock class and configuration of a checkpoint.

        Raises:
            ValueError: the class has no reversible twin, or the configuration asks for what its twin cannot do.
        """
        architecture, head = architecture_of(class_name)
        return cls(architecture.heads[head], reversible_config(config, architecture, head, {}))

    @property
    def takes_images(self) -> bool:
        return self.model_class.main_input_name == "pixel_values"

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
    """With SDPA, where the model can use it, whatever the configuration says."""
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    model: PreTrainedModel = model_class._from_config(copy.deepcopy(config), attn_implementation=attention)
    return model


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """The optimizer that `Trainer` uses by default."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)


def forward_backward(model: Callable[..., Any], batch: Batch, contender: Contender, device: torch.device, bf16: bool):
    """The part of a training step that contenders differ in; gradients land in ``.grad``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), contender.saving():
        outputs = model(**batch)
        loss = outputs.loss if outputs.get("loss") is not None else outputs[0].float().square().mean()
    loss.backward()


class Twins:
    """Plain models and their reversible twin with the same tensors for weights, trained by the same optimizer.

    So contenders can take turns, each with all the memory that it would have alone. There is a plain model each for
    those that change a model for good: checkpointing adds hooks to it, and compiled code depends on what hooks there are.
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

    def step(self, contender: Contender, batch: Batch, bf16: bool) -> None:
        """One training step: forward, backward, optimizer, gradients freed."""
        model = self._plain_model(contender) if contender.engine is None else self.reversible
        contender.prepare(model)
        if contender.engine is not None:  # its own, which remembers what was measured
            base = model.base_model
            base.retention = self._retentions.setdefault(contender, base.retention)
        try:
            forward_backward(self._callable(contender, model, batch, bf16), batch, contender, self.device, bf16)
            for own, used in self._pairs[model]:
                if used.grad is not None:
                    own.grad = used.grad[len(used) - len(own) :]
            self._optimizer.step()
        finally:
            for own, used in self._pairs[model]:
                own.grad = used.grad = None

    def static_bytes(self) -> int:
        """What lies in memory between two steps: weights, buffers, and the optimizer's state once it has run."""
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
                used[name].data = twin.data[
                    len(twin) - len(used[name]) :
                ]  # rows before those of BERT's position table
            self._models[key] = model
            own = dict(self._models[None].named_parameters())
            self._pairs[model] = [(own[name], parameter) for name, parameter in used.items()]
        return self._models[key]

    def _twins(self, plain: Any) -> dict[str, torch.nn.Parameter]:
        """The reversible model's parameters by the names of a plain model."""
        given = dict(self.reversible.named_parameters(remove_duplicate=False))
        names = (name for name, _ in plain.named_parameters())
        return {name: given[self._architecture.reversible_name(name, self._head, given)] for name in names}

    def _callable(self, contender: Contender, model: Any, batch: Batch, bf16: bool) -> Any:
        if not contender.compiled:
            return model
        if contender not in self._compiled:
            self._compiled[contender] = compiled = contender.compile(model)
            # Before anything is timed: the first pass sets a field of the configuration, so the second one compiles again.
            for _ in range(2):
                forward_backward(compiled, batch, contender, self.device, bf16)
            model.zero_grad(set_to_none=True)
        return self._compiled[contender]
