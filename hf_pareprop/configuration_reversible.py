"""The configuration fields that every reversible family adds to its stock configuration."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from .plan import (
    DEFAULT_GRID_BITS,
    LayerPlan,
    check_compile_steps,
    check_engine,
    converted_beta,
    parse_budget,
    plan_layers,
)
from .remote_code import code_of, save_code

logger = logging.get_logger("transformers.hf_pareprop")  # a child of transformers' logger, to share its verbosity

REMOVED = {
    "anchor_every": "states are exact at any depth, so anchors are not needed",
    "retained_layers": "say it as memory_budget, for example memory_budget='4 layers'",
}
"""Fields of earlier versions that no longer exist, and what to do instead."""


def _refuse_removed(fields: dict[str, Any]) -> None:
    """Remove fields of earlier versions that are at their defaults, where they did nothing.

    Raises:
        ValueError: such a field was set to something else.
    """
    for name, instead in REMOVED.items():
        if value := fields.pop(name, None):
            raise ValueError(
                f"{name}={value!r}: there is no such field any more, as an argument or in config.json; {instead}."
            )


class ReversibleConfig(PreTrainedConfig):
    """Fields of a reversible model. Families inherit from this class and from their stock configuration.

    Args:
        beta (`float` or `list[float]`, defaults to 1.0):
            Coupling of the layers, one number for all or one per layer. 1 is RevNet coupling, for training from scratch.
            Smaller values such as 0.5 or 0.25 stay closer to the stock checkpoint that was converted. The default for a
            stock checkpoint is 1/32, or 1/128 with `steps="layer"`. 0 is a conventional layer, which stores its activations.
        steps (`str`, defaults to `"sublayer"`):
            What is coupled: `"sublayer"`, the sub-blocks of a layer, attention and MLP; or `"layer"`, whole layers. Whole layers
            keep half as many side bits and use no parameter of another layer. Weights that were trained with one value do not
            fit the other.
        backward_engine (`str`, defaults to `"pareprop"`):
            `"autograd"`, `"reprop"` or `"pareprop"`; the gradients are the same.
        grid_bits (`int` or `None`, defaults to 16):
            From 1 to 22. States are integers in units of `2**-grid_bits`, so that they are rebuilt bit for bit. They have to
            stay below `2**(30 - grid_bits)`, 16384 by default; beyond that the outputs become NaN. `None` leaves states
            floats, which only the `autograd` engine can train.
        memory_budget (`str` or `None`, defaults to `None`):
            What to keep from the forward pass instead of rebuilding it: first the results of the linear layers that end MLPs,
            then the graphs of layers, from the last one on. `None` keeps nothing. `"gradients"` keeps as many bytes as the
            gradients of the layers' parameters take later in the step, so the peak of memory does not grow. (If gradients are
            accumulated over several batches, only the first batch keeps something.) `"4GB"` keeps that many bytes, `"80%"`
            uses that part of the free memory, `"auto"` nearly all of it, and `"4 layers"` keeps the graphs of the last four
            layers. How much fits is measured in the first steps, and for every shape of batch.
        compile_steps (`bool`, defaults to `False`):
            Whether the steps of reversible layers run as code from `torch.compile`, compiled once for every kind of step and
            shape of batch. Within `torch.compile(model)` they always do. Compiled code rounds differently and draws other random
            numbers for dropout than uncompiled code. It does so in every engine alike, so gradients are exact. Results of linear
            layers are then not kept.
        stock_model_type (`str` or `None`, defaults to `None`):
            Model type of the stock checkpoint that the weights came from. Exporting writes a checkpoint of this type. `None` is
            the family's own type.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> RevViTConfig(num_hidden_layers=24, beta=1 / 32, memory_budget="gradients")
    """

    beta: float | int | list[float] = 1.0
    steps: str = "sublayer"
    backward_engine: str = "pareprop"
    grid_bits: int | None = DEFAULT_GRID_BITS
    memory_budget: str | None = None
    compile_steps: bool = False
    stock_model_type: str | None = None

    stock_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types of the stock checkpoints that this family can load without conversion."""

    converted_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types whose checkpoints have to be converted first: their tensors have other names or shapes."""

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_removed(kwargs)
        super().__post_init__(**kwargs)
        self.check_reversible()

    def check_reversible(self) -> None:
        """
        Raises:
            ValueError: a field of this class is out of range.
        """
        self.layer_plans()
        check_engine(self.backward_engine)
        parse_budget(self.memory_budget)
        check_compile_steps(self.compile_steps)
        stock = (*self.stock_model_types, *self.converted_model_types)
        if self.stock_model_type is not None and self.stock_model_type not in stock:
            raise ValueError(f"stock_model_type={self.stock_model_type!r} is not None or one of {', '.join(stock)}.")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers. Changes by `kwargs` are checked as well.

        Raises:
            ValueError: a field is out of range.
        """
        _refuse_removed(kwargs)
        found = super().from_dict(config_dict, **kwargs)
        (found[0] if isinstance(found, tuple) else found).check_reversible()
        return found

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the code of the configuration.

        Raises:
            ValueError: the directory has a file with the name of a file of the code that this package did not write.
        """
        family = next(cls for cls in type(self).__mro__ if "stock_model_types" in cls.__dict__)
        save_code(Path(save_directory), code_of(family))
        own = {"AutoConfig": f"{family.__module__.rpartition('.')[2]}.{family.__name__}"}
        self.auto_map = own | (getattr(self, "auto_map", None) or {})
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: every configuration is saved with its code."""

    def layer_plans(self) -> tuple[LayerPlan, ...]:
        """How each layer is coupled.

        Raises:
            ValueError: `beta`, `grid_bits` or `steps` is out of range.
        """
        return plan_layers(self.beta, self.stage_depths, self.grid_bits, self.transitions, self.steps)

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """How many layers each stage has. Use this and not `num_hidden_layers`, which is the number of stages in a Swin."""
        return (self.num_hidden_layers,)

    @property
    def transitions(self) -> tuple[int, ...]:
        """The layers that change the shape of the hidden state, counted from 0 across stages. They are never reversible."""
        return ()

    @classmethod
    def depth_fields(cls, depth: int, stages: int = 1) -> dict[str, Any]:
        """The configuration fields for `depth` layers in the deepest stage, for this family or its stock twin.

        Args:
            depth: the number of layers in the deepest stage.
            stages: the number of stages, if the family has several. The other stages get one layer each.
        """
        return {"num_hidden_layers": depth}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers. The configuration of a stock checkpoint becomes one of this family, at the default `beta` for it.

        Raises:
            ValueError: the checkpoint has another architecture, or `steps` is out of range.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found == cls.model_type:
            return config_dict, kwargs
        if found in cls.converted_model_types:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is a checkpoint of model type {found!r}, which has to be converted "
                "first: use hf_pareprop.to_reversible(...) or the command hf-pareprop convert."
            )
        if found not in cls.stock_model_types:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is a checkpoint of model type {found!r}, which {cls.__name__} cannot "
                f"load: it takes {cls.model_type!r} and {', '.join(map(repr, cls.stock_model_types))}."
            )
        steps = kwargs.get("steps", cls.steps)
        if "beta" not in kwargs:
            logger.warning_once(
                f"{pretrained_model_name_or_path} is a stock checkpoint and becomes reversible at beta={converted_beta(steps):g}, "
                "which changes its outputs a little: give beta to choose."
            )
        return cls.from_stock_dict(cls.stock_dict(config_dict), steps), kwargs

    @classmethod
    def stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The configuration file of a stock checkpoint, with the default values of fields that it leaves out."""
        return {**CONFIG_MAPPING[config_dict["model_type"]].from_dict(config_dict).to_dict(), **config_dict}

    @classmethod
    def from_stock_dict(cls, config_dict: dict[str, Any], steps: str | None = None) -> dict[str, Any]:
        """Turn the dictionary of a stock configuration into one of this family, at the default `beta` for `steps`.

        Args:
            config_dict: the dictionary of the stock configuration.
            steps: `"sublayer"` or `"layer"`; by default that of the family.

        Raises:
            ValueError: `steps` is out of range.
        """
        steps = cls.steps if steps is None else steps
        found = config_dict["model_type"]
        origin = {} if found == cls.stock_model_types[0] else {"stock_model_type": found}
        coupling = {"beta": converted_beta(steps), "steps": steps}
        return {**coupling, **origin, **config_dict, "model_type": cls.model_type}
