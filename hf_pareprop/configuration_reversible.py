"""The configuration fields that every reversible family adds to its stock configuration."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from .plan import CONVERTED_BETA, DEFAULT_GRID_BITS, LayerPlan, check_engine, parse_budget, plan_layers
from .remote_code import code_of, save_code

logger = logging.get_logger("transformers.hf_pareprop")  # so that the verbosity of transformers holds for it

REMOVED = {
    "anchor_every": "states are exact at any depth, so anchors are not needed",
    "retained_layers": "say it as memory_budget, for example memory_budget='4 layers'",
}
"""Fields of earlier versions, and what to do without them."""


def _refuse_removed(fields: dict[str, Any]) -> None:
    """Take fields of earlier versions out, which did nothing at their defaults.

    Raises:
        ValueError: one was set.
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
            Coupling of the layers, one number or one per layer: 1 is RevNet coupling, for training from scratch;
            0.5, 0.25, … stay closer and closer to the stock checkpoint that was converted (1/32 is the default when one
            is loaded); 0 is a conventional layer, which stores its activations.
        backward_engine (`str`, defaults to `"pareprop"`):
            `"autograd"`, `"reprop"` or `"pareprop"`; the gradients are the same.
        grid_bits (`int` or `None`, defaults to 16):
            States are whole numbers of `2**-grid_bits`, so that they are rebuilt bit for bit. They have to stay below
            `2**(30 - grid_bits)`, 16384 by default; beyond it the outputs become NaN. 1 to 22. `None` leaves states floats,
            which only the `autograd` engine can train.
        memory_budget (`str` or `None`, defaults to `None`):
            What to keep from the forward pass instead of rebuilding it: first the results of the linear layers that end MLPs,
            then the graphs of layers, from the last one on. `None` keeps nothing. `"gradients"` keeps what is free: as many
            bytes as the gradients of the layers' parameters take later in the step, so that the peak stays where it is
            (nothing but with the first of accumulated gradients). `"4GB"` keeps so much, `"80%"` that part of the free
            memory, `"auto"` nearly all of it, `"4 layers"` the graphs of the last four layers. Measured in the first
            steps, and for every shape of batch.
        stock_model_type (`str` or `None`, defaults to `None`):
            Model type of the stock checkpoint that the weights came from, which exporting returns to; `None` is the
            family's own.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> RevViTConfig(num_hidden_layers=24, beta=1 / 32, memory_budget="gradients")
    """

    beta: float | int | list[float] = 1.0
    backward_engine: str = "pareprop"
    grid_bits: int | None = DEFAULT_GRID_BITS
    memory_budget: str | None = None
    stock_model_type: str | None = None

    stock_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types of the stock checkpoints that load straight into this family."""

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
        stock = (*self.stock_model_types, *self.converted_model_types)
        if self.stock_model_type is not None and self.stock_model_type not in stock:
            raise ValueError(f"stock_model_type={self.stock_model_type!r} is not None or one of {', '.join(stock)}.")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; what `kwargs` change is checked, too.

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
            ValueError: a file of somebody else's lies where the code has to go.
        """
        family = next(cls for cls in type(self).__mro__ if "_auto_class" in cls.__dict__)
        files = code_of(family)
        save_code(Path(save_directory), files)
        super().save_pretrained(save_directory, *args, **kwargs)
        save_code(Path(save_directory), files)  # transformers has copied them again, without a mark

    def layer_plans(self) -> tuple[LayerPlan, ...]:
        """How each layer is coupled.

        Raises:
            ValueError: `beta` or `grid_bits` is out of range.
        """
        return plan_layers(self.beta, self.stage_depths, self.grid_bits, self.transitions)

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """How many layers each stage has. Nothing else counts layers: `num_hidden_layers` of a Swin is its number of stages."""
        return (self.num_hidden_layers,)

    @property
    def transitions(self) -> tuple[int, ...]:
        """The layers that change the shape of the hidden state, counted from 0 across stages. They are never reversible."""
        return ()

    @classmethod
    def depth_fields(cls, depth: int, stages: int = 1) -> dict[str, Any]:
        """The fields that give a configuration of this family, or of its stock twin, so many layers in its deepest stage.

        Args:
            stages: how many stages, of families that have several; the others get one layer each.
        """
        return {"num_hidden_layers": depth}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; the configuration of a stock checkpoint becomes this family's, at beta = 1/32.

        Raises:
            ValueError: the checkpoint is of another architecture.
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
        if "beta" not in kwargs:
            logger.warning_once(
                f"{pretrained_model_name_or_path} is a stock checkpoint and becomes reversible at beta={CONVERTED_BETA:g}, "
                "which changes a little what it computes: give beta to choose."
            )
        return cls.from_stock_dict(cls.stock_dict(config_dict)), kwargs

    @classmethod
    def stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The configuration file of a stock checkpoint with the fields that it leaves out because they are at their defaults."""
        return {**CONFIG_MAPPING[config_dict["model_type"]].from_dict(config_dict).to_dict(), **config_dict}

    @classmethod
    def from_stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The dictionary of a stock configuration as one of this family, `beta` defaulting to 1/32."""
        found = config_dict["model_type"]
        origin = {} if found == cls.stock_model_types[0] else {"stock_model_type": found}
        return {"beta": CONVERTED_BETA, **origin, **config_dict, "model_type": cls.model_type}
