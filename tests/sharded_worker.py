"""Run by test_sharded.py in two processes: engines that rebuild against `autograd` under the same wrapping, or refused."""

import functools
import os
import sys

import torch
import torch.distributed as dist
from families import FAMILIES, linears
from halves import my_batch, without_wrapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def finer_than_a_layer(model):
    for layer in model.encoder_layers:
        for part in layer.children():
            if linears(part):
                fully_shard(part, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_mixed_precision(model):
    """FSDP2 in mixed precision with its defaults, so that the inputs of layers are cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.encoder_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fsdp1(model, strategy):
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.encoder_layers[0])})
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )


FSDP2 = {"finer": finer_than_a_layer, "mixed": in_mixed_precision}


def outcome(family, kind, engine, steps):
    """The gradients by name, or the error of the forward pass, where unsupported wrappings have to be refused."""
    model = family.build(3, beta=0.5, backward_engine=engine, steps=steps)
    try:
        wrapped = FSDP2[kind](model) if kind in FSDP2 else fsdp1(model, kind)
        loss = wrapped(**my_batch(family)).loss
    except RuntimeError as error:
        return str(error)
    loss.backward()
    if kind in FSDP2:
        return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters() if p.grad is not None}
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        named = wrapped.named_parameters()
        return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in named if p.grad is not None}


kind, engine, steps = sys.argv[1:]
for name, family in FAMILIES.items():
    if family.row.staged and kind not in FSDP2:
        continue  # for FSDP1 layers in stages are like any others, and they would take too long
    reference, found = outcome(family, kind, "autograd", steps), outcome(family, kind, engine, steps)
    if isinstance(found, str):
        print(f"{name} refused: {found}")
    elif not isinstance(reference, str):
        assert reference.keys() == found.keys(), reference.keys() ^ found.keys()
        assert all(torch.equal(reference[n], found[n]) for n in reference), name
        if kind != "mixed":
            plain = without_wrapping(family, steps)
            assert plain.keys() == found.keys(), plain.keys() ^ found.keys()
            # Sums over processes may be rounded differently from the mean here.
            assert all(torch.allclose(plain[n], found[n], rtol=1e-5, atol=1e-6) for n in plain), name
        print(f"{name} equal in {len(found)} gradients")
dist.barrier()
sys.stdout.flush()
os._exit(
    0
)  # a refused step leaves threads of FSDP and gloo behind, which sometimes abort the interpreter when it ends
