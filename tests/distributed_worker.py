"""Run by test_distributed.py in two processes: gradients of wrapped models against an unwrapped one."""

import copy

import torch
import torch.distributed as dist
from families import FAMILIES, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
assert dist.get_world_size() == 2
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))


def wrap(model, kind):
    if kind == "fsdp2":
        for layer in model.encoder_layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    unused, static = kind == "ddp, unused parameters", kind == "ddp, static graph"
    return DistributedDataParallel(model, find_unused_parameters=unused, static_graph=static)


count = 0
for family in FAMILIES.values():
    batch = {k: torch.cat([v, v[:1]]) for k, v in family.batch().items()}
    half = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
    for kind in ("ddp", "ddp, unused parameters", "ddp, static graph", "fsdp2"):
        for beta, budget in (
            (1.0, None),
            (0.5, None),
            (1 / 256, None),
            ([0.5, 0, 1.0, 0.5], None),
            (0.5, "gradients"),
        ):
            reference = family.build(4, beta=beta)
            model = copy.deepcopy(reference)
            grads = step(reference, batch, "autograd")[1]
            model.set_backward_engine("pareprop")
            model.set_memory_budget(budget)
            wrapped = wrap(model, kind)
            for _ in range(2):  # a static graph is recorded in the first step and replayed in the second
                wrapped.zero_grad()
                wrapped(**half).loss.backward()
            whole = sum(g.norm() ** 2 for g in grads.values()) ** 0.5
            for name, parameter in model.named_parameters():
                found = parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
                # The same fp32 terms, summed in another order over the two processes.
                assert (found - grads[name]).norm() <= 2**-18 * whole, (kind, beta, budget, name)
            count += 1
if rank == 0:
    print(f"{count} wrappings of 2 processes agree with one")
dist.destroy_process_group()
