"""The definition of InfoNCE in plain PyTorch: holds all logits, runs anywhere."""

import torch

from ..collectives import gather, gather_with_grad, rank_world
from ..common import at_least_float32, l2_normalize


def infonce(q, k, queue, temperature, normalize, group):
    prepare = l2_normalize if normalize else at_least_float32
    q, k = prepare(q), prepare(k.detach())
    if queue is not None:
        positive = (q * k).sum(1, keepdim=True)
        negative = at_least_float32(q @ queue.detach().to(q.dtype).T)
        logits = torch.cat([positive, negative], 1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()
    keys = gather(k, group)
    logits = at_least_float32(q @ keys.T) / temperature
    return (logits.logsumexp(1) - _own(logits, group)).mean()


def infonce_symmetric(a, b, temperature, normalize, group):
    prepare = l2_normalize if normalize else at_least_float32
    a, b = prepare(a), prepare(b)
    total = 0.0
    for rows, columns in ((a, b), (b, a)):
        logits = at_least_float32(rows @ gather_with_grad(columns, group).T) / temperature
        total = total + (logits.logsumexp(1) - _own(logits, group)).mean() / 2
    return total


def _own(logits, group):
    """Row i's logit of the column that this rank brought as its row i."""
    return logits.diagonal(rank_world(group)[0] * logits.shape[0])
