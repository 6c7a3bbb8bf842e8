"""Momentum encoders and shuffled batch norm; checks of queues and memory banks."""

from __future__ import annotations

import copy
import math
import warnings

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastssl import dist
from fastssl.kernels import Impl, multi_tensor


def frozen_copy(*modules: nn.Module) -> nn.Sequential:
    """An nn.Sequential of copies of `modules`, without gradients: the initial momentum encoder."""
    return copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)


def disable_drop_path_(target: nn.Module) -> None:
    """Disable stochastic depth in a teacher, as in DINO."""
    for module in target.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0


@torch.no_grad()
def ema_(
    target: nn.Module,
    online: list[nn.Module],
    momentum: float | Tensor,
    *,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """target <- momentum * target + (1 - momentum) * online, for parameters; the target has its own batch-norm buffers.

    momentum: a number or a 0-dim tensor.  found_inf: see kernels.multi_tensor.

    Under ZeRO-3 each rank updates its own shards: target and online are partitioned alike, so nothing is communicated.
    (If they were gathered, the update would be lost without an error.)
    """
    old = [getattr(p, "ds_tensor", p) for p in target.parameters()]
    new = [getattr(p, "ds_tensor", p) for module in online for p in module.parameters()]
    assert len(old) == len(new), (len(old), len(new))
    multi_tensor.lerp_([p.data for p in old], [p.data for p in new], 1 - momentum, found_inf=found_inf, impl=impl)


@torch.no_grad()
def assign_(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """target <- value, unless `found_inf` is nonzero (see kernels.multi_tensor)."""
    target.copy_(value if found_inf is None else torch.where(found_inf != 0, target, value))


def cosine(start: float, end: float, progress: float | Tensor) -> float | Tensor:
    """Cosine schedule from `start` (progress 0) to `end` (progress 1), as for BYOL's momentum.  A `progress` that is a
    0-dim float64 tensor gives a 0-dim tensor."""
    if start == end:
        return end
    if isinstance(progress, Tensor):
        return end - (end - start) * (torch.cos(math.pi * progress) + 1) / 2
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


def check_queue(queue: int, batch: int) -> None:
    """ValueError for a queue that cannot hold the embeddings of one step."""
    if batch > queue:
        raise ValueError(
            f"method.queue={queue} is smaller than optim.batch={batch}: "
            f"each step would overwrite its own rows; set method.queue to at least {batch}"
        )


def check_bank_momentum(momentum: float) -> None:
    """ValueError unless 0 < momentum <= 1, the weight of a new embedding in a memory bank."""
    if not 0 < momentum <= 1:
        raise ValueError(f"method.momentum={momentum}, the weight of the new embedding, must be above 0 and at most 1")


def check_shuffle(shuffle: bool, backbone: nn.Module) -> None:
    """Warn that shuffled batch norm has no effect on one rank, where all keys are in one batch."""
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    if shuffle and batch_norm and dist.world() == 1:
        warnings.warn(
            "method.shuffle=True has no effect on one GPU: batch statistics can reveal which key belongs to a query, "
            "which may reduce accuracy. Use several GPUs or backbone.norm='gn'; method.shuffle=False silences this "
            "warning",
            stacklevel=2,
        )


class Shuffle:
    """Shuffled batch norm (MoCo): sends each rank's n samples to all ranks, as many to each, and the outputs back, so
    that batch statistics do not reveal which key belongs to a query.  Each of W ranks sends n (W-1)/W samples (n (W-1)
    with an all-gather).  Not `enabled`: both methods return their argument."""

    def __init__(self, n: int, device: torch.device, enabled: bool):
        if enabled and n % dist.world():
            raise ValueError(
                f"shuffled batch norm sends equal parts of {n} samples to {dist.world()} ranks: make the images per "
                f"rank (optim.batch / ranks, or speed.micro_batch) a multiple of {dist.world()}, or set "
                "method.shuffle=False"
            )
        self.order = torch.randperm(n, device=device) if enabled else None

    def shuffle(self, x: Tensor) -> Tensor:
        return x if self.order is None or dist.world() == 1 else _exchange(x[self.order])

    def unshuffle(self, x: Tensor) -> Tensor:
        if self.order is None or dist.world() == 1:
            return x
        out = torch.empty_like(x)
        out[self.order] = _exchange(x)
        return out


def _exchange(x: Tensor) -> Tensor:
    # Its own inverse, as all splits are equal: chunk j of rank i and chunk i of rank j are swapped.
    x = x.contiguous()
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out
