"""The first pass: the sum of exponentials of each row, its loss, and its weight w in the gradient."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..collectives import gather
from ..precision import input_precision
from ..tiling import cdiv, split_tiles
from .spec import LossSpec, RankRows, row_sums_tiles
from .tile import is_positive, load_if_labels, needs_mask, same_class, similarity_tile, valid_entries

LOSS_BLOCK = 256  # rows whose losses one program adds


# one build for all sizes
@triton.jit(do_not_specialize=("M", "N", "positive_offset", "rank_offset", "tiles_per_split"))
def row_sums_kernel(
    u_ptr,  # (M, D)
    v_ptr,  # (N_PADDED, D)
    class_ptr,  # (N_PADDED,) int32, if LABELS
    stats_ptr,  # (3, num_splits, M) out: sums of the exponentials, sums of the positives' scale s, ONLINE: maxima
    M,
    N,
    positive_offset,
    rank_offset,
    tiles_per_split,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """One program: a block of rows against one split of the columns.

    The logits of the positives come from the same product as the sum, so that the truncation errors of tensor cores
    cancel in the loss (docs/kernels.md).
    """
    pid_m, pid_split = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    u_ptr += pid_m.to(tl.int64) * BLOCK_M * D
    u = offs_m  # placeholder where the block of rows is read chunk by chunk
    if BLOCK_K == D:
        offs_u = tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, D)[None, :]
        u = tl.load(u_ptr + offs_u, mask=mask_m[:, None], other=0.0)
    row_class = load_if_labels(class_ptr, rank_offset, offs_m, mask_m, LABELS)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    positive_sum = tl.zeros([BLOCK_M], tl.float32)

    for t in range(pid_split * tiles_per_split, tl.minimum((pid_split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))):
        offs_n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        v_tile_ptr = v_ptr + tl.cast(t, tl.int64) * BLOCK_N * D
        s = similarity_tile(u, u_ptr, v_tile_ptr, mask_m, D, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION)
        x = s * scale
        if LABELS:
            positive = same_class(row_class, class_ptr, offs_n)
            if needs_mask(t, pid_m, N, positive_offset, rank_offset, BLOCK_M, BLOCK_N, EXCLUDE_SELF, False):
                valid = valid_entries(offs_m, offs_n, N, rank_offset, EXCLUDE_SELF)
                positive_sum += tl.sum(tl.where(positive & valid, x, 0.0), 1)
                x = tl.where(valid, x, float("-inf"))
            else:
                positive_sum += tl.sum(tl.where(positive, x, 0.0), 1)
            if DECOUPLED:
                x = tl.where(positive, float("-inf"), x)
        else:
            if needs_mask(t, pid_m, N, positive_offset, rank_offset, BLOCK_M, BLOCK_N, EXCLUDE_SELF, True):
                summed = valid_entries(offs_m, offs_n, N, rank_offset, EXCLUDE_SELF)
                positive = is_positive(offs_m, offs_n, M, positive_offset, rank_offset)
                positive_sum += tl.sum(tl.where(positive, x, 0.0), 1)
                if DECOUPLED:
                    summed = summed & (positive == 0)
                x = tl.where(summed, x, float("-inf"))
        if ONLINE:
            new_max = tl.maximum(row_max, tl.max(x, 1))
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            row_sum = row_sum * tl.exp2(row_max - finite_max) + tl.sum(tl.exp2(x - finite_max[:, None]), 1)
            row_max = new_max
        else:
            row_sum += tl.sum(tl.exp2(x), 1)

    plane = tl.num_programs(1) * M
    stats_ptr += pid_split * M + offs_m
    tl.store(stats_ptr, row_sum, mask=mask_m)
    tl.store(stats_ptr + plane, positive_sum, mask=mask_m)
    if ONLINE:
        tl.store(stats_ptr + 2 * plane, row_max, mask=mask_m)


@triton.jit(do_not_specialize=("M", "num_splits", "rank_offset"))
def row_losses_kernel(
    stats_ptr,  # (3, num_splits, M), as row_sums_kernel writes them
    class_ptr,  # (N_PADDED,) int32, if LABELS
    count_ptr,  # (num_slots,) int32, if LABELS: rows of each class
    w_ptr,  # (M,) out: 1 / row sum, ONLINE: log2 of the row sum; 0 (ONLINE: inf) for a row without loss
    inv_positives_ptr,  # (M,) out, if LABELS: 1 / number of positives of the row, 0 for a row without loss
    loss_ptr,  # (cdiv(M, BLOCK_M),) out: each block's sum of the rows' losses, as log2, times factor
    M,
    num_splits,
    rank_offset,
    factor,
    BLOCK_M: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    plane = num_splits * M
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    positive = tl.zeros([BLOCK_M], tl.float32)
    if ONLINE:
        for s in range(0, num_splits):
            row_max = tl.maximum(row_max, tl.load(stats_ptr + 2 * plane + s * M + offs_m, mask=mask_m, other=0.0))
    for s in range(0, num_splits):
        split_ptr = stats_ptr + s * M + offs_m
        split_sum = tl.load(split_ptr, mask=mask_m, other=1.0)
        if ONLINE:
            split_max = tl.load(split_ptr + 2 * plane, mask=mask_m, other=0.0)
            split_sum *= tl.where(split_max == float("-inf"), 0.0, tl.exp2(split_max - row_max))
        row_sum += split_sum
        positive += tl.load(split_ptr + plane, mask=mask_m, other=0.0)

    active = (row_sum > 0) | (row_sum != row_sum)  # NaN must propagate to the loss
    if LABELS:
        row_class = tl.load(class_ptr + rank_offset + offs_m, mask=mask_m, other=0)
        num_positives = tl.load(count_ptr + row_class, mask=mask_m, other=0).to(tl.float32) - 1.0  # without itself
        active = active & (num_positives > 0)
        positive = positive / tl.maximum(num_positives, 1.0)
        inv_positives = tl.where(active, 1.0 / tl.maximum(num_positives, 1.0), 0.0)
        tl.store(inv_positives_ptr + offs_m, inv_positives, mask=mask_m)
    lse = tl.log2(tl.where(active, row_sum, 1.0))
    if ONLINE:
        lse += tl.where(active, row_max, 0.0)
        tl.store(w_ptr + offs_m, tl.where(active, lse, float("inf")), mask=mask_m)
    else:
        tl.store(w_ptr + offs_m, tl.where(active, 1.0 / tl.where(active, row_sum, 1.0), 0.0), mask=mask_m)
    block_loss = tl.sum(tl.where(active & mask_m, lse - positive, 0.0), 0)
    tl.store(loss_ptr + tl.program_id(0), block_loss * factor)


def loss_parts(num_sides: int, m: int, device: torch.device) -> Tensor:
    """Memory for the sums that row_losses writes; their sum is the loss."""
    return torch.empty((num_sides, cdiv(m, LOSS_BLOCK)), dtype=torch.float32, device=device)


def row_losses(
    u: Tensor,
    v: Tensor,
    rows: RankRows,
    labels: tuple[Tensor, Tensor] | None,
    spec: LossSpec,
    loss: Tensor,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """The weights w of the rows of all ranks, and 1 / number of positives of this rank's rows (empty without labels).

    u (M or more, D): this rank's rows, v (N_PADDED, D).  labels: classes (N_PADDED,) and their counts.  Sums of this
    rank's row losses times factor are written to `loss`, one row of loss_parts().  w is as long as v, since tiles read
    it without a mask; values past row N are never used.
    """
    m, n, offset, group = rows
    classes, count = labels or (None, None)
    has_labels = labels is not None
    tiles = row_sums_tiles(v.shape[1], v.dtype, has_labels, spec.decoupled, v.device)
    programs = cdiv(m, tiles.block_m)
    num_splits, tiles_per_split = split_tiles(programs, cdiv(n, tiles.block_n), v.device, tiles.programs_per_sm)
    stats = torch.empty((3 if spec.online else 2, num_splits, m), dtype=torch.float32, device=v.device)
    row_sums_kernel[(programs, num_splits)](
        u,
        v,
        classes,
        stats,
        m,
        n,
        spec.positive_offset,
        offset,
        tiles_per_split,
        spec.scale,
        D=v.shape[1],
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        INPUT_PRECISION=input_precision(),
        EXCLUDE_SELF=spec.exclude_self,
        DECOUPLED=spec.decoupled,
        LABELS=has_labels,
        ONLINE=spec.online,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.maxnreg,
    )
    w = torch.empty(v.shape[0] if group is None else m, dtype=torch.float32, device=v.device)
    inv_positives = torch.empty(m if has_labels else 0, dtype=torch.float32, device=v.device)
    row_losses_kernel[(len(loss),)](
        stats,
        classes,
        count,
        w,
        inv_positives,
        loss,
        m,
        num_splits,
        offset,
        factor * math.log(2),
        BLOCK_M=LOSS_BLOCK,
        LABELS=has_labels,
        ONLINE=spec.online,
    )
    return gather(w, group, padded_rows=v.shape[0]), inv_positives
