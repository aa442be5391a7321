"""Run by test_sharded.py in two processes: stock layers under every wrapping, engines that rebuild against `autograd`."""

import functools
import os
import sys

import torch
import torch.distributed as dist
from stock_models import stock_batch, stock_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import hf_pareprop as hp

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))


def fsdp2(model, **options):
    for layer in model.encoder_layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp1(model):
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.encoder_layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


WRAPPINGS = {
    "ddp": DistributedDataParallel,
    "fsdp2": fsdp2,
    "fsdp2 in mixed precision": lambda model: fsdp2(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "fsdp1": fsdp1,
}


def gradients(name, wrap, engine):
    model = hp.to_reversible(stock_model(name), beta=0.25, backward_engine=engine)
    wrapped = wrap(model)
    torch.manual_seed(5 + rank)
    wrapped(**{k: v[rank : rank + 2] for k, v in stock_batch(name).items()}).loss.backward()
    found = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items()}


count = 0
for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Dinov2ForImageClassification"):
    for kind, wrap in WRAPPINGS.items():
        reference = gradients(name, wrap, "autograd")
        for engine in ("reprop", "pareprop"):
            found = gradients(name, wrap, engine)
            assert len(reference) > 10 and reference.keys() == found.keys(), (name, kind, engine)
            assert all(torch.equal(reference[n], found[n]) for n in reference), (name, kind, engine)
            count += 1
print(f"{count} wrappings equal")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # otherwise threads of FSDP and gloo sometimes abort the interpreter when it ends
