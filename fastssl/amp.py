"""Precision: the dtypes by their names in a config, and the loss scale of fp16."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale:
    """Dynamic loss scale for fp16, otherwise 1: halved when gradients overflow, doubled after 2000 good steps.

    DeepSpeed's own scaler for autocast never lowers its scale under ZeRO (0.19.8: the overflow branch of
    stage_1_and_2.py returns before GradScaler.update), so this one drives DeepSpeed's override instead.
    """

    INTERVAL = 2000

    def __init__(self, precision: str):
        self.dynamic = precision == "fp16"
        self.value = 2.0**16 if self.dynamic else 1.0
        self.good = 0

    def announce(self, ds) -> None:
        """Tell ZeRO's optimizer the scale that it must divide gradients by."""
        if self.dynamic and hasattr(ds.optimizer, "override_loss_scale"):
            ds.optimizer.override_loss_scale(self.value)

    def backward(self, ds, loss: Tensor) -> None:
        if self.dynamic and not hasattr(ds.optimizer, "override_loss_scale"):
            loss = loss * self.value
        ds.backward(loss)

    def step(self, ds) -> bool:
        """The optimizer step, unless gradients overflowed; returns whether it was applied."""
        if self.dynamic and not hasattr(ds.optimizer, "override_loss_scale"):  # ZeRO 0: nobody else unscales
            grads = [p.grad for p in ds.module.parameters() if p.grad is not None]
            torch._foreach_div_(grads, self.value)
            applied = bool(torch.stack(torch._foreach_norm(grads)).isfinite().all())
            if applied:
                ds.step()
            else:
                ds.zero_grad()
        else:
            ds.step()
            applied = ds.was_step_applied()
        if self.dynamic:
            self.good = self.good + 1 if applied else 0
            if not applied:
                self.value = max(1.0, self.value / 2)
            elif self.good == self.INTERVAL:
                self.value, self.good = self.value * 2, 0
        return applied

    def state_dict(self) -> dict:
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, values: dict) -> None:
        self.value, self.good = values["value"], values["good"]
