"""NPID's loss with gathered negatives: each is read once, for its logit and for dq together, and none is written.

Bound by the gather: M N rows of the bank.  Negatives shared by all queries are a matrix of keys (kernels/one_pass).
Not measured yet on a GPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..one_pass import combine, loss_and_gradient, register_ready_gradient
from ..rows import inverse_norm
from ..tiling import cdiv, next_power_of_2, split_tiles


@triton.jit(do_not_specialize=("M", "N", "negatives_per_split"))
def gathered_kernel(
    q_ptr,  # (M, D), any float
    stride_qm,
    stride_qd,
    bank_ptr,  # (S, D), any float
    stride_bs,
    stride_bd,
    positive_ptr,  # (M,) int64, rows of the bank
    stride_pm,
    negative_ptr,  # (M, N) int64, rows of the bank
    stride_nm,
    stride_nn,
    stats_ptr,  # (2, num_splits, M) float32 out: maxima and sums
    acc_ptr,  # (num_splits, M, BLOCK_D) float32 out: sums of p_ij k_j
    dot_ptr,  # (M,) float32 out: <q_i, positive_i>
    inv_norm_ptr,  # (M,) float32 out
    M,
    N,
    negatives_per_split,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One program: one query and one split of its negatives; the first split writes dot and inv_norm.  All float32."""
    i, pid_split = tl.program_id(0), tl.program_id(1)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    q_ptrs = q_ptr + i.to(tl.int64) * stride_qm + offs_d.to(tl.int64) * stride_qd
    q = tl.load(q_ptrs, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    inv_norm = inverse_norm(q, NORMALIZE)
    q *= inv_norm[:, None]
    offs_bank = offs_d.to(tl.int64)[None, :] * stride_bd

    positive_row = tl.load(positive_ptr + i.to(tl.int64) * stride_pm)
    positive_ptrs = bank_ptr + positive_row * stride_bs + offs_bank
    positive = tl.load(positive_ptrs, mask=mask_d[None, :], other=0.0).to(tl.float32)
    dot = tl.sum(q * positive, 1)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    stop = tl.minimum((pid_split + 1) * negatives_per_split, N)
    for first in range(pid_split * negatives_per_split, stop, BLOCK_N):
        mask_n = first + offs_n < stop
        row_ptrs = negative_ptr + i.to(tl.int64) * stride_nm + (first + offs_n).to(tl.int64) * stride_nn
        rows = tl.load(row_ptrs, mask=mask_n, other=0)
        k_ptrs = bank_ptr + rows[:, None] * stride_bs + offs_bank
        k = tl.load(k_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        x = tl.where(mask_n, tl.sum(k * q, 1) * scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, 0))
        p = tl.exp2(x - new_max)
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 0)
        acc = acc * alpha[:, None] + tl.sum(p[:, None] * k, 0)[None, :]
        row_max = new_max

    offs_one = tl.arange(0, 1)
    offs_stats = pid_split * M + i + offs_one
    tl.store(stats_ptr + offs_stats, row_max)
    tl.store(stats_ptr + tl.num_programs(1) * M + offs_stats, row_sum)
    tl.store(acc_ptr + offs_stats.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :], acc)
    tl.store(dot_ptr + i + offs_one, dot, mask=(pid_split == 0) & (offs_one == 0))
    tl.store(inv_norm_ptr + i + offs_one, inv_norm, mask=(pid_split == 0) & (offs_one == 0))


def forward(
    q: Tensor, bank: Tensor, positive: Tensor, negatives: Tensor, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to q in float32."""
    if negatives.ndim == 1:
        keys = bank[positive], bank[negatives]
        return loss_and_gradient(q, *keys, temperature, normalize, group=None, normalize_k=False)
    m, d = q.shape
    n = negatives.shape[1]
    block_d = next_power_of_2(d)
    block_n = max(8, 4096 // block_d)
    programs = cdiv(m, 4)  # 4 small programs count as 1
    num_splits, tiles_per_split = split_tiles(programs, max(cdiv(n, block_n), 1), q.device, programs_per_sm=2)
    f32 = {"dtype": torch.float32, "device": q.device}
    stats, acc = torch.empty((2, num_splits, m), **f32), torch.empty((num_splits, m, block_d), **f32)
    dot, inv_norm = torch.empty(m, **f32), torch.empty(m, **f32)
    gathered_kernel[(m, num_splits)](
        q,
        *q.stride(),
        bank,
        *bank.stride(),
        positive,
        positive.stride(0),
        negatives,
        *negatives.stride(),
        stats,
        acc,
        dot,
        inv_norm,
        m,
        n,
        tiles_per_split * block_n,
        1 / (math.log(2) * temperature),
        D=d,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        NORMALIZE=normalize,
    )
    partial = stats, acc, 0
    return combine(partial, q, inv_norm if normalize else None, bank[positive], dot, temperature, False)


gathered_op = torch.library.custom_op("fastssl::gathered_nce", forward, mutates_args=())


@gathered_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((), dtype=torch.float32), torch.empty(q.shape, dtype=torch.float32, device=q.device)


register_ready_gradient(gathered_op, num_inputs=6)


def gathered_nce(
    q: Tensor, bank: Tensor, positive: Tensor, negatives: Tensor, temperature: float, normalize: bool
) -> Tensor:
    return gathered_op(q, bank.detach(), positive, negatives, float(temperature), normalize)[0]
