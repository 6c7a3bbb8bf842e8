"""The definition of Sinkhorn in plain PyTorch, with logarithms of the scaling vectors: exact for any logits."""

import torch
import torch.distributed as td
from torch import Tensor

from ..collectives import Group, all_reduce
from ..common import at_least_float32


def sinkhorn_center(logits: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    x_BK = at_least_float32(logits.detach()) / epsilon
    row_B = torch.zeros(x_BK.shape[0], dtype=x_BK.dtype, device=x_BK.device)
    for _ in range(iterations):
        column_K = _logsumexp(x_BK + row_B[:, None], group)
        row_B = -(x_BK - column_K).logsumexp(1)
    return column_K * epsilon


def assign(logits: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return ((at_least_float32(logits.detach()) - center) / epsilon).softmax(1)


def _logsumexp(x: Tensor, group: Group) -> Tensor:
    """Over the rows of all ranks."""
    if group is None:
        return x.logsumexp(0)
    top = all_reduce(x.amax(0), group, td.ReduceOp.MAX)
    return top + all_reduce((x - top).exp().sum(0), group).log()
