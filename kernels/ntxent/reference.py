"""The definition of NT-Xent, SupCon and DCL in plain PyTorch: stores the whole similarity matrix.

Shapes: M rows of this rank, N rows of all ranks, D features.
"""

import torch
from torch import Tensor

from ..collectives import Group, gather_with_grad, rank_world
from ..common import at_least_float32, l2_normalize


def ntxent(
    z: Tensor, temperature: float, labels: Tensor | None, decoupled: bool, normalize: bool, group: Group
) -> Tensor:
    """labels: (N,) of the rows of all ranks; None: the positive is the other view."""
    u_MD = l2_normalize(z) if normalize else at_least_float32(z)
    u_ND = gather_with_grad(u_MD, group)
    s_MN = at_least_float32(u_MD @ u_ND.T) / temperature

    m = z.shape[0]
    row = torch.arange(m, device=z.device)
    offset = rank_world(group)[0] * m
    column = torch.arange(u_ND.shape[0], device=z.device)
    self_MN = column == (row + offset)[:, None]
    if labels is None:
        positive_MN = column == ((row + m // 2) % m + offset)[:, None]
    else:
        positive_MN = (labels == labels[offset : offset + m, None]) & ~self_MN

    summed_MN = ~(self_MN | positive_MN) if decoupled else ~self_MN
    active = summed_MN.any(1) & positive_MN.any(1)
    # inactive rows keep all their terms: the gradient of the logarithm of an empty sum is NaN even when multiplied by 0
    lse = s_MN.masked_fill(~summed_MN & active[:, None], -torch.inf).logsumexp(1)
    s_positive = torch.where(positive_MN, s_MN, 0.0).sum(1) / positive_MN.sum(1).clamp(min=1)
    return torch.where(active, lse - s_positive, 0.0).mean()
