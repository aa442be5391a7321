"""What all reversible models share: the switch of engines, and how they travel to the Hub and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .adapters import check_beta, note_beta
from .engine import get_engine
from .findings import Findings
from .plan import LayerPlan, check_engine, plan_layers
from .remote_code import code_of, save_code
from .retention import Retention
from .tape import Tape

logger = logging.get_logger("transformers.hf_pareprop")  # so that the verbosity of transformers holds for it


def requested(name: str, config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether an output such as `output_hidden_states` is asked for, by argument or by configuration."""
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


class HiddenState(nn.Module):
    """Where hidden states are recorded; a module because transformers records outputs with forward hooks."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return after


class ReversiblePreTrainedModel(PreTrainedModel):
    """Base of the reversible families.

    A family defines `auto_map`, and its base model has an `encoder` (:class:`~blocks.Encoder`), which runs layers with a tape.
    """

    retention: Retention | None = None
    logits_per_state = 0
    """How many a base model's head computes, where they are so many that they take memory worth counting."""

    auto_map: ClassVar[dict[str, str]] = {}
    """From each Auto class to the family's class for it, as `module.Class`; written into every checkpoint."""

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
    def layer_plans(self) -> tuple[LayerPlan, ...]:
        """How each layer is coupled, of those that the encoder has now.

        Raises:
            ValueError: the list `beta` has another number of entries than the encoder has layers.
        """
        return self._plans(self.config.beta)

    def _plans(self, beta: float | Sequence[float]) -> tuple[LayerPlan, ...]:
        base: Any = self.base_model
        depths = [len(stage) for stage in base.encoder.stages()]
        transitions = {i for i, layer in enumerate(self.encoder_layers) if getattr(layer, "changes_shape", False)}
        return plan_layers(beta, depths, self.config.grid_bits, transitions)

    @property
    def encoder_layers(self) -> list[nn.Module]:
        """The layers that the encoder has now, of all stages."""
        base: Any = self.base_model
        return [layer for stage in base.encoder.stages() for layer in stage]

    def set_backward_engine(self, name: str) -> None:
        """Choose how gradients are computed from the next forward pass on: autograd, reprop or pareprop.

        The gradients are the same; `autograd` stores activations, the others rebuild them.

        Raises:
            ValueError: the engine is unknown.
        """
        check_engine(name)
        self.config.backward_engine = name

    def set_beta(self, beta: float | Sequence[float]) -> None:
        """Change the coupling, one number or one per layer, from the next forward pass on. The weights stay.

        Raises:
            ValueError: `beta` is out of range.
        """
        self._plans(beta)
        self.config.beta = beta if isinstance(beta, (int, float)) else list(beta)
        note_beta(getattr(self, "peft_config", {}), self.config.beta)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters that PEFT has put into this model, by name; PEFT sets it.

        Raises:
            AttributeError: there are none.
            ValueError: when it is set, if an adapter was trained at another beta.
        """
        if "_adapters" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no adapters.")
        adapters: dict[str, Any] = self.__dict__["_adapters"]
        return adapters

    @peft_config.setter
    def peft_config(self, adapters: dict[str, Any]) -> None:
        check_beta(adapters, self.config.beta)
        note_beta(adapters, self.config.beta)
        self.__dict__["_adapters"] = adapters

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_adapters"]

    def set_memory_budget(self, budget: str | None) -> None:
        """Choose what is kept instead of being rebuilt, from the next forward pass on. The gradients are the same.

        The configuration stays as it is: it travels, and memory is a machine's.

        Args:
            budget: as `memory_budget` of the configuration.

        Raises:
            ValueError: it is not a budget.

        Example:
            >>> model.set_memory_budget("4GB")
        """
        base: Any = self.base_model
        base.retention = Retention(budget, base.layer_parameters, base.logits_per_state)

    def layer_parameters(self) -> list[Tensor]:
        """The parameters of all layers."""
        return [parameter for layer in self.encoder_layers for parameter in layer.parameters()]

    def encode(self, embeddings: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        """Run the encoder with a tape of its own; where memory runs out, once more with less kept."""
        self._findings.settle()
        if self.retention is None:
            self.set_memory_budget(self.config.memory_budget)
        encoder: Any = self.encoder
        retention: Any = self.retention
        while True:
            tape = self._new_tape(**kwargs)
            try:
                hidden_states = encoder(embeddings, *inputs, tape=tape, **kwargs)
                retention.watch(tape.trail, hidden_states, tape.kept)
                tape.end()
                return hidden_states
            except torch.OutOfMemoryError:
                if not retention.back_off(tape.kept):
                    raise
            logger.warning(
                "out of memory in the forward pass: it is repeated, and from now on fewer layers keep their graphs."
            )
            del tape
            torch.cuda.empty_cache()

    def _new_tape(self, **kwargs: Any) -> Tape:
        """The tape of one forward pass, with the `autograd` engine where attention maps are asked for."""
        engine, plans = self.config.backward_engine, self.layer_plans
        if engine != "autograd" and torch.is_grad_enabled():
            if requested("output_attentions", self.config, kwargs):
                logger.warning_once(
                    f"backward_engine={engine!r} falls back to 'autograd', which stores activations, because of "
                    "output_attentions."
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
        return Tape(get_engine(engine), plans, self.retention, self._findings)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers; the code of the model goes along, so that it loads with `trust_remote_code=True`.

        Raises:
            ValueError: a field of the configuration has been set to what it cannot be; or a file of somebody else's lies where
                the code has to go.
        """
        self._check_and_map()
        if is_main_process:
            self._save_code(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def save_structure(self, folder: Path, dtype: torch.dtype) -> None:
        """What :meth:`save_pretrained` writes beside the weights: the code and the configuration.

        Args:
            folder: made if it does not exist.
            dtype: of the weights.
        """
        self._check_and_map()
        self._save_code(folder)
        self.config.dtype, self.config.architectures = dtype, [type(self).__name__]
        self.config.save_pretrained(folder)

    def _check_and_map(self) -> None:
        self.config.check_reversible()
        self.config.auto_map = dict(self.auto_map)

    def _save_code(self, folder: Path) -> None:
        # Not left to transformers, which would copy the file of the class that FSDP2 derives from ours.
        save_code(folder, code_of(next(cls for cls in type(self).__mro__ if "auto_map" in cls.__dict__)))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: every checkpoint is written with its code and with an `auto_map` of the whole family."""
