"""Combines the splits of a pass over the keys, and adds the positive, which is not among the keys."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import inverse_norm
from ..tiling import next_power_of_2


@triton.jit(do_not_specialize=("M", "num_splits"))
def combine_kernel(
    stats_ptr,  # (2, num_splits, M) float32: maxima and sums
    acc_ptr,  # (num_splits, M, D_PADDED) float32: sums of p_ij k_j
    dot_ptr,  # (M,) float32: <q_i, positive_i>
    positive_ptr,  # (M, D), any float
    stride_pm,
    stride_pd,
    q_ptr,  # (M, D), any float
    stride_qm,
    stride_qd,
    inv_norm_ptr,  # (M,) float32
    loss_ptr,  # (M,) float32 out, times loss_factor
    dq_ptr,  # (M, D) float32 out, times factor
    M,
    num_splits,
    scale,
    factor,
    loss_factor,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    P_SCALE_LOG2: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_POSITIVE: tl.constexpr,
):
    """One program: one query, BLOCK_SPLITS splits at a time.

    With several queries a program, 256 queries would leave most of the GPU idle while it reads 17 MB of splits.
    """
    i, offs_s, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SPLITS), tl.arange(0, D_PADDED)
    mask_d = (offs_d < D)[None, :]
    positive_x = tl.load(dot_ptr + i) * scale
    positive_ptrs = positive_ptr + i * stride_pm + offs_d.to(tl.int64)[None, :] * stride_pd
    positive = tl.load(positive_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    positive *= inverse_norm(positive, NORMALIZE_POSITIVE)[:, None]

    split_max = tl.full([BLOCK_SPLITS], float("-inf"), tl.float32)
    for s in range(0, num_splits, BLOCK_SPLITS):
        mask_s = s + offs_s < num_splits
        split_max = tl.maximum(split_max, tl.load(stats_ptr + (s + offs_s) * M + i, mask=mask_s, other=float("-inf")))
    row_max = tl.maximum(tl.max(split_max, 0), positive_x)
    split_sum = tl.zeros([BLOCK_SPLITS], tl.float32)
    split_acc = tl.zeros([BLOCK_SPLITS, D_PADDED], tl.float32)
    for s in range(0, num_splits, BLOCK_SPLITS):
        offs_part = (s + offs_s).to(tl.int64) * M + i
        mask_s = s + offs_s < num_splits
        alpha = tl.exp2(tl.load(stats_ptr + offs_part, mask=mask_s, other=float("-inf")) - row_max)
        split_sum += alpha * tl.load(stats_ptr + num_splits * M + offs_part, mask=mask_s, other=0.0)
        acc_ptrs = acc_ptr + offs_part[:, None] * D_PADDED + offs_d[None, :]
        split_acc += alpha[:, None] * tl.load(acc_ptrs, mask=mask_s[:, None], other=0.0)
    negatives = tl.sum(split_sum, 0)
    total = tl.exp2(positive_x - row_max + P_SCALE_LOG2) + negatives
    tl.store(loss_ptr + i, (row_max - P_SCALE_LOG2 + tl.log2(total) - positive_x) * loss_factor)

    # the positive's p - 1 as -negatives / total: no difference of nearly equal numbers
    g = (tl.sum(split_acc, 0)[None, :] - negatives * positive) / total
    if NORMALIZE:
        inv_norm = tl.load(inv_norm_ptr + i)
        q_ptrs = q_ptr + i * stride_qm + offs_d.to(tl.int64)[None, :] * stride_qd
        u = tl.load(q_ptrs, mask=mask_d, other=0.0).to(tl.float32) * inv_norm
        g = (g - u * tl.sum(u * g, 1)[:, None]) * inv_norm
    tl.store(dq_ptr + i * D + offs_d[None, :], g * factor, mask=mask_d)


def combine(
    partial: tuple[Tensor, Tensor, int],
    q: Tensor,
    inv_norm: Tensor | None,
    positive: Tensor,
    dot: Tensor,
    temperature: float,
    normalize_positive: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to q (M, D) in float32.

    partial: stats (2, num_splits, M), acc (num_splits, M, D_PADDED) and P_SCALE_LOG2.
    inv_norm: inverse norms of q (M,) if the logits are those of rows at unit length, else None.
    dot: the products <q_i, positive_i> (M,), of normalised rows where the logits are.
    """
    stats, acc, p_scale_log2 = partial
    m, d = q.shape
    num_splits, width = stats.shape[1], acc.shape[2]
    block_splits = min(max(1, 4096 // width), next_power_of_2(num_splits))
    loss = torch.empty(m, dtype=torch.float32, device=q.device)
    dq = torch.empty((m, d), dtype=torch.float32, device=q.device)
    combine_kernel[(m,)](
        stats,
        acc,
        dot,
        positive,
        *positive.stride(),
        q,
        *q.stride(),
        inv_norm,
        loss,
        dq,
        m,
        num_splits,
        1 / (math.log(2) * temperature),
        1 / (m * temperature),
        math.log(2) / m,
        D=d,
        D_PADDED=width,
        BLOCK_SPLITS=block_splits,
        P_SCALE_LOG2=p_scale_log2,
        NORMALIZE=inv_norm is not None,
        NORMALIZE_POSITIVE=normalize_positive,
        num_warps=min(4, max(1, block_splits * width // 1024)),
    )
    return loss.sum(), dq
