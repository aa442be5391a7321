"""The configuration fields that every reversible family adds to its stock configuration."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from .plan import LayerPlan, check_engine, check_retention, plan_layers

logger = logging.get_logger(__name__)


class ReversibleConfig(PreTrainedConfig):
    """Fields of a reversible model. Families inherit from this class and from their stock configuration.

    Args:
        beta (`float` or `list[float]`, defaults to 1.0):
            Coupling of the layers, one number or one per layer: 1 is RevNet coupling, for training from scratch;
            0.5, 0.25, … stay close to the stock checkpoint that was converted (0.5 is the default when one is loaded);
            0 is a conventional layer, which stores its activations.
        backward_engine (`str`, defaults to `"pareprop"`):
            `"autograd"`, `"reprop"` or `"pareprop"`; the gradients are the same.
        grid_bits (`int` or `None`, defaults to 12):
            Bits after the binary point of the states, so that they are rebuilt bit for bit. `None` turns that off:
            rebuilt states drift, gradients become approximate.
        anchor_every (`int` or `None`, defaults to `None`):
            Store a pair of states after every so many layers; `None` stores none, unless the absence of a grid asks for it.
        retained_layers (`int`, defaults to 0):
            So many of the last layers keep their graphs from the forward pass and are not rebuilt: faster, more memory.
        memory_budget (`"gradients"`, `"auto"`, `int`, `float` or `None`, defaults to `None`):
            Keep what fits, which then need not be rebuilt: the results of the products that end an MLP, then the graphs of
            layers. Into the bytes that the gradients of the layers' parameters take later in the step, so that the peak
            stays where it is (`"gradients"`: nothing but with the first of accumulated gradients); into so many bytes;
            into a fraction of the free memory, or nearly all of it (`"auto"`). Measured in the first steps, and for
            every shape of batch.
        stock_model_type (`str` or `None`, defaults to `None`):
            Model type of the stock checkpoint that the weights came from, which exporting returns to; `None` is the
            family's own.
    """

    beta: float | int | list[float] = 1.0
    backward_engine: str = "pareprop"
    grid_bits: int | None = 12
    anchor_every: int | None = None
    retained_layers: int = 0
    memory_budget: str | int | float | None = None
    stock_model_type: str | None = None

    stock_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types of the stock checkpoints that load straight into this family."""

    converted_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types whose checkpoints have to be converted first: their tensors have other names or shapes."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.layer_plans()
        check_engine(self.backward_engine)
        check_retention(self.retained_layers, self.memory_budget)
        stock = (*self.stock_model_types, *self.converted_model_types)
        if self.stock_model_type is not None and self.stock_model_type not in stock:
            raise ValueError(f"stock_model_type={self.stock_model_type!r} is not None or one of {', '.join(stock)}.")

    def layer_plans(self) -> tuple[LayerPlan, ...]:
        """How each layer is coupled.

        Raises:
            ValueError: `beta`, `grid_bits` or `anchor_every` is out of range, or states without a grid would drift
                beyond use.
        """
        return plan_layers(self.beta, self.num_hidden_layers, self.grid_bits, self.anchor_every)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; the configuration of a stock checkpoint becomes this family's, at beta = 1/2.

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
                f"{pretrained_model_name_or_path} is a stock checkpoint and becomes reversible at beta=0.5, which changes "
                "what it computes. For fine-tuning beta=0.03125 keeps more of what it knows: give beta to choose."
            )
        # Through the stock class, because a configuration file may leave out fields that are at its defaults.
        return cls.from_stock_dict({**CONFIG_MAPPING[found].from_dict(config_dict).to_dict(), **config_dict}), kwargs

    @classmethod
    def from_stock_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The dictionary of a stock configuration as one of this family, `beta` defaulting to 1/2."""
        found = config_dict["model_type"]
        origin = {} if found == cls.stock_model_types[0] else {"stock_model_type": found}
        return {"beta": 0.5, **origin, **config_dict, "model_type": cls.model_type}
