"""Run by test_distributed.py: gradients of Trainer's first step, with DDP if it is launched in two processes."""

import os
import sys
import tempfile

import torch
from accelerate import PartialState
from families import FAMILIES
from test_trainer import Samples
from transformers import Trainer, TrainingArguments

name, batch_size, result = sys.argv[1:]
torch.set_num_threads(1)
family = FAMILIES[name]
gradients = {}


class Capturing(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        module = self.accelerator.unwrap_model(model)
        gradients.update({n: p.grad.clone() for n, p in module.named_parameters()})
        return loss


arguments = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=int(batch_size),
    max_steps=1,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    ddp_find_unused_parameters=True,
)
Capturing(family.build(3, beta=0.5), arguments, train_dataset=Samples(family, 8)).train()
if os.environ.get("RANK", "0") == "0":
    torch.save({"world_size": arguments.world_size, "gradients": gradients}, result)
# Trainer leaves the process group open, and one that is still open when the interpreter exits sometimes aborts it.
PartialState().destroy_process_group()
