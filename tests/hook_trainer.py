"""A `Trainer` with what hooks read, without a method or DeepSpeed.  Not a test."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fastssl.amp import LossScaler
from fastssl.config import Run
from fastssl.trainer import Trainer


def hook_trainer(run: Run, backbone: nn.Module, loader, total_steps: int, folder=Path("."), **state) -> Trainer:
    """`state`: other attributes of the trainer, such as `step`.  What is not given and no hook reads is None."""
    method = nn.Module()
    method.backbone = backbone
    return Trainer(
        run=run,
        folder=folder,
        device=torch.device("cpu"),
        method=method,
        deepspeed=None,
        schedule=SimpleNamespace(total_steps=total_steps),
        loader=loader,
        meter=None,
        loss_scaler=LossScaler(run.optim.precision, skip_nonfinite=run.optim.skip_nonfinite),
        step_inputs=None,
        **state,
    )
