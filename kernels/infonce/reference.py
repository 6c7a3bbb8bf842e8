"""The definition of InfoNCE in plain PyTorch: stores all logits."""

import torch
from torch import Tensor

from ..collectives import Group, gather, gather_with_grad, rank_world
from ..common import at_least_float32, l2_normalize


def infonce(q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: Group) -> Tensor:
    rows = l2_normalize if normalize else at_least_float32
    q, k = rows(q), rows(k.detach())
    if queue is not None:
        positive = (q * k).sum(1, keepdim=True)
        negative = at_least_float32(q @ queue.detach().to(q.dtype).T)
        logits = torch.cat([positive, negative], 1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()
    keys = gather(k, group)
    logits = at_least_float32(q @ keys.T) / temperature
    return (logits.logsumexp(1) - _positives(logits, group)).mean()


def infonce_symmetric(a: Tensor, b: Tensor, temperature: float, normalize: bool, group: Group) -> Tensor:
    rows = l2_normalize if normalize else at_least_float32
    a, b = rows(a), rows(b)
    total = 0.0
    for x, y in ((a, b), (b, a)):
        logits = at_least_float32(x @ gather_with_grad(y, group).T) / temperature
        total = total + (logits.logsumexp(1) - _positives(logits, group)).mean() / 2
    return total


def _positives(logits: Tensor, group: Group) -> Tensor:
    """The logit of each row's positive: the column of this rank with the same number."""
    return logits.diagonal(rank_world(group)[0] * logits.shape[0])
