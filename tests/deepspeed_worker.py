"""Run by test_sharded.py in two processes: DeepSpeed's ZeRO against plain training, or refused in the forward pass."""

import logging
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from families import FAMILIES
from halves import my_batch, without_wrapping

deepspeed.utils.logger.setLevel(logging.ERROR)
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
stage, steps = int(sys.argv[1]), sys.argv[2]
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # shards small ones too
}


def outcome(family, engine):
    """The gradients by name, or the error of the forward pass."""
    model = family.build(3, beta=0.5, backward_engine=engine, steps=steps)
    wrapped, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    try:
        loss = wrapped(**my_batch(family)).loss
    except RuntimeError as error:
        return str(error)
    wrapped.backward(loss)
    found = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
    wrapped.step()
    return found


for name in ("vit", "roberta"):
    family = FAMILIES[name]
    reference, *found = (outcome(family, engine) for engine in ("autograd", "reprop", "pareprop"))
    if any(isinstance(each, str) for each in (reference, *found)):
        print(f"{name} refused: {found[0]}")
        continue
    plain = without_wrapping(family, steps)
    for each in found:
        assert plain.keys() == reference.keys() == each.keys()
        assert all(torch.equal(reference[n], each[n]) for n in reference)
        assert all(torch.allclose(plain[n], each[n], rtol=1e-5, atol=1e-6) for n in plain)
    print(f"{name}: reprop and pareprop equal with ZeRO-{stage}")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # otherwise threads of gloo sometimes abort the interpreter when it ends
