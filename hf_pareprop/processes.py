"""Checks for training one model in several processes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from .torch_private import in_data_parallel_forward


def check_not_tensor_parallel(options: Mapping[str, Any]) -> None:
    """Check that the arguments of ``from_pretrained`` do not ask for tensor parallelism, also not in a `DistributedConfig`.

    Raises:
        ValueError: they ask for it.
    """
    config = options.get("distributed_config")
    given = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    for name, nothing in (("tp_plan", (None, {})), ("tp_size", (None, 1))):
        for value in (options.get(name), given.get(name)):
            if value not in nothing:
                raise ValueError(
                    f"{name}={value!r}: reversible models have no tensor parallelism, because their layers would communicate "
                    "while they are rebuilt. Load without it, and shard whole layers with FSDP2 "
                    "(torch.distributed.fsdp.fully_shard, or accelerate launch with fsdp_version 2)."
                )


def check_may_repeat(budget: str | None) -> None:
    """Check that this process may repeat a forward pass in which memory ran out, without asking the other processes.

    Under ``DistributedDataParallel`` layers do not communicate in the forward pass, so one process can repeat it alone. With
    FSDP, ZeRO-3 and tensor parallelism they do communicate: the other processes would wait in the next collective while this
    process repeats earlier ones.

    Raises:
        OutOfMemoryError: the process may not repeat the forward pass.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or in_data_parallel_forward():
        return
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if processes > 1:
        raise torch.OutOfMemoryError(
            f"out of memory in the forward pass of rank {rank} of {processes} processes, with memory_budget={budget!r}. One process "
            "does not repeat its forward pass with less kept, because the others would wait for it forever. Set a smaller "
            "memory_budget in all processes (None keeps nothing), or take smaller batches."
        )
