"""A Trainer whose training steps are CUDA graphs."""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..modeling_reversible import logger
from ..torch_private import has_hooks_after_accumulation
from .contenders import checkpointing_name
from .graphs import WARM_UPS, Batch, Capture
from .model_settings import SIMPLE, settings_of

COUNT = "num_items_in_batch"
"""The argument of Trainer by which it tells a loss how many tokens the accumulated batches have."""


class GraphedTrainer(Trainer):
    """A `Trainer` that launches the forward and the backward pass of a training step at once, as one CUDA graph.

    An ordinary step waits for Python, which launches thousands of kernels. A graph does not wait. The first three or four
    steps are ordinary. Then the step is captured, and from then on it is replayed. Losses, gradients and random numbers are
    those of ordinary steps. Clipping, the optimizer, evaluation and checkpoints are those of `Trainer`. It takes stock models
    too.

    Most batches need one shape: pad texts to one length, or pack them. Steps with batches of another shape, such as the last
    incomplete one, are ordinary steps. A line at the end of training says how many there were, at level INFO, or WARNING if
    they were many. In a graph, attention always gets the mask of a batch that brings one. An ordinary step leaves out a mask
    that hides nothing, and so may round otherwise.

    A graph repeats what Python decided when it was captured. If the configuration changes, or an attribute, a mode, a hook, a
    parameter or a buffer of a module is replaced or frozen, the step is captured anew. Nothing else is noticed. So what your
    own `compute_loss`, `compute_loss_func` or hooks do must not depend on Python values that change in training, such as the
    number of the step. Random draws on the host and reading tensors there are errors.

    The memory of the graph stays reserved while it trains. Evaluation and ordinary steps need memory beside it.

    Before each step Python looks for changes, which takes milliseconds. With `logging_nan_inf_filter=False` in
    `TrainingArguments` the GPU works meanwhile; otherwise `Trainer` waits for every loss.

    It takes the arguments of `Trainer`.

    Raises:
        ValueError: training is not on one CUDA device, or asks for something that a graph cannot repeat: gradient scaling
            (`fp16`), `gradient_checkpointing`, `torch_compile`, `torch_empty_cache_steps`, or an optimizer that steps within
            the backward pass.

    Example:
        >>> args = TrainingArguments("out", bf16=True, dataloader_drop_last=True, logging_nan_inf_filter=False)
        >>> model = RevViTForImageClassification.from_pretrained(path, compile_steps=True)
        >>> GraphedTrainer(model, args, train_dataset=data).train()
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_one_device(self)
        check_repeatable(self)
        self._steps: GraphedSteps | None = None
        self.add_callback(_AtTheBeginning(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. The graphs are freed at the end, also after an error. See `Trainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.free_graphs()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run a training step on a batch, as a graph if possible. See `Trainer.training_step`."""
        if self._steps is None or self._steps.model is not model:
            self.free_graphs()
            self._steps = GraphedSteps(model)
        optimizer: Any = self.optimizer
        if not model.training:
            model.train()
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers have modes, too
            optimizer.train()
        values: Any = self._prepare_input({**inputs, COUNT: num_items_in_batch})
        batch = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in values.items() if name not in batch}
        work = partial(self._ordinary_step, model, constants)
        return self._steps.take(work, batch, {**constants, "accumulated": self.current_gradient_accumulation_steps})

    def _ordinary_step(self, model: nn.Module, constants: Mapping[str, Any], batch: Batch) -> Tensor:
        inputs = {**constants, **batch}
        count = inputs.pop(COUNT)
        return super().training_step(model, inputs, count)

    def free_graphs(self) -> None:
        """Free the graphs, if there are any, and log how many steps they ran."""
        if self._steps is not None:
            self._steps.report()
        self._steps = None


class _AtTheBeginning(TrainerCallback):
    """Frees graphs when training begins again within `train`, with a smaller batch, after memory ran out."""

    def __init__(self, trainer: GraphedTrainer):
        self._trainer = weakref.ref(trainer)  # which owns this callback

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if (trainer := self._trainer()) is not None:
            trainer.free_graphs()


class GraphedSteps:
    """Runs the training steps of a model, as CUDA graphs where that does the same.

    There are at most two graphs, for the first shape that half of the batches have had. One creates the gradients. The other
    one adds to these, which gradient accumulation needs, and uses the same memory in turn with the first one.

    Args:
        model: the model, with all parameters on one CUDA device.

    Raises:
        ValueError: a parameter has a hook that runs after its gradient was accumulated, such as an optimizer's step.
    """

    _captured_settings: Any
    _captures: dict[tuple[Hashable, bool], Capture]
    _parameters: list[nn.Parameter]
    _seen: Counter[Hashable]
    _shape: Hashable | None
    _gradients: list[Tensor | None]

    def __init__(self, model: nn.Module):
        self.model = model
        if any(map(has_hooks_after_accumulation, model.parameters())):
            raise ValueError(
                "a parameter has a hook that runs after its gradient was accumulated, such as an optimizer's step, whose "
                "numbers a CUDA graph would repeat: remove the hook, or take transformers.Trainer."
            )
        self._ran: Counter[str] = Counter()
        self._begin_anew(None)

    def take(self, work: Callable[[Batch], Tensor], batch: Batch, constants: Mapping[str, Any]) -> Tensor:
        """Run one training step.

        Args:
            work: the ordinary step. It leaves gradients in ``.grad`` and returns a loss without a graph.
            batch: the tensors that ``work`` takes.
            constants: what else it depends on.

        Returns:
            The loss.
        """
        self._ran["all"] += 1
        if (settings := settings_of(self.model)) != self._captured_settings:
            if self._ran["all"] > 2:  # the first step may note something in the configuration, such as `problem_type`
                self._ran["renewed"] += 1
            self._begin_anew(settings)
        if not all(type(value) in SIMPLE for value in constants.values()):
            self._ran["complex"] += 1
            return work(batch)
        shape = (*constants.items(), *((name, tensor.shape, tensor.dtype) for name, tensor in batch.items()))
        self._seen[shape] += 1
        if self._shape not in (None, shape):
            self._ran["other shape"] += 1
            return work(batch)
        gradients = [parameter.grad for parameter in self._parameters]
        adds = any(gradient is not None for gradient in gradients)
        if adds and not self._are_of_the_graph(gradients):
            return work(batch)
        key = (shape, adds)
        if key not in self._captures:
            self._captures[key] = Capture(work, batch, self._parameters[0].device)
        capture = self._captures[key]
        if capture.rehearsals < WARM_UPS or 2 * self._seen[shape] < self._seen.total():
            return capture.rehearse(batch)
        if not capture.recorded:
            capture.record(batch, self._captures[shape, False].pool if adds else None)
            self._shape = shape
            self._captures = {other: kept for other, kept in self._captures.items() if other[0] == shape}
            if not adds:
                self._gradients = [parameter.grad for parameter in self._parameters]
        elif not adds:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        self._ran["graphed"] += 1
        return capture.replay(batch).clone()  # because the next replay overwrites it

    def _are_of_the_graph(self, gradients: list[Tensor | None]) -> bool:
        """Whether these are the tensors to which the graphs write."""
        return bool(self._gradients) and all(a is b for a, b in zip(gradients, self._gradients, strict=True))

    def _begin_anew(self, settings: Any) -> None:
        self._captured_settings = settings
        self._parameters = list(self.model.parameters())
        self._captures = {}
        self._seen = Counter()
        self._shape = None
        self._gradients = []

    def report(self) -> None:
        """Log how many steps were graphs, and why the others were not; a warning if more than a tenth could have been."""
        ran = self._ran
        said = f"{ran['graphed']} of {ran['all']} training steps ran as a CUDA graph."
        if ran["other shape"]:
            said += f" {ran['other shape']} had another shape: pad to one length, and set dataloader_drop_last=True."
        if ran["complex"]:
            said += f" {ran['complex']} had inputs other than tensors, numbers and texts."
        if ran["renewed"]:
            said += f" The model was changed before {ran['renewed']} steps, and each time a new graph was needed."
        known = sum(ran[reason] for reason in ("other shape", "complex", "renewed"))
        if not ran["graphed"] and not known:
            said += " The shapes of batches differed too much: pad to one length."
        ordinary = ran["all"] - ran["graphed"]
        (logger.warning if ordinary > max(4 * WARM_UPS, ran["all"] / 10) else logger.info)(said)


def check_one_device(trainer: Trainer) -> None:
    """Raise ValueError if training is not on one CUDA device."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.device.type != "cuda":
        raise ValueError(
            f"training is on {args.device}, and CUDA graphs need a CUDA device: take transformers.Trainer."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer would use {args.n_gpu} GPUs, and GraphedTrainer trains on one: choose it with CUDA_VISIBLE_DEVICES=0, or "
            "take transformers.Trainer."
        )
    if accelerator.num_processes > 1 or accelerator.distributed_type != DistributedType.NO:
        raise ValueError(
            f"training is distributed ({accelerator.distributed_type.value}, number of processes: "
            f"{accelerator.num_processes}), and GraphedTrainer trains in one process: take transformers.Trainer."
        )


def check_repeatable(trainer: Trainer) -> None:
    """Raise ValueError if the training step does something that a CUDA graph cannot repeat."""
    args: Any = trainer.args
    model: Any = trainer.model
    optimizer = getattr(args.optim, "value", args.optim)
    places = {parameter.device for parameter in model.parameters()}
    problems = {
        "fp16=True scales gradients on the host: take bf16=True": args.fp16,
        "gradient_checkpointing restores random numbers on the host: switch it off": args.gradient_checkpointing
        or getattr(model, f"is_{checkpointing_name(model)}_checkpointing", False),
        "torch_compile=True: compile the steps alone, with model.set_compile_steps(True)": args.torch_compile,
        "torch_empty_cache_steps frees memory within steps: leave it out": args.torch_empty_cache_steps is not None,
        f"optim={optimizer!r} steps within the backward pass: take another optimizer": any(
            part in optimizer for part in ("lomo", "layerwise")
        ),
        "parameters are on several devices: load the model without device_map": len(places) > 1,
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise ValueError(f"GraphedTrainer cannot capture this: {'; '.join(found)}. Or take transformers.Trainer.")
