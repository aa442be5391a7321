"""Measure the steps of Trainer and of GraphedTrainer, with all that they do around the forward and the backward pass."""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_pareprop import GraphedTrainer
from hf_pareprop.tools.compare import Row, resized
from hf_pareprop.tools.contenders import CHECKPOINTING, STOCK, Contender, reversible_contenders
from hf_pareprop.tools.timing import error_of, release

from .sizes import sample, subject

WARM_UPS, STEPS = 6, 5
"""The number of steps before the first measurement, and within each one. A graph is captured in the fourth or fifth step."""


def ways_of(device: torch.device) -> list[Contender]:
    """The contenders. With a CUDA graph they are trained by GraphedTrainer, others by Trainer."""
    reprop, pareprop = reversible_contenders((1.0,), ("reprop", "pareprop"))
    graphed = [way.as_graph() for way in (STOCK, reprop, pareprop)] if device.type == "cuda" else []
    return [STOCK, CHECKPOINTING, reprop, *graphed]


class Rows(Dataset[Mapping[str, Tensor]]):
    """One row as often as it is needed. It is on the device already, because loading data is not measured."""

    def __init__(self, row: Mapping[str, Tensor], count: int):
        self._row, self._count = row, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return self._row


class Clock(TrainerCallback):
    """Notes the milliseconds per step, as means over ``STEPS`` steps, so that the host need not wait after each one."""

    def __init__(self, device: torch.device):
        self.ms: list[float] = []
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        beyond = state.global_step - WARM_UPS
        if beyond >= 0 and beyond % STEPS == 0:
            self._wait()
            now = time.perf_counter()
            if beyond:
                self.ms.append(1e3 * (now - self._began) / STEPS)
            self._began = now


def measure_trainer(job: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Train every contender for some steps. Returns the rows. A contender that fails gets a row with the error."""
    batch = resized(sample(job["size"], job["length"]), 1, device)
    data = Rows({name: tensor[0] for name, tensor in batch.items()}, _steps(job) * job["batch_size"])
    rows = []
    for way in ways_of(device):
        row = Row(way, job["batch_size"])
        try:
            _train(row, data, job, device)
        except Exception as error:
            row.error = error_of(error)
        rows.append(row.as_dict())
        release(device)
    return {"rows": rows}


def _steps(job: Mapping[str, Any]) -> int:
    return WARM_UPS + STEPS * int(job["rounds"])


def _train(row: Row, data: Rows, job: Mapping[str, Any], device: torch.device) -> None:
    """Train the contender of ``row``, and note its times and its peak there."""
    clock = Clock(device)
    trainer_class = GraphedTrainer if row.contender.graphed else Trainer
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model: Any = subject(job["size"]).build(row.contender)
        trainer_class(model, _arguments(folder, job, device), train_dataset=data, callbacks=[clock]).train()
    row.ms = clock.ms
    if device.type == "cuda":
        row.peak_bytes = torch.cuda.max_memory_allocated(device)
        row.reserved_bytes = torch.cuda.max_memory_reserved(device)


def _arguments(folder: str, job: Mapping[str, Any], device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=job["batch_size"],
        max_steps=_steps(job),
        bf16=job["precision"] == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
