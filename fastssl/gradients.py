"""Gradients of all parameters together: their average over ranks, and their norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import dist

# A bucket of gradients is reduced once it holds more elements; 2 GB in float32, as in DeepSpeed.
ALL_REDUCE_ELEMENTS = 500_000_000


@torch.no_grad()
def average_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Every parameter's gradient, averaged over ranks in place; one without a gradient gets zeros, for its weight
    decay."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters]
    bucket, size = [], 0
    for i, g in enumerate(grads if dist.world() > 1 else ()):
        bucket.append(g)
        size += g.numel()
        if size > ALL_REDUCE_ELEMENTS or i == len(grads) - 1:
            flat = dist.sum_(torch.cat([b.flatten() for b in bucket])).mul_(1 / dist.world())
            parts = flat.split([b.numel() for b in bucket])
            torch._foreach_copy_(bucket, [part.view_as(b) for part, b in zip(parts, bucket)])
            bucket, size = [], 0
    return grads


@torch.no_grad()
def clip_(grads: list[Tensor], max_norm: float) -> None:
    """Scale the gradients so that the norm of all together is at most `max_norm`."""
    total = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
    torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
