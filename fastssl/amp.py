"""Mixed precision: the dtypes by their names in a config, autocast, and the loss scale of fp16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastssl.config import Precision

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Flags in /proc/cpuinfo of processors with instructions for these (x86; ARM).
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network runs in "bf16" or "fp16"; "fp32": nothing changes."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def emulated(precision: Precision, device: torch.device) -> bool:
    """Whether `device` is a CPU (of Linux) without instructions for `precision`.  A convolution in fp16 then takes
    12 times as long as in fp32 (64 channels of 56 x 56, AMD EPYC without avx512_fp16, torch 2.11, 2026-11-27)."""
    if device.type != "cpu" or precision not in NATIVE:
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is not None and not flags & NATIVE[precision]


class LossScaler:
    """Dynamic loss scale for fp16, otherwise 1: halved when gradients overflow, doubled after 2000 good steps.

    Scale, count and overflow flag are 0-dim tensors on `device`, and a step updates them there without waiting for the
    device; only `value` and `state_dict` wait.  DeepSpeed's own scaler for autocast never lowers its scale under ZeRO
    (0.19.8: the overflow branch of stage_1_and_2.py returns before GradScaler.update), so at ZeRO 1 to 3 this
    scale is on the CPU and passed to DeepSpeed as an override.
    """

    INTERVAL = 2000

    def __init__(self, precision: Precision, device: torch.device | str = "cpu", skip_nonfinite: int = 0):
        """`skip_nonfinite`: of config.Optim.  If it is not 0, gradients are checked at every precision, and no step is
        applied after more than so many steps in a row whose gradients are not finite at scale 1."""
        self.dynamic, self.skip_nonfinite = precision == "fp16", skip_nonfinite
        self.checked = self.dynamic or skip_nonfinite > 0  # whether gradients are checked
        self.scale = torch.full((), 2.0**16 if self.dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device)  # not zero: the last gradients overflowed
        self.bad_steps = torch.zeros((), dtype=torch.int32, device=device)  # such steps in a row at scale 1

    @property
    def value(self) -> float:
        return float(self.scale) if self.dynamic else 1.0

    @value.setter
    def value(self, value: float) -> None:
        self.scale.fill_(value)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.dynamic else loss

    def unscale_(self, grads: list[Tensor]) -> Tensor | None:
        """Divide gradients by the scale, in one pass.  Returns a flag (0-dim float32 on the device) that is not zero if
        one of them is not finite; None if they are not checked."""
        if not self.checked:
            return None
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, self.found_inf, self.scale.reciprocal())
        if self.skip_nonfinite:
            final = (self.found_inf != 0) & (self.scale <= 1)
            self.bad_steps.copy_(torch.where((self.bad_steps > self.skip_nonfinite) | final, self.bad_steps + 1, 0))
            self.found_inf.copy_(torch.maximum(self.found_inf, (self.bad_steps > self.skip_nonfinite).float()))
        return self.found_inf

    def update_(self) -> None:
        """Adapt the scale to the overflow flag."""
        if self.dynamic:
            torch._amp_update_scale_(self.scale, self.good_steps, self.found_inf, 2.0, 0.5, self.INTERVAL)
            self.scale.clamp_(min=1.0)

    def pass_to_zero(self, engine: DeepSpeedEngine) -> None:
        """Set the scale by which ZeRO's optimizer divides gradients."""
        if self.dynamic and hasattr(engine.optimizer, "override_loss_scale"):
            engine.optimizer.override_loss_scale(self.value)

    def backward(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        engine.backward(loss if hasattr(engine.optimizer, "override_loss_scale") else self.scaled(loss))

    def step(self, engine: DeepSpeedEngine) -> bool:
        """DeepSpeed's step, skipped where gradients overflowed.  Returns whether it was applied (fp16: waits
        for the device)."""
        if self.checked and not hasattr(engine.optimizer, "override_loss_scale"):  # ZeRO 0: DeepSpeed does not unscale
            applied = not self.unscale_([p.grad for p in engine.module.parameters() if p.grad is not None])
            if applied:
                engine.step()
            else:
                engine.zero_grad()
        else:
            engine.step()
            applied = engine.was_step_applied()
            self.found_inf.fill_(not applied)
        self.update_()
        return applied

    def state_dict(self) -> dict:
        return {"value": self.value, "good": int(self.good_steps), "bad": int(self.bad_steps)}

    def load_state_dict(self, values: dict) -> None:
        self.value = values["value"]
        self.good_steps.fill_(values["good"])
        self.bad_steps.fill_(values.get("bad", 0))
