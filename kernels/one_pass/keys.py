"""The pass over a matrix of keys: a queue, or the batch's own keys."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..collectives import Group, rank_world
from ..common import l2_normalize
from ..precision import input_precision, matmul_float32
from ..rows import normalize_rows
from ..tiling import MAX_D_IN_REGISTERS, Tiles, cdiv, compute_capability, needs_small_tiles, split_tiles
from .combine import combine

LOGIT_BYTES = 64 << 20  # of logits stored at a time where rows are too wide for one pass


@triton.jit(do_not_specialize=("M", "N", "rank_offset", "tiles_per_split"))
def one_pass_kernel(
    q_ptr,  # (M, D_PADDED) normalised, cast and padded
    k_ptr,  # (N, D), any float
    stride_kn,
    stride_kd,
    stats_ptr,  # (2, num_splits, M) float32 out: maxima and sums
    acc_ptr,  # (num_splits, M, D_PADDED) float32 out: sums of p_ij k_j
    M,
    N,
    rank_offset,
    tiles_per_split,
    scale,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P_SCALE_LOG2: tl.constexpr,
    SKIP_POSITIVE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: a block of queries against one split of the keys.

    SKIP_POSITIVE: key rank_offset + i is the positive of query i, which combine_kernel adds.
    """
    pid_m, pid_split = tl.program_id(0), tl.program_id(1)
    offs_m, offs_n, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    mask_m, mask_d = offs_m < M, (offs_d < D)[None, :]
    q_ptrs = q_ptr + offs_m.to(tl.int64)[:, None] * D_PADDED + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None], other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PADDED], tl.float32)

    offs_k = offs_n[:, None] * stride_kn + offs_d[None, :] * stride_kd  # 32 bits: 64 would cost registers
    for t in range(pid_split * tiles_per_split, tl.minimum((pid_split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))):
        mask_n = t * BLOCK_N + offs_n < N
        mask_k = mask_n[:, None] if D == D_PADDED else mask_n[:, None] & mask_d
        k_ptrs = k_ptr + tl.cast(t, tl.int64) * (BLOCK_N * stride_kn) + offs_k
        k = tl.load(k_ptrs, mask=mask_k, other=0.0).to(q.dtype)
        x = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scale
        if (t + 1) * BLOCK_N > N:
            x = tl.where(mask_n[None, :], x, float("-inf"))
        if SKIP_POSITIVE:
            x = tl.where((rank_offset + offs_m)[:, None] == (t * BLOCK_N + offs_n)[None, :], float("-inf"), x)
        new_max = tl.maximum(row_max, tl.max(x, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row whose only key so far is its positive
        p = tl.exp2(x - (finite_max - P_SCALE_LOG2)[:, None])
        alpha = tl.exp2(row_max - finite_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None], input_precision=INPUT_PRECISION)
        row_max = new_max

    offs_stats = pid_split * M + offs_m
    tl.store(stats_ptr + offs_stats, row_max, mask=mask_m)
    tl.store(stats_ptr + tl.num_programs(1) * M + offs_stats, row_sum, mask=mask_m)
    tl.store(acc_ptr + offs_stats.to(tl.int64)[:, None] * D_PADDED + offs_d[None, :], acc, mask=mask_m[:, None])


def one_pass_tiles(width: int, same_dtype: bool, full_width: bool, device: torch.device) -> Tiles:
    """Tiles for two programs on a multiprocessor if the registers suffice, so that exponentials of one overlap with
    products of the other.  Casts of keys, and masks of their width (not `full_width`), need more registers."""
    if needs_small_tiles(device):
        if width <= 128:
            return Tiles(128, 32, width, 8, 3)
        return Tiles(128, 32 if same_dtype else 16, width, 8, 2)  # 32 float32 keys take 105 KB, and some GPUs have 99
    if compute_capability(device) // 10 == 9 and same_dtype and full_width:
        # by bench/tiles.py on an H200: 8 and 16 % shorter
        return Tiles(64, 128, width, 4, 2, programs_per_sm=2) if width <= 128 else Tiles(128, 64, width, 8, 3)
    return Tiles(128, 64, width, 8, 2)


def loss_and_gradient(
    q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: Group, normalize_k: bool
) -> tuple[Tensor, Tensor]:
    """InfoNCE of q (M, D) with positives k (M, D), and its gradient with respect to q in float32.

    The negatives are the rows of the queue (K, D), or without one all other rows of k on the ranks of `group`.
    (In half precision the gradient could underflow before the loss scale is applied.)
    """
    m, d = q.shape
    rank, world = rank_world(group)
    u, inv_norm, dot = normalize_rows(q, normalize, None, k, normalize_k)
    width = u.shape[1]
    if queue is None:
        keys, n, rank_offset = normalize_rows(k, normalize, group)[0], m * world, rank * m
    else:
        keys, n, rank_offset = queue, queue.shape[0], None
    if width > MAX_D_IN_REGISTERS or u.dtype.itemsize == 4:
        if queue is not None:
            keys = torch.nn.functional.pad(queue.to(u.dtype), (0, width - d))
        positive = torch.nn.functional.pad(l2_normalize(k) if normalize_k else k, (0, width - d))
        return _by_matmuls(
            q, u[:m], inv_norm if normalize else None, (positive, dot), keys[:n], rank_offset, temperature
        )

    tiles = one_pass_tiles(width, keys.dtype == u.dtype, keys.shape[1] == width, q.device)
    if tiles.block_n * keys.stride(0) + width * keys.stride(1) >= 2**31:
        keys = keys.contiguous()
    programs = cdiv(m, tiles.block_m)
    num_splits, tiles_per_split = split_tiles(programs, max(cdiv(n, tiles.block_n), 1), q.device, tiles.programs_per_sm)
    stats = torch.empty((2, num_splits, m), dtype=torch.float32, device=q.device)
    acc = torch.empty((num_splits, m, width), dtype=torch.float32, device=q.device)
    p_scale_log2 = 14 if u.dtype == torch.float16 else 0
    one_pass_kernel[(programs, num_splits)](
        u,
        keys,
        *keys.stride(),
        stats,
        acc,
        m,
        n,
        rank_offset or 0,
        tiles_per_split,
        1 / (math.log(2) * temperature),
        D=keys.shape[1],
        D_PADDED=width,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        P_SCALE_LOG2=p_scale_log2,
        SKIP_POSITIVE=rank_offset is not None,
        INPUT_PRECISION=input_precision(),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.maxnreg,
    )
    partial = stats, acc, p_scale_log2
    return combine(partial, q, inv_norm if normalize else None, k, dot, temperature, normalize_k)


def _by_matmuls(
    q: Tensor,
    u: Tensor,
    inv_norm: Tensor | None,
    positives: tuple[Tensor, Tensor],
    keys: Tensor,
    rank_offset: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """loss_and_gradient by matmuls over blocks of queries, for rows too wide for the tiles and for float32."""
    positive, dot = positives
    m, d = q.shape
    total = torch.zeros((), device=q.device)
    dq = torch.empty((m, d), dtype=torch.float32, device=q.device)
    block = max(1, min(m, LOGIT_BYTES // (4 * max(keys.shape[0], 1))))
    for first in range(0, m, block):
        rows = slice(first, first + block)
        y, y_dot = positive[rows].float(), dot[rows, None] / temperature
        logits = matmul_float32(u[rows], keys.T) / temperature
        if rank_offset is not None:
            logits.diagonal(rank_offset + first).fill_(-torch.inf)
        lse = torch.cat([logits, y_dot], 1).logsumexp(1, keepdim=True)
        total += (lse - y_dot).sum()
        p = logits.sub_(lse).exp_()
        g = matmul_float32((p * 2.0**14).to(keys.dtype), keys) * 2.0**-14 - p.sum(1, keepdim=True) * y
        g = g[:, :d]
        if inv_norm is not None:
            direction = q[rows].float() * inv_norm[rows, None]
            g = (g - direction * (direction * g).sum(1, keepdim=True)) * inv_norm[rows, None]
        dq[rows] = g / (m * temperature)
    return total / m, dq
