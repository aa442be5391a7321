"""Run a script so that accelerate believes its processes to have a GPU each, although they compute on the CPU.

On CPUs accelerate ignores FSDP and trains with DDP. But the code that it uses for GPUs works on CPUs as well.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
