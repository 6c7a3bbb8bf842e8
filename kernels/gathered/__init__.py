"""NPID's loss (https://arxiv.org/abs/1805.01978, in the InfoNCE form that is used in practice): positives and negatives
are rows of a memory bank, given by index; the kernel never stores the gathered rows."""

import torch
from torch import Tensor

from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def gathered_nce(
    q: Tensor,
    bank: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    normalize: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Mean cross entropy of query i's positive bank[positive_i] among the positive and its negatives.

    q (N, D); bank (S, D), used as it is, without gradient; positive (N,) int64.  negatives, int64: (N, K), separate for
    each query, or (K,), shared by all, which is a matrix product with about 100 times less memory traffic.
    normalize: scale q to unit length first.  Indices must be in [0, S).
    """
    check_rows("gathered_nce", temperature, q=q, bank=bank)
    for name, index, shapes in (
        ("positive", positive, ((q.shape[0],),)),
        ("negatives", negatives, ((q.shape[0], negatives.shape[-1]), (negatives.shape[-1],))),
    ):
        if index.dtype != torch.int64 or index.shape not in shapes or index.device != q.device:
            raise ValueError(
                f"gathered_nce: {name} is {index.dtype} {tuple(index.shape)} on {index.device}: "
                f"expected int64 {' or '.join(map(str, shapes))} on {q.device}"
            )
    if q.shape[0] == 0:
        return q.sum().to(torch.promote_types(q.dtype, torch.float32))
    if choose(impl, q) == "reference":
        return reference.gathered_nce(q, bank, positive, negatives, temperature, normalize)
    check_triton_dtype("gathered_nce", q=q, bank=bank)
    from . import triton

    return triton.gathered_nce(q, bank, positive, negatives, temperature, normalize)
