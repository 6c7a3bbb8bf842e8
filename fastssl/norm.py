"""Batch norm over ranks and over micro-batches: global statistics, and running ones that move once per step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import dist


def convert_sync_bn(module: nn.Module, where: torch.device) -> nn.Module:
    """Batch norm over the batch of all ranks: torch's on CUDA; on CPU, where torch has none, `SyncBatchNorm`.

    timm's batch norm that ends with an activation keeps it."""
    if dist.world() == 1:
        return module
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for m in norms:
        if type(m).__module__ != nn.BatchNorm2d.__module__ and not hasattr(m, "act"):
            raise ValueError(
                f"sync_bn=True: {type(m).__name__} is a batch norm that does more than PyTorch's, which "
                "would be lost; set sync_bn=False"
            )
    if where.type == "cuda":
        if any(hasattr(m, "act") for m in norms):  # torch's own converter drops the activation
            from timm.layers import convert_sync_batchnorm

            return convert_sync_batchnorm(module)
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for m in norms:
        m.__class__ = SyncBatchNormAct if hasattr(m, "act") else SyncBatchNorm
    return module


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Statistics of all ranks' samples, equally many on each, with exact gradients."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        average = dist.mean(wide.mean(dims))
        centred = wide - average.view(shape)
        variance = dist.mean(centred.square().mean(dims))
        if self.track_running_stats:
            n = x.numel() // x.shape[1] * dist.world()
            momentum = 1 / (int(self.num_batches_tracked) + 1) if self.momentum is None else self.momentum
            self.running_mean.lerp_(average.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (n / (n - 1)), momentum)
            self.num_batches_tracked += 1
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class SyncBatchNormAct(SyncBatchNorm):
    """Of timm's BatchNormAct2d, whose dropout and activation it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class RunningStatistics:
    """Batch norm's running statistics move once per optimizer step: by the mean over its micro-batches of what each
    alone would move them, however often it calls a module (once per view).

    The modules' momentum stays as it is: torch.compile would compile anew for every value.
    """

    def __init__(self, module: nn.Module):
        norms = [
            m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        moving = [b for m in norms for b in (m.running_mean, m.running_var)]
        self.buffers = [b for b in (moving, [m.num_batches_tracked for m in norms]) if b]  # a dtype each, for foreach
        self.start = [[b.clone() for b in buffers] for buffers in self.buffers]
        self.moved = [[torch.zeros_like(b) for b in buffers] for buffers in self.buffers]

    def restore(self) -> None:
        """Undo what forwards moved.  Not before their backward: autograd holds these buffers."""
        for buffers, start in zip(self.buffers, self.start):
            torch._foreach_copy_(buffers, start)

    def add(self) -> None:
        """Count what a micro-batch moved, and undo it."""
        for moved, buffers, start in zip(self.moved, self.buffers, self.start):
            torch._foreach_add_(moved, torch._foreach_sub(buffers, start))
        self.restore()

    def apply_mean(self, count: int) -> None:
        """Move them by the mean of the `count` micro-batches."""
        for moved, buffers in zip(self.moved, self.buffers):
            whole = not buffers[0].is_floating_point()  # the number of calls, the same in every micro-batch
            torch._foreach_add_(buffers, [m // count for m in moved] if whole else torch._foreach_div(moved, count))
