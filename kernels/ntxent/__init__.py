"""NT-Xent over 2n rows: SimCLR's loss (https://arxiv.org/abs/2002.05709), with labels SupCon's
(https://arxiv.org/abs/2004.11362, L_out), decoupled DCL's (https://arxiv.org/abs/2110.06848).

With a process group the rows of all ranks are one batch, and each rank's gradient is exact without a reduce-scatter.
"""

import torch
from torch import Tensor

from ..collectives import gather, rank_world
from ..common import check_rows, check_triton_dtype, choose
from . import reference


def ntxent(
    z: Tensor,
    temperature: float,
    *,
    labels: Tensor | None = None,
    decoupled: bool = False,
    normalize: bool = True,
    group=None,
    impl: str = "auto",
) -> Tensor:
    """Mean over rows i of log sum_{j != i} exp(s_ij) - mean_{p in P(i)} s_ip, with s = z z^T / temperature.

    z (2n, D): rows of view 0, then rows of view 1; P(i) is the other view of i, (i + n) mod 2n.
    labels, integers (n,) for both views or (rows,) for any number of rows: P(i) is every other row of i's label.
    A negative label is no class: such a sample's only positive is its other view (first form), or none (second form).
    decoupled: positives leave the sum.  normalize: rows are brought to unit length first (a zero row stays zero).
    A row without a positive, or with an empty sum, adds nothing; an empty z gives 0.
    group: a torch.distributed group whose ranks' rows are one batch, equally many on each; None is this process alone.
    Returns the scalar of this rank; the loss of the group is the mean over ranks, and so is its gradient.
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


def _row_labels(labels: Tensor, z: Tensor, group) -> Tensor:
    """Labels of all ranks' rows (int64); every sample without a class gets a class of its own."""
    rows = z.shape[0]
    if labels.is_floating_point() or labels.shape not in ((rows,), (rows // 2,)) or labels.device != z.device:
        raise ValueError(
            f"ntxent: labels are {labels.dtype} {tuple(labels.shape)} on {labels.device}: "
            f"expected integers ({rows // 2},) or ({rows},) on {z.device}"
        )
    own = torch.arange(labels.shape[0], device=labels.device) + rank_world(group)[0] * labels.shape[0]
    labels = torch.where(labels < 0, -1 - own, labels.long())
    return gather(labels if labels.shape[0] == rows else torch.cat([labels, labels]), group)
