"""Optimizers (SGD, LARS, AdamW), parameter groups by regular expressions, and schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.config import Optim
from fastssl.kernels import Impl
from fastssl.kernels.multi_tensor import LarsOptions
from fastssl.optim.groups import NORM_AND_BIAS, frozen, group_parameters
from fastssl.optim.optimizers import AdamW, Lars
from fastssl.optim.schedule import Schedule, lr_multiplier
from fastssl.optim.zero_aware import attach

# Optim.lars_denominator -> fields of LarsOptions
DENOMINATORS: dict[str, dict[str, Any]] = {"openselfsup": {}, "larc": {"eps": 1e-8}, "sum": {"norm_of_sum": True}}


def build(
    named_parameters: Iterable[tuple[str, Tensor]], optim: Optim, *, steps_per_epoch: int, impl: Impl = "auto"
) -> tuple[torch.optim.Optimizer, Schedule]:
    """The optimizer of the trainable parameters and its schedule; `schedule.table` lists the parameter groups.

    `impl`: implementation of the update, "auto", "reference" or "triton"; AdamW is always torch's.
    Call `attach(engine)` after `deepspeed.initialize`, and `schedule.set_lr(optimizer, step)` before every step.
    """
    schedule = Schedule(named_parameters, optim, steps_per_epoch=steps_per_epoch)
    groups = [{"params": g.params, **g.options} for g in schedule.groups]
    clip_each = optim.clip if optim.clip_each else 0.0
    sgd = LarsOptions(
        lr=schedule.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        dampening=optim.dampening,
        nesterov=optim.nesterov,
        lr_in_momentum=False,
    )
    optimizer: Lars | AdamW
    if optim.name == "lars":
        lars = sgd._replace(
            eta=optim.eta,
            clip_lr=optim.clip_lr,
            lr_in_momentum=optim.lr_in_momentum,
            **DENOMINATORS[optim.lars_denominator],
        )
        optimizer = Lars(groups, lars, clip_each=clip_each, impl=impl)
    elif optim.name == "sgd":
        if optim.nesterov and (optim.dampening or not optim.momentum):
            raise ValueError(
                f"optim.nesterov=True needs optim.momentum above 0 (now {optim.momentum:g}) and "
                f"optim.dampening=0 (now {optim.dampening:g})"
            )
        optimizer = Lars(groups, sgd, lars_exclude=True, clip_each=clip_each, impl=impl)
    elif optim.name == "adamw":
        optimizer = AdamW(
            groups,
            lr=schedule.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_each=clip_each,
        )
    else:
        raise ValueError(f"optim.name={optim.name!r} is not one of sgd, adamw, lars")
    schedule.set_lr(optimizer, 0)
    return optimizer, schedule
