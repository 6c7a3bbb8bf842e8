"""NT-Xent over 2n rows: SimCLR's loss (https://arxiv.org/abs/2002.05709), with labels SupCon's
(https://arxiv.org/abs/2004.11362, L_out), decoupled DCL's (https://arxiv.org/abs/2110.06848).

With a process group the rows of all ranks are one batch, and each rank's gradient is exact without a reduce-scatter.
"""

import torch
from torch import Tensor

from ..collectives import Group, gather, rank_world
from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def ntxent(
    z: Tensor,
    temperature: float,
    *,
    labels: Tensor | None = None,
    decoupled: bool = False,
    normalize: bool = True,
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over rows i of log sum_{j != i} exp(s_ij) - mean_{p in P(i)} s_ip, with s = z z^T / temperature.

    z (2n, D): rows of view 0, then rows of view 1; P(i) is the other view of i, (i + n) mod 2n.
    labels, integers (n,) for both views or (rows,) for any number of rows: P(i) is every other row of i's label.
    A negative label means no class: the only positive of such a sample is its other view (first form), or it has none.
    decoupled: leave the positives out of the sum.  normalize: scale rows to unit length first (a zero row stays zero).
    A row without a positive, or with an empty sum, contributes 0; the loss of an empty z is 0.
    group: a torch.distributed group whose ranks' rows form one batch, the same number on each; None: this process only.
    Returns the loss of this rank's rows, a scalar; loss and gradient of the group are the means over its ranks.
    """
    check_rows("ntxent", temperature, z=z)
    rows = z.shape[0]
    if labels is None:
        if rows % 2:
            raise ValueError(f"ntxent: z has {rows} rows: two views need an even number (or pass labels)")
    else:
        labels = _row_labels(labels, z, group)
    if rows == 0:
        return z.sum().to(torch.promote_types(z.dtype, torch.float32))
    if choose(impl, z) == "reference":
        return reference.ntxent(z, temperature, labels, decoupled, normalize, group)
    check_triton_dtype("ntxent", z=z)
    from . import triton

    return triton.ntxent(z, temperature, labels, decoupled, normalize, group)


def _row_labels(labels: Tensor, z: Tensor, group: Group) -> Tensor:
    """Labels of the rows of all ranks (int64); each sample without a class gets a unique one."""
    rows = z.shape[0]
    shapes = [(rows,)] if rows % 2 else [(rows // 2,), (rows,)]
    if labels.is_floating_point() or labels.shape not in shapes or labels.device != z.device:
        raise ValueError(
            f"ntxent: labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}: "
            f"expected integers {' or '.join(map(str, shapes))} on {z.device}"
        )
    own = torch.arange(labels.shape[0], device=labels.device) + rank_world(group)[0] * labels.shape[0]
    labels = torch.where(labels < 0, -1 - own, labels.long())
    return gather(labels if labels.shape[0] == rows else torch.cat([labels, labels]), group)
