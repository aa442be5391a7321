"""How the layers of a model are coupled, and which options exist. Configurations check their fields with this module."""

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

ENGINE_NAMES = ("autograd", "reprop", "pareprop")

STEPS = ("sublayer", "layer")
"""What one step of the recurrence may be: a sub-block, or a whole layer."""

CONVERTED_BETA = 1 / 32
"""The default for weights that come from a stock model: the largest beta that kept fine-tuning within 0.3 points of it."""

CONVERTED_BETA_OF_LAYERS = 1 / 128
"""The same default if a step is a whole layer. At an equal beta such a model differs more from the stock model."""

DEFAULT_GRID_BITS = 16
MOST_GRID_BITS = 22

SUB_BLOCKS = 2
"""The number of sub-blocks of a layer: attention and MLP."""

LIMIT_BITS = 30
"""A state and a ``Phi`` have to stay below ``2**30`` units of the grid, so that the sum of two of them fits into int32."""

UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is coupled.

    Attributes:
        beta: 0 for a conventional layer, which stores its activations; 1 or ``2**-m`` for a reversible one.
        grid_bits: states are integers in units of ``2**-grid_bits``; ``None`` leaves them floats, which cannot be rebuilt.
        stage: the stage of the layer, counted from 0. Within a stage all hidden states have the same shape.
        transition: whether the layer changes the shape of the hidden state. Such a layer is not reversible. If its ``beta``
            is above 0, its activations are not stored but computed again in the backward pass.
        whole: whether the whole layer is one step. Otherwise each of its sub-blocks is a step.
    """

    beta: float
    grid_bits: int | None = DEFAULT_GRID_BITS
    stage: int = 0
    transition: bool = False
    whole: bool = False

    @property
    def reversible(self) -> bool:
        return self.beta > 0 and not self.transition

    @property
    def stores_activations(self) -> bool:
        return self.beta == 0

    @property
    def side_bits(self) -> int:
        """``m`` of ``beta = 2**-m``: how many bits each update shifts out of every element of a state."""
        return 0 if self.grid_bits is None or not self.reversible else -int(math.log2(self.beta))

    @property
    def side_bits_of_layer(self) -> int:
        """How many bits all updates of the layer (one per step) together shift out of every element of a state."""
        return self.side_bits if self.whole else SUB_BLOCKS * self.side_bits

    @property
    def limit(self) -> float:
        """States have to stay below this magnitude; infinite if states are floats."""
        return math.inf if self.grid_bits is None else 2.0 ** (LIMIT_BITS - self.grid_bits)


def plan_layers(
    beta: float | Sequence[float],
    depths: int | Sequence[int],
    grid_bits: int | None = DEFAULT_GRID_BITS,
    transitions: Container[int] = (),
    steps: str = "sublayer",
) -> tuple[LayerPlan, ...]:
    """The plan of every layer, in order.

    Args:
        beta: one number for all layers, or a list with one per layer, counted across stages.
        depths: the number of layers, or the number in each stage.
        grid_bits: bits after the binary point of the states, 1 to 22; ``None`` leaves states floats.
        transitions: the layers that change the shape of the hidden state, counted from 0 across stages.
        steps: ``"sublayer"`` or ``"layer"``: what one step is.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [plan.reversible for plan in plan_layers([0.5, 0, 1], 3)]
        [True, False, True]
    """
    if grid_bits is not None and not (_is_int(grid_bits) and 1 <= grid_bits <= MOST_GRID_BITS):
        raise ValueError(
            f"grid_bits={grid_bits!r} is not a whole number from 1 to {MOST_GRID_BITS}: keep the default of "
            f"{DEFAULT_GRID_BITS}, which allows states below {LayerPlan(1).limit:g}; fewer bits allow larger states."
        )
    check_steps(steps)
    depths = [depths] if isinstance(depths, int) else depths
    stages = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    betas = betas_per_layer(beta, len(stages))
    return tuple(
        LayerPlan(beta, grid_bits, stage, i in transitions, steps == "layer")
        for i, (beta, stage) in enumerate(zip(betas, stages, strict=True))
    )


def betas_per_layer(beta: float | Sequence[float], num_layers: int) -> tuple[float, ...]:
    """``beta`` as one float per layer.

    Raises:
        ValueError: a value is not 0, 1 or ``2**-m``, or a list does not have ``num_layers`` entries.
    """
    if isinstance(beta, (list, tuple)):
        if len(beta) != num_layers:
            raise ValueError(
                f"beta has {len(beta)} entries but the model has {num_layers} layers: give one number for all layers "
                "or a list with one per layer."
            )
        betas = beta
    else:
        betas = [beta] * num_layers
    for value in betas:
        # beta must be a shift of bits, so a power of two: frexp gives a mantissa of exactly 0.5 for those.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value == 0 or (2**-31 <= value <= 1 and math.frexp(value)[0] == 0.5)):
            raise ValueError(
                f"beta={value!r} is not 0, 1 or a negative power of two down to 2**-31: use 1 (RevNet coupling), 0.5, "
                "0.25, … (close to the stock model) or 0 (a conventional layer that stores its activations)."
            )
    return tuple(float(value) for value in betas)


def check_steps(steps: str) -> None:
    """
    Raises:
        ValueError: ``steps`` is neither ``"sublayer"`` nor ``"layer"``.
    """
    if steps not in STEPS:
        raise ValueError(
            f"steps={steps!r} is not 'sublayer' (each sub-block of a layer is a step) or 'layer' (the whole layer is one)."
        )


def converted_beta(steps: str) -> float:
    """The default ``beta`` of weights that come from a stock model.

    Raises:
        ValueError: ``steps`` is neither ``"sublayer"`` nor ``"layer"``.

    Example:
        >>> converted_beta("layer")
        0.0078125
    """
    check_steps(steps)
    return CONVERTED_BETA_OF_LAYERS if steps == "layer" else CONVERTED_BETA


def check_engine(name: str) -> None:
    """
    Raises:
        ValueError: there is no engine called ``name``.
    """
    if name not in ENGINE_NAMES:
        raise ValueError(f"backward_engine={name!r} is unknown: use one of {', '.join(map(repr, ENGINE_NAMES))}.")


def check_compile_steps(on: bool) -> None:
    """
    Raises:
        ValueError: ``on`` is neither True nor False.
    """
    if not isinstance(on, bool):
        raise ValueError(f"compile_steps={on!r} is not True or False.")


@dataclass(frozen=True)
class Budget:
    """What may be kept from the forward pass instead of being rebuilt.

    At most one attribute is set. If none is set, nothing is kept.

    Attributes:
        gradients: whether to keep as many bytes as the gradients of the layers' parameters will take.
        bytes: how many bytes to keep.
        share: the fraction of the free memory to use, 0 to 1; with "auto" it depends on the device.
        layers: how many of the last layers keep their graphs.
    """

    gradients: bool = False
    bytes: int | None = None
    share: float | str | None = None
    layers: int | None = None


def parse_budget(text: str | None) -> Budget:
    """Read the option ``memory_budget``.

    Args:
        text: ``None``, ``"gradients"``, ``"auto"``, an amount such as ``"4GB"``, a part of the free memory such as
            ``"80%"``, or ``"4 layers"``.

    Raises:
        ValueError: ``text`` is none of these.

    Example:
        >>> parse_budget("4 layers").layers, parse_budget("1.5GB").bytes
        (4, 1610612736)
    """
    if text is None:
        return Budget()
    if text == "gradients":
        return Budget(gradients=True)
    if text == "auto":
        return Budget(share="auto")
    if isinstance(text, str):
        if match := re.fullmatch(r"\s*(\d+)\s*layers?\s*", text):
            return Budget(layers=int(match[1]))
        if (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)) and float(match[1]) <= 100:
            return Budget(share=float(match[1]) / 100)
        if (size := parse_size(text)) is not None:
            return Budget(bytes=size)
    raise ValueError(
        f"memory_budget={text!r} is not None, 'gradients', 'auto', an amount such as '4GB', a part of the free memory "
        "such as '80%', or a number of layers such as '4 layers'."
    )


def parse_size(text: str) -> int | None:
    """The bytes in a text such as ``"16GB"`` or ``"800 MB"``; a GB is ``2**30``. ``None`` if the text is no amount."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    return int(float(match[1]) * UNITS[f"{match[2].upper()}B"]) if match else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
