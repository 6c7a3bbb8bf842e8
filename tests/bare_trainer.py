"""A real `Trainer` with parts of a run only, for tests that look at one part.  Not a test."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fastssl.amp import LossScaler
from fastssl.config import Run
from fastssl.trainer import Trainer


def bare_trainer(run: Run | None = None, loader=None, *, backbone=None, total_steps: int = 100, **state) -> Trainer:
    """On the CPU, without a method (but for its `backbone`) and DeepSpeed.  `state`: other attributes of the trainer,
    such as `folder` or `step`.  What is not given is None."""
    run = run or Run(method=None)
    method = nn.Module()
    method.backbone = backbone
    parts = {
        "folder": Path("."),
        "device": torch.device("cpu"),
        "method": method,
        "deepspeed": None,
        "schedule": SimpleNamespace(total_steps=total_steps),
        "meter": None,
        "loss_scaler": LossScaler(run.optim.precision, skip_nonfinite=run.optim.skip_nonfinite),
        "step_inputs": None,
    }
    return Trainer(run=run, loader=loader, **parts | state)
