"""Run by test_engines.py in two processes: ways to train under DDP and FSDP2, against `autograd` under the same wrapping."""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from families import FAMILIES, adaptable, gradients
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
DEPTH, MICRO_BATCHES = 4, 3


def frozen(model):
    """Freeze all embeddings, the first layer, and a bias in each of the other layers, as in fine-tuning."""
    model.requires_grad_(False)
    for layer in model.encoder_layers[1:]:
        layer.requires_grad_(True)
        next(p for n, p in layer.named_parameters() if n.endswith("bias")).requires_grad_(False)
    model.get_submodule("classifier" if hasattr(model, "classifier") else "head").requires_grad_(True)
    return model


def with_adapters(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=adaptable(model), r=2, lora_dropout=0.1))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first, so that A would have no gradient
            torch.nn.init.normal_(parameter)
    return adapted


CASES = {
    "accumulated": (None, lambda model: model),
    "frozen": (None, frozen),
    "lora": (None, with_adapters),
    "gradients kept": ("gradients", lambda model: model),
    "gradients kept, lora": ("gradients", with_adapters),
    "2 layers kept": ("2 layers", lambda model: model),
    "2 layers kept, frozen": ("2 layers", frozen),
    "unlike budgets": ("3 layers" if rank else None, lambda model: model),
    "whole layers": (None, lambda model: model),
}


def outcome(family, wrapping, case, engine):
    """The gradients of each of two steps, by name; the second one accumulates them over several batches."""
    budget, prepare = CASES[case]
    steps = "layer" if case == "whole layers" else "sublayer"
    model = family.build(DEPTH, 0.1, beta=0.5, backward_engine=engine, steps=steps)
    model.set_memory_budget(budget)
    layers = model.encoder_layers
    prepared = prepare(model)
    if wrapping == "ddp":
        wrapped = DistributedDataParallel(prepared)
    else:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(prepared, mesh=mesh)
    batch, found, kept = family.batch(), [], []
    torch.manual_seed(rank)
    for micro_batches in (1, MICRO_BATCHES):
        wrapped.zero_grad()
        for i in range(micro_batches):
            last = i == micro_batches - 1
            if wrapping == "fsdp2":
                wrapped.set_requires_gradient_sync(last)
            with nullcontext() if last or wrapping == "fsdp2" else wrapped.no_sync():
                rows = {k: v.roll(rank + i, 0)[:2] for k, v in batch.items()}
                wrapped(**rows).loss.backward()
                kept.append(model.base_model.retention.latest)
        found.append({n: g.full_tensor() if wrapping == "fsdp2" else g for n, g in gradients(prepared).items()})
    if case == "gradients kept" and engine != "autograd" and not family.row.staged:
        # Small models with stages have more activations than parameters.
        assert any(plan is not None and plan.bytes for plan in kept), kept
    return found


wrapping, engine = sys.argv[1:]
for name, family in FAMILIES.items():
    for case in CASES:
        references, found = (outcome(family, wrapping, case, which) for which in ("autograd", engine))
        for reference, grads in zip(references, found, strict=True):
            assert reference.keys() == grads.keys(), (name, case, reference.keys() ^ grads.keys())
            different = [n for n in grads if not torch.equal(reference[n], grads[n])]
            assert not different, (name, case, different[:3], len(different))
        assert any(not torch.equal(references[0][n], references[1][n]) for n in references[0])
        if rank == 0:
            print(f"{name}, {case}: {len(found[0])} gradients are equal", flush=True)
dist.destroy_process_group()
