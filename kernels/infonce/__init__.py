"""InfoNCE of queries against keys that get no gradient (MoCo's queue, https://arxiv.org/abs/1911.05722; MoCo v3's
batch, https://arxiv.org/abs/2104.02057), and the symmetric two-sided form with gradients on both sides (CLIP's)."""

import torch
from torch import Tensor

from ..collectives import Group
from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    temperature: float,
    *,
    normalize: bool = True,
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over this rank's N queries of -log softmax(<q_i, keys> / temperature) at the positive key k_i: 0-dim, at
    least float32.  q and k are (N, D); k and the queue get no gradient.

    queue (K, D): the keys are k_i and every row of the queue, as enqueue_ fills it.
    queue=None: the keys are the rows of k of all ranks of `group` (MoCo v3), with group=None those of this rank; N must
    be the same on every rank.
    normalize: scale q and k to unit length first; the queue is used as it is.
    """
    check_rows("infonce", temperature, q=q, k=k, **({} if queue is None else {"queue": queue}))
    if q.shape != k.shape:
        raise ValueError(
            f"infonce: q is {tuple(q.shape)} and k is {tuple(k.shape)}: row i of k is the positive of row i of q"
        )
    if queue is not None and group is not None:
        raise ValueError("infonce: group is for the keys of the batch; with a queue, pass group=None")
    if q.shape[0] == 0:
        return q.sum().to(torch.promote_types(q.dtype, torch.float32))
    if choose(impl, q) == "reference":
        return reference.infonce(q, k, queue, temperature, normalize, group)
    check_triton_dtype("infonce", q=q, k=k, **({} if queue is None else {"queue": queue}))
    from . import triton

    return triton.infonce(q, k, queue, temperature, normalize, group)


def infonce_symmetric(
    a: Tensor, b: Tensor, temperature: float, *, normalize: bool = True, group: Group = None, impl: Impl = "auto"
) -> Tensor:
    """Mean of two InfoNCE losses: a_i's positive b_i among all b, and b_i's positive a_i among all a.

    a and b are (N, D), and both get gradients; with `group` the batch is the rows of all its ranks (see ntxent).
    """
    check_rows("infonce_symmetric", temperature, a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"infonce_symmetric: a is {tuple(a.shape)} and b is {tuple(b.shape)}: rows must pair up")
    if a.shape[0] == 0:
        return (a.sum() + b.sum()).to(torch.promote_types(a.dtype, torch.float32))
    if choose(impl, a) == "reference":
        return reference.infonce_symmetric(a, b, temperature, normalize, group)
    check_triton_dtype("infonce_symmetric", a=a, b=b)
    from . import symmetric

    return symmetric.infonce_symmetric(a, b, temperature, normalize, group)
