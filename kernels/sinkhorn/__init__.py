"""Sinkhorn-Knopp assignments of SwAV (https://arxiv.org/abs/2006.09882) and DINO-like methods, by scaling vectors."""

import torch
from torch import Tensor

from ..collectives import Group
from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def sinkhorn_center(
    logits: Tensor, epsilon: float, *, iterations: int = 3, group: Group = None, impl: Impl = "auto"
) -> Tensor:
    """The (K,) float32 vector `center` for which softmax((logits - center) / epsilon) are the assignments.

    logits (B, K) of B samples on this rank and K prototypes; the columns are balanced over all ranks of `group`.
    One iteration scales the columns of exp(logits / epsilon) to equal sums, then each row to sum 1.  soft_cross_entropy
    takes this vector, so that the assignments need not be stored.  No gradient.
    """
    check_rows("sinkhorn", logits=logits)
    if not epsilon > 0:
        raise ValueError(f"sinkhorn: epsilon={epsilon}: must be above 0")
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations={iterations}: must be at least 1")
    if logits.numel() == 0 and group is None:
        return torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    with torch.no_grad():
        if choose(impl, logits) == "reference":
            return reference.sinkhorn_center(logits, epsilon, iterations, group)
        check_triton_dtype("sinkhorn", logits=logits)
        from . import triton

        return triton.sinkhorn_center(logits, epsilon, iterations, group)


def sinkhorn(
    logits: Tensor, epsilon: float, *, iterations: int = 3, group: Group = None, impl: Impl = "auto"
) -> Tensor:
    """The assignments themselves, (B, K) float32 with rows that sum to 1.  See sinkhorn_center.  No gradient."""
    center = sinkhorn_center(logits, epsilon, iterations=iterations, group=group, impl=impl)
    with torch.no_grad():
        if logits.numel() == 0 or choose(impl, logits) == "reference":
            return reference.assign(logits, center, epsilon)
        from . import triton

        return triton.assign(logits, center, epsilon)
