"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl.config import Optim
from fastssl.optim.groups import describe_groups, group_parameters


def lr_multiplier(optim: Optim, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The lr at `step` (from 0), divided by the base lr.

    "cosine": linear warm-up, then a cosine over the remaining steps (SimCLR, BYOL, MoCo v3).  "cosine_epoch": constant
    within an epoch, a cosine from epoch 0 on, multiplied by the warm-up (mmcv and OpenSelfSup).
    """
    warm = optim.warmup_epochs * steps_per_epoch
    ramp = 1 - (1 - step / warm) * (1 - optim.warmup_ratio) if step < warm else 1.0
    if optim.schedule == "constant":
        return ramp
    if optim.schedule == "step":
        return ramp * optim.gamma ** sum(step >= round(m * steps_per_epoch) for m in optim.milestones)
    if optim.schedule == "cosine_epoch":
        done = (step // steps_per_epoch) / max(1, math.ceil(total_steps / steps_per_epoch))
        return ramp * _cosine(done, 1.0, optim.lr_end)
    if optim.schedule == "cosine":
        return ramp if step < warm else _cosine((step - warm) / max(1, total_steps - warm), 1.0, optim.lr_end)
    raise ValueError(f"optim.schedule={optim.schedule!r} is not one of cosine, cosine_epoch, step, constant")


def _cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Schedule:
    """The lr and weight decay of every group as functions of the step; it has no state to save in checkpoints."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], optim: Optim, *, steps_per_epoch: int):
        self.optim, self.steps_per_epoch = optim, steps_per_epoch
        self.total_steps = optim.steps or optim.epochs * steps_per_epoch
        if optim.schedule == "step" and not optim.milestones:
            raise ValueError("optim.schedule='step' needs optim.milestones, the epochs where lr falls by optim.gamma")
        if optim.warmup_epochs and optim.warmup_epochs * steps_per_epoch >= self.total_steps:
            raise ValueError(
                f"optim.warmup_epochs={optim.warmup_epochs} is not shorter than the run of "
                f"{self.total_steps / steps_per_epoch:g} epochs: set it lower (0: no warm-up) or optim.epochs higher"
            )
        if optim.weight_decay_end is not None and not optim.weight_decay:
            raise ValueError("optim.weight_decay_end needs optim.weight_decay > 0 to start from")
        lr_multiplier(optim, 0, steps_per_epoch, self.total_steps)  # raises for an unknown name
        self.lr = optim.lr * optim.batch / optim.base_batch if optim.base_batch else optim.lr
        self.groups = group_parameters(named, optim, self.lr)
        self.table = describe_groups(self.groups)  # now, because ZeRO-3 removes the shapes
        if self.lr != optim.lr:
            self.table = (
                f"linear scaling: lr {optim.lr:g} x batch {optim.batch} / {optim.base_batch} = {self.lr:g}\n"
                + self.table
            )

    def multiplier(self, step: int) -> float:
        return lr_multiplier(self.optim, step, self.steps_per_epoch, self.total_steps)

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the options of every group of `optimizer` (ours or DeepSpeed's wrapper) for `step`.

        Returns the lr of a group without patterns."""
        groups = optimizer.param_groups
        assert len(groups) == len(self.groups), (len(groups), len(self.groups))
        factor, decay = self.multiplier(step), 1.0
        if self.optim.weight_decay_end is not None:
            decay = _cosine(step / self.total_steps, 1.0, self.optim.weight_decay_end / self.optim.weight_decay)
        for target, group in zip(groups, self.groups):
            target.update(group.options)
            target["lr"] = group.options["lr"] * (1.0 if group.schedule == "constant" else factor)
            target["weight_decay"] = group.options["weight_decay"] * decay
            target["frozen"] = step < group.freeze_epochs * self.steps_per_epoch
        return self.lr * factor
