"""The pieces that several methods share: projection heads, the momentum encoder, balanced shuffling over ranks."""

from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastssl import dist


def mlp(*dims: int, norm: bool = True, last_norm: bool = False, bias: bool = True, last_bias: bool = True,
        last_affine: bool = True) -> nn.Sequential:
    """Linear layers of the widths `dims` with ReLU between them; `norm` puts batch norm before each ReLU,
    `last_norm` one after the last layer (`last_affine`: with scale and shift)."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if last_norm if last else norm:
            layers.append(nn.BatchNorm1d(b, affine=last_affine if last else True))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def frozen_copy(*modules: nn.Module) -> nn.Sequential:
    """A momentum encoder: the modules in sequence, equal weights, no gradient."""
    return copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)


@torch.no_grad()
def ema_(target: nn.Module, online: list[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameters only (batch-norm buffers are the target's own).

    Under ZeRO-3 each rank moves its own shards: both sides are partitioned alike, so nothing is communicated
    (gathering them instead discards the update silently).
    """
    ours = [getattr(p, "ds_tensor", p) for p in target.parameters()]
    theirs = [getattr(p, "ds_tensor", p) for module in online for p in module.parameters()]
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    torch._foreach_lerp_([p.data for p in ours], [p.data for p in theirs], 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1): BYOL's momentum schedule."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2


class Shuffle:
    """Deals each rank's samples evenly to all ranks and back, so that batch statistics cannot tell which key belongs
    to which query (MoCo).  Moves n (W-1)/W samples per rank; gathering everything everywhere would move n (W-1)."""

    def __init__(self, n: int, device: torch.device):
        if n % dist.world():
            raise ValueError(f"shuffled batch norm deals {n} samples to {dist.world()} ranks: "
                             f"make optim.batch (or speed.micro_batch) a multiple of {dist.world()} per rank")
        self.order = torch.randperm(n, device=device)

    def deal(self, x: Tensor) -> Tensor:
        return x if dist.world() == 1 else _exchange(x[self.order])

    def collect(self, x: Tensor) -> Tensor:
        if dist.world() == 1:
            return x
        out = torch.empty_like(x)
        out[self.order] = _exchange(x)
        return out


def _exchange(x: Tensor) -> Tensor:
    # Equal splits make this its own inverse: chunk j of rank i and chunk i of rank j change places.
    x = x.contiguous()
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out
