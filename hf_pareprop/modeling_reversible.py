"""What all reversible models share: the choice of the engine, and how models are saved and loaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .adapters import check_coupling, note_coupling
from .cuda_rng import capturing
from .engine import get_engine
from .findings import Findings
from .plan import LayerPlan, check_compile_steps, check_engine, plan_layers
from .processes import check_not_tensor_parallel
from .remote_code import code_of, save_code
from .retention import Retention
from .tape import Tape

logger = logging.get_logger("transformers.hf_pareprop")  # a child of transformers' logger, to share its verbosity


def requested(name: str, config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument or the configuration asks for an output such as `output_hidden_states`."""
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


class HiddenState(nn.Module):
    """Records hidden states. It is a module because transformers records outputs with forward hooks."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return after


class ReversiblePreTrainedModel(PreTrainedModel):
    """Base of the reversible families.

    A family defines `auto_map`. Its base model has an `encoder` (:class:`~blocks.Encoder`), which runs layers with a tape.
    """

    retention: Retention | None = None
    logits_per_state = 0
    """How many logits the head computes for each position. 0 if they are too few to count their memory."""

    auto_map: ClassVar[dict[str, str]] = {}
    """Maps each Auto class to the family's class for it, as `module.Class`. It is saved with every checkpoint."""

    late_parameter: ClassVar[str | None] = None
    """The end of certain parameter names. The stock model lists such a parameter after all others of the module before it."""

    model_tags = ["hf_pareprop", "reversible"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, *inputs, **kwargs):
        if not hasattr(config, "layer_plans"):
            raise ValueError(
                f"{type(self).__name__} got a {type(config).__name__}, which has no beta: use {self.config_class.__name__}, "
                "or hf_pareprop.to_reversible(model) to convert a stock model."
            )
        config.check_reversible()
        super().__init__(config, *inputs, **kwargs)
        self._findings = Findings()

    @property
    def layer_runner(self) -> Any:
        """The model whose forward pass runs the layers: the base model, or one inside it."""
        return self.base_model

    @property
    def layer_plans(self) -> tuple[LayerPlan, ...]:
        """How each layer that the encoder has now is coupled.

        Raises:
            ValueError: the list `beta` has another number of entries than the encoder has layers.
        """
        return self._plans(self.config.beta)

    def _plans(self, beta: float | Sequence[float]) -> tuple[LayerPlan, ...]:
        base: Any = self.base_model
        depths = [len(stage) for stage in base.encoder.stages()]
        transitions = {i for i, layer in enumerate(self.encoder_layers) if getattr(layer, "changes_shape", False)}
        return plan_layers(beta, depths, self.config.grid_bits, transitions, self.config.steps)

    @property
    def encoder_layers(self) -> list[nn.Module]:
        """The layers that the encoder has now, in all stages."""
        base: Any = self.base_model
        return [layer for stage in base.encoder.stages() for layer in stage]

    def set_backward_engine(self, name: str) -> None:
        """Choose how gradients are computed, from the next forward pass on. The gradients are the same with every engine.

        Args:
            name: `"autograd"` stores activations. `"reprop"` rebuilds them, with the least memory. `"pareprop"` rebuilds them
                while gradients are computed.

        Raises:
            ValueError: the engine is unknown.

        Example:
            >>> model.set_backward_engine("reprop")
        """
        check_engine(name)
        self.config.backward_engine = name

    def set_beta(self, beta: float | Sequence[float]) -> None:
        """Change the coupling, from the next forward pass on. The weights are not changed.

        Args:
            beta: one number for all layers, or a list with one per layer: 0, 1 or a negative power of two.

        Raises:
            ValueError: `beta` is out of range.

        Example:
            >>> model.set_beta(1 / 16)
        """
        self._plans(beta)
        self.config.beta = beta if isinstance(beta, (int, float)) else list(beta)
        note_coupling(getattr(self, "peft_config", {}), self.config.beta, self.config.steps)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters that PEFT has put into this model, by name; PEFT sets it.

        Raises:
            AttributeError: there are none.
            ValueError: when it is set, if an adapter was trained at another beta, or with other steps.
        """
        if "_adapters" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no adapters.")
        adapters: dict[str, Any] = self.__dict__["_adapters"]
        return adapters

    @peft_config.setter
    def peft_config(self, adapters: dict[str, Any]) -> None:
        check_coupling(adapters, self.config.beta, self.config.steps)
        note_coupling(adapters, self.config.beta, self.config.steps)
        self.__dict__["_adapters"] = adapters

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_adapters"]

    def set_memory_budget(self, budget: str | None) -> None:
        """Choose what is kept instead of being rebuilt, from the next forward pass on. The gradients are the same.

        Args:
            budget: a value of `memory_budget` in the configuration, see [`ReversibleConfig`].

        Raises:
            ValueError: `budget` is not a budget.

        Example:
            >>> model.set_memory_budget("4GB")
        """
        self.keep_within(budget)
        self.config.memory_budget = budget

    def keep_within(self, budget: str | None) -> None:
        """The same as :meth:`set_memory_budget`, but the configuration, which is saved with the model, stays as it is.

        Raises:
            ValueError: `budget` is not a budget.
        """
        runner: Any = self.layer_runner
        runner.retention = Retention(budget, runner.layer_parameters, runner.logits_per_state)

    def set_compile_steps(self, on: bool) -> None:
        """Choose whether the steps of reversible layers run as compiled code, from the next forward pass on.

        Args:
            on: a value of `compile_steps` in the configuration, see [`ReversibleConfig`].

        Raises:
            ValueError: `on` is neither True nor False.

        Example:
            >>> model.set_compile_steps(True)
        """
        check_compile_steps(on)
        self.config.compile_steps = on

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        """As in PyTorch, in the order of the stock model, so that the state of an optimizer fits both."""
        late: list[tuple[str, nn.Parameter]] = []
        for name, parameter in super().named_parameters(*args, **kwargs):
            if late and not name.startswith(late[0][0].removesuffix(str(self.late_parameter))):
                yield late.pop()
            if self.late_parameter is not None and name.endswith(self.late_parameter):
                late.append((name, parameter))
            else:
                yield name, parameter
        yield from late

    def layer_parameters(self) -> list[Tensor]:
        """The parameters of all layers."""
        return [parameter for layer in self.encoder_layers for parameter in layer.parameters()]

    def encode(self, embeddings: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        """Run the encoder with a tape of its own."""
        self.refuse_offloaded(embeddings)
        encoder: Any = self.encoder
        output: Tensor = self.with_tape(lambda tape: encoder(embeddings, *inputs, tape=tape, **kwargs), kwargs)
        return output

    def with_tape(self, forward: Callable[[Tape], Any], options: Mapping[str, Any]) -> Any:
        """Run a forward pass with a new tape. If memory runs out, it runs once more and keeps less.

        Args:
            forward: takes the tape, and returns the last hidden state or a model output that begins with it.
            options: arguments that ask for outputs, such as `output_attentions`.

        Raises:
            OutOfMemoryError: nothing was kept, or other processes take part in the forward pass, so this one cannot repeat it.
        """
        self._findings.settle()
        if self.retention is None:
            self.keep_within(self.config.memory_budget)
        retention: Any = self.retention
        while True:
            tape = self._new_tape(options)
            try:
                output = forward(tape)
                retention.watch(output if isinstance(output, Tensor) else output[0], tape.kept)
                tape.end()
                return output
            except torch.OutOfMemoryError:
                if capturing(self.device) or not retention.back_off(tape.kept):
                    raise  # a capture has to keep what the ordinary pass before it kept
            logger.warning(
                "out of memory in the forward pass: it is repeated, and from now on fewer layers keep their graphs."
            )
            del tape
            torch.cuda.empty_cache()

    def refuse_offloaded(self, embeddings: Tensor) -> None:
        """
        Raises:
            RuntimeError: parameters of layers are offloaded, and gradients are wanted.
        """
        if embeddings.is_meta or not torch.is_grad_enabled():
            return
        parameters = self.layer_parameters()
        elsewhere = any(p.is_meta for p in parameters)
        if elsewhere and (embeddings.requires_grad or any(p.requires_grad for p in parameters)):
            raise RuntimeError(
                "the parameters of layers are on the meta device. The offloading of accelerate does that, and brings them back for "
                "the forward pass alone: they would get no gradient, and in the stock model they get none either. For training, "
                "shard the model with FSDP2, and offload with its CPUOffloadPolicy. For inference, run it in torch.no_grad()."
            )

    def needs_activations(self, options: Mapping[str, Any]) -> str | None:
        """The first option of a forward pass that needs stored activations, in words; `None` if there is none."""
        return "output_attentions" if requested("output_attentions", self.config, options) else None

    def _new_tape(self, options: Mapping[str, Any]) -> Tape:
        """The tape of one forward pass, with the `autograd` engine where activations have to be stored."""
        engine, plans = self.config.backward_engine, self.layer_plans
        if engine != "autograd" and torch.is_grad_enabled():
            if reason := self.needs_activations(options):
                logger.warning_once(
                    f"backward_engine={engine!r} falls back to 'autograd', which stores activations, because of {reason}."
                )
                engine = "autograd"
            elif self.training and any(
                plan.reversible and getattr(layer, "gradient_checkpointing", False)
                for plan, layer in zip(plans, self.encoder_layers, strict=True)
            ):
                logger.info_once(
                    "activation checkpointing does nothing to reversible layers, which store no activations in the first "
                    "place; conventional layers use it."
                )
        # Within torch.compile(model), for example with Trainer's torch_compile=True, users expect compiled layers.
        compiles = self.config.compile_steps or torch.compiler.is_compiling()
        return Tape(get_engine(engine), plans, self.retention, self._findings, compiles)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers. The weights may be those of a stock checkpoint.

        Args:
            kwargs: those of transformers, and fields of the configuration such as `beta` and `memory_budget`.

        Raises:
            ValueError: the arguments ask for tensor parallelism, or a field of the configuration is out of range.

        Example:
            >>> model = RevViTForImageClassification.from_pretrained("google/vit-base-patch16-224", beta=1 / 32)
        """
        check_not_tensor_parallel(kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers. The code of the model is saved with it, so that it loads with `trust_remote_code=True`.

        Raises:
            ValueError: a field of the configuration is out of range; or the directory has a file with the name of a file of the
                code that this package did not write.

        Example:
            >>> model.save_pretrained("rev-vit")
            >>> AutoModelForImageClassification.from_pretrained("rev-vit", trust_remote_code=True)
        """
        self._check_and_map()
        if is_main_process:
            self._save_code(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def save_structure(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what :meth:`save_pretrained` writes beside the weights: the code and the configuration.

        Args:
            folder: the directory; it is made if it does not exist.
            dtype: the dtype of the weights.
        """
        self._check_and_map()
        self._save_code(folder)
        self.config.dtype, self.config.architectures = dtype, [type(self).__name__]
        self.config.save_pretrained(folder)

    def _check_and_map(self) -> None:
        self.config.check_reversible()
        self.config.auto_map = dict(self.auto_map)

    def _save_code(self, folder: Path) -> None:
        # transformers would copy the file of the model's class. Under FSDP2 that is a class that FSDP2 has derived from ours.
        save_code(folder, code_of(next(cls for cls in type(self).__mro__ if "auto_map" in cls.__dict__)))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: every checkpoint is saved with its code and with an `auto_map` of the whole family."""
