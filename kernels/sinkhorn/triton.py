"""Sinkhorn by scaling vectors: each half iteration reads the logits once, and no other (B, K) matrix is stored.

Sums are kept as a running maximum and a sum relative to it, so logits of any range are exact.  Not measured yet.
"""

import math

import torch
import torch.distributed as td
import triton
import triton.language as tl
from torch import Tensor

from ..collectives import Group, all_reduce, group_from_name, group_name
from ..tiling import cdiv, split_tiles
from ..wide_rows import GROUP, alignment, assume_multiple, grouped_columns, row_block, update_max

# tile of a column pass: a thread has whole columns of it, so their sums need no exchange between threads
BLOCK_B, BLOCK_K = 8, 1024
SIZES = ("B", "K", "stride_xb", "rows_per_split", "num_splits")  # one build for all sizes of the same alignment


@triton.jit(do_not_specialize=SIZES)
def column_kernel(
    x_ptr,  # (B, K) logits, any float
    stride_xb,
    stride_xk,
    row_ptr,  # (B,) float32, not read if FIRST
    stats_ptr,  # (2, num_splits, K) float32 out: maxima and sums
    B,
    K,
    rows_per_split,
    scale,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Over one split of the rows: the maximum of scale x + row, and the sum of 2^(scale x + row - maximum)."""
    K, stride_xb = assume_multiple(K, ALIGN), assume_multiple(stride_xb, ALIGN)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    pid_split = tl.program_id(1)
    mask_k = offs_k < K
    column_max = tl.full([BLOCK_K], float("-inf"), tl.float32)
    column_sum = tl.zeros([BLOCK_K], tl.float32)
    stop = tl.minimum((pid_split + 1) * rows_per_split, B)
    for first in range(pid_split * rows_per_split, stop, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask_b = offs_b < stop
        ptrs = x_ptr + offs_b.to(tl.int64)[:, None] * stride_xb + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(ptrs, mask=mask_b[:, None] & mask_k[None, :], other=0.0).to(tl.float32) * scale
        if not FIRST:
            x += tl.load(row_ptr + offs_b, mask=mask_b, other=0.0)[:, None]
        x = tl.where(mask_b[:, None], x, float("-inf"))
        new_max = tl.maximum(column_max, tl.max(x, 0))
        column_sum = column_sum * tl.exp2(column_max - new_max) + tl.sum(tl.exp2(x - new_max[None, :]), 0)
        column_max = new_max
    tl.store(stats_ptr + pid_split * K + offs_k, column_max, mask=mask_k)
    tl.store(stats_ptr + (tl.num_programs(1) + pid_split) * K + offs_k, column_sum, mask=mask_k)


@triton.jit(do_not_specialize=SIZES)
def column_end_kernel(
    stats_ptr,  # (2, num_splits, K) float32
    max_ptr,  # (K,) float32 out, unless LOG
    column_ptr,  # (K,) float32 out: LOG: maximum + log2 of the sum; else the sum, for other ranks to add to
    K,
    num_splits,
    BLOCK_K: tl.constexpr,
    LOG: tl.constexpr,
):
    """Combines the splits."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    column_max = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for s in range(0, num_splits):
        column_max = tl.maximum(column_max, tl.load(stats_ptr + s * K + offs_k, mask=mask_k, other=0.0))
    column_sum = tl.zeros([BLOCK_K], tl.float32)
    for s in range(0, num_splits):
        split_max = tl.load(stats_ptr + s * K + offs_k, mask=mask_k, other=0.0)
        alpha = tl.exp2(split_max - column_max)
        column_sum += alpha * tl.load(stats_ptr + (num_splits + s) * K + offs_k, mask=mask_k, other=1.0)
    if LOG:
        tl.store(column_ptr + offs_k, column_max + tl.log2(column_sum), mask=mask_k)
    else:
        tl.store(max_ptr + offs_k, column_max, mask=mask_k)
        tl.store(column_ptr + offs_k, column_sum, mask=mask_k)


@triton.jit(do_not_specialize=SIZES)
def row_kernel(
    x_ptr,  # (B, K) logits, any float
    stride_xb,
    stride_xk,
    column_ptr,  # (K,) float32
    row_ptr,  # (B,) float32 out, unless WRITE: -log2 sum_k 2^(scale x - column_scale column)
    out_ptr,  # (B, K) float32 out, if WRITE: the softmax of each row
    K,
    scale,
    column_scale,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    WRITE: tl.constexpr,
):
    K, stride_xb = assume_multiple(K, ALIGN), assume_multiple(stride_xb, ALIGN)
    i = tl.program_id(0)
    x_ptr += i.to(tl.int64) * stride_xb
    group_max = tl.full([BLOCK_K // GROUP], float("-inf"), tl.float32)
    group_sum = tl.zeros([BLOCK_K // GROUP], tl.float32)
    for first in range(0, K, BLOCK_K):
        offs_k = grouped_columns(first, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_k.to(tl.int64) * stride_xk, mask=mask_k, other=0.0).to(tl.float32) * scale
        column = tl.load(column_ptr + offs_k, mask=mask_k, other=0.0) * column_scale
        x = tl.where(mask_k, x - column, float("-inf"))
        group_max, finite_max, alpha = update_max(group_max, x, 1.0)
        group_sum = group_sum * alpha + tl.sum(tl.exp2(x - finite_max), 1)
    row_max = tl.max(group_max, 0)
    lse = row_max + tl.log2(tl.sum(group_sum * tl.exp2(group_max - row_max), 0))
    if WRITE:
        out_ptr += i.to(tl.int64) * K
        for first in range(0, K, BLOCK_K):
            offs_k = grouped_columns(first, BLOCK_K)
            mask_k = offs_k < K
            x = tl.load(x_ptr + offs_k.to(tl.int64) * stride_xk, mask=mask_k, other=0.0).to(tl.float32) * scale
            x -= tl.load(column_ptr + offs_k, mask=mask_k, other=0.0) * column_scale
            tl.store(out_ptr + offs_k, tl.exp2(x - lse), mask=mask_k)
    else:
        tl.store(row_ptr + i, -lse)


def center(logits: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    b, k = logits.shape
    if logits.stride(1) != 1:  # a tile of scattered columns would not fit into registers
        logits = logits.contiguous()
    scale, align = 1 / (math.log(2) * epsilon), alignment(k, logits)
    f32 = {"dtype": torch.float32, "device": logits.device}
    row, column, column_max = torch.empty(b, **f32), torch.empty(k, **f32), torch.empty(k, **f32)
    programs = cdiv(k, BLOCK_K)
    num_splits, tiles_per_split = split_tiles(programs, max(cdiv(b, BLOCK_B), 1), logits.device, programs_per_sm=2)
    stats = torch.empty((2, num_splits, k), **f32)
    for i in range(iterations):
        column_kernel[(programs, num_splits)](
            logits,
            *logits.stride(),
            row,
            stats,
            b,
            k,
            tiles_per_split * BLOCK_B,
            scale,
            BLOCK_B=BLOCK_B,
            BLOCK_K=BLOCK_K,
            ALIGN=align,
            FIRST=i == 0,
        )
        column_end_kernel[(cdiv(k, 1024),)](stats, column_max, column, k, num_splits, BLOCK_K=1024, LOG=group is None)
        if group is not None:
            own_max = column_max.clone()
            all_reduce(column_max, group, td.ReduceOp.MAX)
            column = column_max + all_reduce(column * torch.exp2(own_max - column_max), group).log2()
        if i < iterations - 1:  # the last scaling of the rows is the softmax that uses the center
            row_kernel[(b,)](
                logits,
                *logits.stride(),
                column,
                row,
                row,
                k,
                scale,
                1.0,
                BLOCK_K=row_block(k),
                ALIGN=align,
                WRITE=False,
            )
    return column / scale


def assignments(logits: Tensor, center: Tensor, epsilon: float) -> Tensor:
    b, k = logits.shape
    scale = 1 / (math.log(2) * epsilon)
    out = torch.empty((b, k), dtype=torch.float32, device=logits.device)
    row_kernel[(b,)](
        logits,
        *logits.stride(),
        center,
        out,
        out,
        k,
        scale,
        scale,
        BLOCK_K=row_block(k),
        ALIGN=alignment(k, logits),
        WRITE=True,
    )
    return out


@torch.library.custom_op("fastssl::sinkhorn_center", mutates_args=())
def center_op(logits: Tensor, epsilon: float, iterations: int, group: str) -> Tensor:
    return center(logits, epsilon, iterations, group_from_name(group))


@center_op.register_fake
def _(logits: Tensor, epsilon: float, iterations: int, group: str) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


assign_op = torch.library.custom_op("fastssl::sinkhorn_assign", assignments, mutates_args=())


@assign_op.register_fake
def _(logits: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


def sinkhorn_center(logits: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    return center_op(logits.detach(), float(epsilon), iterations, group_name(group))


def assign(logits: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return assign_op(logits.detach(), center, float(epsilon))
