"""Make the layers of a stock model reversible, unchanged: a step is a whole stock layer, and the stock loop runs the layers.

Classes are derived from the stock classes and put in their place, as FSDP2 does: ``layer.__class__ = RevLlamaDecoderLayer``.
So names of parameters, hooks, devices and dtypes do not change, and nothing is copied. :func:`couple` does this to a model,
:func:`uncouple` undoes it, and :func:`make_family` makes the classes.
"""

# mypy: disable-error-code="misc,union-attr"
# The base classes are only known at run time.
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, ClassVar, get_origin

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_reversible import ReversibleConfig
from .findings import Findings
from .layer_call import StepFunction
from .modeling_reversible import ReversiblePreTrainedModel, requested
from .plan import LayerPlan, converted_beta, plan_layers
from .tape import Tape

logger = logging.get_logger("transformers.hf_pareprop")

CACHES = ("cache", "past_key_values")
"""The name of the cache in transformers since 5.24, and its earlier name."""

GRID_BITS = 12
"""The default of `grid_bits` here: states of decoders reach tens of thousands, mostly at the first token."""

RUNNING: ContextVar["Running | None"] = ContextVar("running", default=None)
"""The current forward pass in this thread. Stock loops have no argument that could bring a tape to every layer."""


class StockLayersConfig(ReversibleConfig):
    """Fields of a reversible model with the layers of a stock model: those of [`ReversibleConfig`], with two other defaults.

    Args:
        steps (`str`, defaults to `"layer"`):
            `"layer"`: a step is a whole stock layer. `"sublayer"`: a step is a sub-block; only some families allow this.
        grid_bits (`int` or `None`, defaults to 12):
            States have to stay below `2**(30 - grid_bits)`, 262144 by default.

    Raises:
        ValueError: a field is out of range, or the family does not allow `"sublayer"`.

    Example:
        >>> model = RevLlamaForCausalLM(RevLlamaConfig(num_hidden_layers=4, beta=1 / 128))
    """

    steps: str = "layer"
    grid_bits: int | None = GRID_BITS

    has_sub_blocks: ClassVar[bool] = False

    def check_reversible(self) -> None:
        super().check_reversible()
        if self.steps == "sublayer" and not self.has_sub_blocks:
            raise ValueError(
                f"steps='sublayer': {type(self).__name__} does not say what the sub-blocks of a layer are. Use steps='layer', the "
                "default here."
            )


class Running:
    """The current forward pass of a model.

    Args:
        tape: the tape of this forward pass.
        model: the model whose loop calls the layers.
    """

    def __init__(self, tape: Tape, model: "StockLayersModel"):
        self.tape, self.model = tape, model

    def layer(
        self, layer: "ReversibleLayer", stock: Callable[..., Any], hidden: Tensor, args: Any, kwargs: Any
    ) -> Any:
        """Run the next layer of the stock loop. Returns what the layer returns in the stock model: a tensor or a tuple.

        Args:
            layer: the layer.
            stock: the layer's stock forward.
            hidden: the hidden state that the loop passes to the layer.
            args: the other positional arguments that the loop passes.
            kwargs: the keyword arguments that the loop passes.
        """
        tape = self.tape
        if tape.layers_run == 0:
            self.model.refuse_offloaded(hidden)
            hidden = tape.start(hidden)
        tensors: list[Tensor] = []
        structure = take_apart((args, kwargs), tensors)
        dtype = tape.dtype
        # What the layer returns besides the hidden state. The list keeps its length, so that code compiled for the forward
        # pass serves the rebuild, too.
        rest: list[tuple[None, ...] | None] = [None]

        def whole(state: Tensor, *tensors: Tensor) -> Tensor:
            args, kwargs = put_together(structure, tensors)
            output = stock(state.to(dtype), *args, **kwargs)
            hidden, others = _hidden_state_in(output, layer)
            rest[0] = others
            return hidden

        def sub_blocks() -> Sequence[StepFunction]:
            def with_arguments(step: Callable[..., Any], state: Tensor, *tensors: Tensor) -> Any:
                args, kwargs = put_together(structure, tensors)
                return step(layer, state, dtype, *args, **kwargs)

            return [partial(with_arguments, step) for step in layer.sub_blocks]

        if tape.layers_run < len(tape.plans) and not tape.plans[tape.layers_run].whole:
            steps = sub_blocks()
        else:
            steps = [whole]
        hidden = tape.layer(layer, steps, hidden, tuple(tensors))
        if tape.layers_run == len(tape.plans):
            hidden = tape.finish(hidden)
        return hidden if rest[0] is None else (hidden, *rest[0])


class ReversibleLayer(nn.Module):
    """The first base class of a reversible layer; the second is the stock layer class.

    Attributes:
        sub_blocks: functions `(layer, state, dtype, *args, **kwargs) -> (residual, branch)`, one for each sub-block. Empty
            if the family cannot couple sub-blocks.
    """

    sub_blocks: ClassVar[tuple[Callable[..., tuple[Tensor, Tensor]], ...]] = ()

    __call__ = nn.Module.__call__  # earlier versions of transformers checkpoint layers in their own __call__

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # transformers has wrapped it in its checkpointing of layers
            del cls.forward

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the stock layer takes and returns.

        Raises:
            RuntimeError: the layer is called outside of a forward pass of its model.
        """
        running = RUNNING.get()
        if running is None:
            raise RuntimeError(
                f"{type(self).__name__} was called outside of the forward pass of its model, where it lacks the state before its "
                "input. That happens if somebody else's checkpointing runs the layer again. Call the model, without that "
                "checkpointing; or use hf_pareprop.to_stock, which gives a model with stock layers."
            )
        return running.layer(self, super().forward, hidden_states, args, kwargs)


def attention_sub_block(layer: Any, state: Tensor, dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The attention sub-block of Llama, and of all models that use the same names for its modules."""
    return state, layer.self_attn(hidden_states=layer.input_layernorm(state.to(dtype)), **kwargs)[0]


def mlp_sub_block(layer: Any, state: Tensor, dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The MLP sub-block of Llama, and of all models that use the same names for its modules."""
    return state, layer.mlp(layer.post_attention_layernorm(state.to(dtype)))


class StockLayersModel(ReversiblePreTrainedModel):
    """Base class of all models that run stock layers reversibly, with and without heads.

    Attributes:
        stock_class: the class of the stock model.
        base_class: the class of the model whose forward pass runs the layers. In most families this is the base model.
        layer_classes: maps stock layer classes to reversible ones.
    """

    stock_class: ClassVar[type[PreTrainedModel]]
    base_class: ClassVar[Any]
    layer_classes: ClassVar[Mapping[type, type[ReversibleLayer]]]
    chain: str
    """Only in the model that runs the layers: the name of the list that holds them."""

    _can_compile_fullgraph = False

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        self.put_layers()

    def put_layers(self) -> None:
        """Replace the classes of the layers, and of the model that runs them, by those of the family.

        Raises:
            ValueError: the model does not have exactly one chain of layers.
        """
        runner = self.layer_runner
        if runner is not self:
            runner.__class__ = self.base_class
            runner.config, runner._findings = self.config, Findings()
        for module in runner.modules():
            module.__class__ = self.layer_classes.get(type(module), type(module))
        runner.chain = _chain_in(runner)
        for model in {self, runner}:
            # The constructor of a class tells transformers which outputs can be recorded. This model was made as another class.
            constructed: Any = object.__new__(type(model))
            PreTrainedModel.__init__(constructed, self.config)
            names = {stock.__name__ for stock in self.layer_classes}
            own = set(model._no_split_modules or ())
            model._no_split_modules = own | {f"Rev{name}" for name in own & names}

    @property
    def layer_runner(self) -> Any:
        kinds = self.base_class, self.base_class.stock_class
        return next(module for module in self.modules() if isinstance(module, kinds))

    @property
    def encoder_layers(self) -> list[nn.Module]:
        runner = self.layer_runner
        return list(runner.get_submodule(runner.chain))

    def _plans(self, beta: float | Sequence[float]) -> tuple[LayerPlan, ...]:
        return plan_layers(beta, len(self.encoder_layers), self.config.grid_bits, steps=self.config.steps)

    def needs_activations(self, options: Mapping[str, Any]) -> str | None:
        if cache := next((name for name in CACHES if options.get(name) is not None), None):
            return f"{cache}, which a rebuilt layer would write to a second time"
        if options.get("use_cache"):
            return "use_cache=True"
        recorded = (f"output_{name}" for name in (self._can_record_outputs or {}) if name != "hidden_states")
        return next((name for name in recorded if requested(name, self.config, options)), None)

    def run(self, forward: Callable[..., Any], compiling: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the stock forward pass that runs the layers, with a tape that they find.

        Args:
            compiling: whether `torch.compile` compiles what calls it; then the layers are compiled, too.

        Raises:
            RuntimeError: the stock loop skipped layers.
        """
        if torch.is_grad_enabled() and "use_cache" in inspect.signature(forward).parameters:
            # A rebuilt layer would write to the cache a second time. Without gradients nothing is rebuilt.
            asked = kwargs.get("use_cache") and not self.training
            kwargs = {**kwargs, "use_cache": bool(asked)}

        def within(tape: Tape) -> Any:
            tape.compiles = tape.compiles or compiling
            token = RUNNING.set(Running(tape, self))
            try:
                output = forward(*args, **kwargs)
            finally:
                RUNNING.reset(token)
            if tape.layers_run != len(tape.plans):
                raise RuntimeError(
                    f"{type(self).__name__} ran {tape.layers_run} of {len(tape.plans)} layers: a layer that is left out breaks the "
                    "chain of states. Switch off what leaves it out (LayerDrop, an early exit), or use the stock model."
                )
            return output

        return self.with_tape(within, kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers. A checkpoint of the stock model becomes reversible, by default at `beta=1/128`.

        Args:
            kwargs: those of transformers, and fields of the configuration such as `beta` and `memory_budget`.

        Raises:
            ValueError: a field of the configuration is out of range.

        Example:
            >>> model = RevLlamaForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", memory_budget="gradients")
        """
        found = config
        if found is None:
            asked = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            found = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **asked)[0].get("model_type")
        if found not in cls.config_class.stock_model_types:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        fields = {name: kwargs.pop(name) for name in field_names() if name in kwargs}
        loaded = cls.stock_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        if "beta" not in fields:
            steps = fields.get("steps", cls.config_class.steps)
            logger.warning_once(
                f"{pretrained_model_name_or_path} is a stock checkpoint and becomes reversible at beta={converted_beta(steps):g}, "
                "which changes its outputs a little: give beta to choose."
            )
        couple(model, cls, fields)
        return (model, *info) if info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers. The code of the model is saved with it, and parameters keep the names that they have in memory.

        Raises:
            ValueError: the class was made for this model alone, and does not belong to a family of this package.
        """
        if not self.auto_map:
            raise ValueError(
                f"{type(self).__name__} was made for this model alone and cannot be loaded again: save "
                "hf_pareprop.to_stock(model), and make that reversible where it is loaded."
            )
        super().save_pretrained(save_directory, is_main_process, **{"save_original_format": False, **kwargs})


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""The arguments of `from_pretrained` that say where a checkpoint is."""


class AsStock:
    """A class between a reversible class and its stock class. It shows the stock constructor a stock configuration.

    Stock heads choose their base model by the class of the configuration. Without this they would look for a reversible one.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        own = type(config)
        config.__class__ = self.stock_class.config_class  # type: ignore[attr-defined]
        try:
            super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = own


def field_names() -> tuple[str, ...]:
    """The names of the fields that a reversible configuration adds to a stock one."""
    return tuple(name for name, kind in ReversibleConfig.__annotations__.items() if get_origin(kind) is not ClassVar)


def couple(model: PreTrainedModel, cls: type[StockLayersModel], fields: Mapping[str, Any]) -> None:
    """Make a stock model an instance of its reversible class, in place.

    Args:
        model: the stock model.
        cls: the reversible class.
        fields: fields of the configuration. The others get their defaults, and `beta` the default of converted weights.

    Raises:
        ValueError: a field is out of range.
    """
    config: Any = model.config
    config_class: Any = cls.config_class
    defaults = {name: getattr(config_class, name) for name in field_names()}
    given = {**defaults, "beta": converted_beta(fields.get("steps", defaults["steps"])), **fields}
    config.__class__, stock = config_class, type(config)
    try:
        for name, value in given.items():
            setattr(config, name, value)
        config.check_reversible()
    except ValueError:
        _make_stock(config, stock)
        raise
    twin: Any = model
    twin.__class__ = cls
    twin._findings = Findings()
    twin.put_layers()


def uncouple(model: StockLayersModel) -> None:
    """Make a reversible model an instance of its stock class again, in place: the inverse of :func:`couple`."""
    runner = model.layer_runner
    stock_config: Any = model.stock_class.config_class
    layers = {found: stock for stock, found in model.layer_classes.items()}
    for module in runner.modules():
        module.__class__ = layers.get(type(module), type(module))
    _make_stock(model.config, stock_config)
    for each in {model, runner}:
        for name in ("_findings", "retention", "chain"):
            vars(each).pop(name, None)
        each._no_split_modules = {
            n for n in each._no_split_modules if n.removeprefix("Rev") not in {s.__name__ for s in layers.values()}
        } | {s.__name__ for s in layers.values()}
        each.__class__ = each.stock_class


def _make_stock(config: Any, stock: type[PreTrainedConfig]) -> None:
    for name in (*field_names(), "auto_map"):
        vars(config).pop(name, None)
    config.__class__ = stock


def make_family(
    stock_base: type[PreTrainedModel],
    stock_heads: Iterable[type[PreTrainedModel]],
    stock_layers: Iterable[type[nn.Module]],
    *,
    module: str,
    auto_map: Mapping[str, str] = {},
    sub_blocks: tuple[Callable[..., tuple[Tensor, Tensor]], ...] = (),
) -> dict[str, type]:
    """Make the classes of a family: a configuration, layers, a base model and heads. Returns them by their names.

    Args:
        stock_base: the stock model whose forward pass runs the layers.
        stock_heads: stock models with heads.
        stock_layers: the classes of the layers.
        module: the name of the module in which the classes can be found.
        auto_map: maps Auto classes to classes of the family; empty for a family that is not saved.
        sub_blocks: the steps with `steps="sublayer"`.
    """
    stock_config: Any = stock_base.config_class
    common = {"__module__": module}
    config_class: Any = type(
        f"Rev{stock_config.__name__}",
        (StockLayersConfig, stock_config),
        {
            **common,
            "__doc__": f"[`{stock_config.__name__}`] with the fields of [`StockLayersConfig`].",
            "model_type": f"rev_{stock_config.model_type}",
            "stock_model_types": (stock_config.model_type,),
            "has_sub_blocks": bool(sub_blocks),
        },
    )
    layer_classes = {
        stock: type(f"Rev{stock.__name__}", (ReversibleLayer, stock), {**common, "sub_blocks": sub_blocks})
        for stock in stock_layers
    }
    found: dict[str, Any] = {}
    for stock in (stock_base, *stock_heads):
        kept = {
            name: getattr(stock, name) for name in vars(ReversiblePreTrainedModel) if name.startswith("_supports_")
        }
        namespace = {
            **common,
            **kept,
            "__doc__": f"[`{stock.__name__}`] with reversible layers.",
            "supports_gradient_checkpointing": stock.supports_gradient_checkpointing,
            "config_class": config_class,
            "stock_class": stock,
            "layer_classes": layer_classes,
            "auto_map": dict(auto_map),
        }
        if stock is stock_base:
            namespace["forward"] = _with_tape(stock.forward)
        found[f"Rev{stock.__name__}"] = type(f"Rev{stock.__name__}", (StockLayersModel, AsStock, stock), namespace)
    base = found[f"Rev{stock_base.__name__}"]
    for cls in found.values():
        cls.base_class = base
    return {config_class.__name__: config_class, **{cls.__name__: cls for cls in layer_classes.values()}, **found}


def _with_tape(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    # The variable that layers look into is no matter for compiled code; what the stock loop does besides is.
    @partial(torch.compiler.disable, recursive=False)
    def run(self: StockLayersModel, compiling: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.run(partial(stock_forward, self), compiling, args, kwargs)

    @wraps(stock_forward)
    def forward(self: StockLayersModel, *args: Any, **kwargs: Any) -> Any:
        return run(self, torch.compiler.is_compiling(), args, kwargs)

    return forward


def chains_in(model: nn.Module, kind: type) -> list[str]:
    """The names of the lists in a model that hold layers of one kind, and nothing else."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(layer, kind) for layer in module)
    ]


def _chain_in(runner: nn.Module) -> str:
    """The name of the list of layers in the model that runs them.

    Raises:
        ValueError: there is no such list, or there are several.
    """
    found = chains_in(runner, ReversibleLayer)
    if len(found) != 1:
        raise ValueError(
            f"{type(runner).__name__} has {len(found)} lists of layers ({', '.join(found) or 'none'}): only a model with one chain "
            "of layers can be made reversible."
        )
    return found[0]


def _hidden_state_in(output: Any, layer: nn.Module) -> tuple[Tensor, tuple[None, ...] | None]:
    """The hidden state in the output of a stock layer. If the output is a tuple, also its other items, which must be None.

    Raises:
        RuntimeError: the layer returned something else than a hidden state.
    """
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and all(x is None for x in output[1:]):
        return output[0], output[1:]
    raise RuntimeError(
        f"{type(layer).__name__} returns more than the next hidden state: only layers that map one hidden state to the next "
        "can be reversible. Use the stock model."
    )


class _Place:
    """Marks the place of a tensor that was taken out."""

    def __init__(self, index: int):
        self.index = index


def take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """Replace every tensor in the tuples, lists and dictionaries of ``value`` by a mark, and add it to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    return _rebuilt(value, lambda inner: take_apart(inner, tensors))


def put_together(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of :func:`take_apart`, with ``tensors`` at the marks."""
    if isinstance(structure, _Place):
        return tensors[structure.index]
    return _rebuilt(structure, lambda inner: put_together(inner, tensors))


def _rebuilt(value: Any, each: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(each(inner) for inner in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each(inner) for inner in value))
    if type(value) is dict:
        return {name: each(inner) for name, inner in value.items()}
    return value
