"""Run by test_resumed.py in two processes: the Trainer, of which one process may be killed; and what it logged."""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from families import FAMILIES
from test_trainer import Samples
from transformers import Trainer, TrainerCallback, TrainingArguments

folder, what = sys.argv[1:]
torch.set_num_threads(1)
family = FAMILIES["roberta"]


class Killed(TrainerCallback):
    """Kills one of the processes after the fifth step. The last checkpoint is that of the fourth."""

    def on_step_end(self, args, state, control, **kwargs):
        if what == "killed" and args.process_index == 1 and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


arguments = TrainingArguments(
    folder,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=8,
    save_steps=2,
    logging_steps=1,
    learning_rate=1e-3,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
model = family.build(3, 0.1, beta=0.5, memory_budget="gradients")
trainer = Trainer(model, arguments, train_dataset=Samples(family, 48), callbacks=[Killed()])
assert arguments.world_size == 2
trainer.train(resume_from_checkpoint=what == "resumed")
if arguments.process_index == 0:
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    torch.save({"losses": losses, "weights": model.state_dict()}, Path(folder) / "result.pt")
# Trainer leaves the process group open, and one that is still open when the interpreter exits sometimes aborts it.
PartialState().destroy_process_group()
