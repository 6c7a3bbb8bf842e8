"""Batch norm over ranks and micro-batches: statistics of the global batch, running statistics updated once per step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import dist


def convert_sync_bn(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch norm by synchronised batch norm: PyTorch's on CUDA, `SyncBatchNorm` on CPU, where PyTorch has none.

    The activation in timm's batch norm is kept."""
    if dist.world() == 1:
        return module
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for m in norms:
        if type(m).__module__ != nn.BatchNorm2d.__module__ and not hasattr(m, "act"):
            raise ValueError(
                f"sync_bn=True: {type(m).__name__} is a batch norm that does more than PyTorch's, which "
                "would be lost; set sync_bn=False"
            )
    if device.type == "cuda":
        if any(hasattr(m, "act") for m in norms):  # torch's own converter drops the activation
            from timm.layers import convert_sync_batchnorm

            return convert_sync_batchnorm(module)
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for m in norms:
        m.__class__ = SyncBatchNormAct if hasattr(m, "act") else SyncBatchNorm
    return module


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of the samples of all ranks, the same number on each, with exact gradients."""

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
    """For timm's BatchNormAct2d, with its dropout and activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def running_statistics(module: nn.Module) -> list[list[Tensor]]:
    """The buffers of every batch norm in `module` by their dtype, for torch._foreach_*: running means and variances,
    and numbers of batches.  Empty without such buffers."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    moving = [b for m in norms for b in (m.running_mean, m.running_var)]
    return [b for b in (moving, [m.num_batches_tracked for m in norms]) if b]


class StatisticsBackup:
    """The running statistics of every batch norm before a step, for one that is skipped: an overflow in the forward
    would otherwise leave them NaN.  Few kernels, on tensors that stay the same, so that a CUDA graph can restore them.
    """

    def __init__(self, module: nn.Module):
        self._groups = []  # buffers, their copies in one tensor, another such tensor, and its parts
        for buffers in running_statistics(module):
            rows = [b.view(-1) for b in buffers]
            flat, new = torch.cat(rows), torch.cat(rows)
            self._groups.append((rows, flat, new, new.split([len(row) for row in rows])))

    def save(self) -> None:
        for rows, flat, _, _ in self._groups:
            torch.cat(rows, out=flat)

    def restore_where(self, condition: Tensor) -> None:
        """Set all back where the 0-dim `condition`, on their device, holds.  The host does not wait for the device."""
        for rows, flat, new, parts in self._groups:
            torch.cat(rows, out=new)
            torch.where(condition, flat, new, out=new)
            torch._foreach_copy_(rows, parts)


class SavedStatistics:
    """The running statistics of every batch norm at construction; `restore` sets them back.  `add` after each
    micro-batch and `apply_mean` at the end update them once per optimizer step, by the mean of the changes that the
    micro-batches make (each with all calls of a module, one per view).

    The modules' momentum is not changed: torch.compile would recompile for every value.
    """

    def __init__(self, module: nn.Module):
        self.buffers = running_statistics(module)
        self.start = [[b.clone() for b in buffers] for buffers in self.buffers]
        self.change = [[torch.zeros_like(b) for b in buffers] for buffers in self.buffers]

    def restore(self) -> None:
        """Undo the changes of forward passes.  Only after their backward: autograd has saved these buffers."""
        for buffers, start in zip(self.buffers, self.start):
            torch._foreach_copy_(buffers, start)

    def add(self) -> None:
        """Record the change that a micro-batch has made, and undo it."""
        for change, buffers, start in zip(self.change, self.buffers, self.start):
            torch._foreach_add_(change, torch._foreach_sub(buffers, start))
        self.restore()

    def apply_mean(self, count: int) -> None:
        """Apply the mean of the changes of `count` micro-batches."""
        for change, buffers in zip(self.change, self.buffers):
            integer = not buffers[0].is_floating_point()  # num_batches_tracked, the same in every micro-batch
            torch._foreach_add_(buffers, [c // count for c in change] if integer else torch._foreach_div(change, count))
