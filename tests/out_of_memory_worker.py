"""Run by test_out_of_memory.py in two processes: memory runs out in the second one, once, while layers keep results."""

import sys

import torch
import torch.distributed as dist
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
wrapping, budget = sys.argv[1:]
family = FAMILIES["vit"]
model = family.build(4, beta=0.5)
model.set_memory_budget(budget)
if wrapping == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    for layer in model.encoder_layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    wrapped = fully_shard(model)


def train_a_step():
    wrapped(**family.batch()).loss.backward()


def once(module, args):
    handle.remove()
    raise torch.OutOfMemoryError("CUDA out of memory")


train_a_step()  # in which it is measured what layers keep
model.zero_grad()
if dist.get_rank() == 1:
    handle = model.encoder_layers[2].register_forward_pre_hook(once)
train_a_step()
print("a step after memory ran out")
dist.destroy_process_group()
