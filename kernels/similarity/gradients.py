"""The second pass: the gradient of each row, which the program of its block of rows computes completely."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import input_precision, matmul_float32
from ..rows import normalize_rows_backward_kernel
from ..tiling import MAX_D_IN_REGISTERS, cdiv, next_power_of_2, split_tiles
from .spec import LossSpec, RankRows, Side, gradient_tiles, row_sums_tiles
from .tile import load_rows, logit_gradient_tile, similarity_tile

MIN_WORKSPACE = 16 << 20  # bytes of logit gradients stored at a time for wide rows, or half of v if that is more
SIZES = ("M", "N", "positive_offset", "rank_offset", "tiles_per_split", "first_row")  # one build for all sizes


@triton.jit(do_not_specialize=SIZES)
def row_gradients_kernel(
    u_ptr,  # (M, D)
    v_ptr,  # (N_PADDED, D)
    class_ptr,  # (N_PADDED,) int32, if LABELS
    w_row_ptr,  # (M,) float32
    w_col_ptr,  # (N_PADDED,) float32
    inv_positives_ptr,  # (M,) float32, if LABELS
    acc_ptr,  # (num_splits, M, D) float32 out
    M,
    N,
    positive_offset,
    rank_offset,
    tiles_per_split,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GRAD_SCALE_LOG2: tl.constexpr,
    POSITIVE_GRAD: tl.constexpr,
):
    pid_m, pid_split = tl.program_id(0), tl.program_id(1)
    offs_m, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    mask_m = offs_m < M
    offs_u = tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :]
    offs_v = tl.arange(0, BLOCK_N)[:, None] * D + offs_d[None, :]
    u = tl.load(u_ptr + pid_m.to(tl.int64) * BLOCK_M * D + offs_u, mask=mask_m[:, None], other=0.0)
    row_ptrs, columns = (w_row_ptr, inv_positives_ptr), (w_col_ptr, class_ptr)
    sizes = (M, N, positive_offset, rank_offset)
    rows = load_rows(pid_m, offs_m, mask_m, row_ptrs, class_ptr, rank_offset, LABELS, ONLINE, GRAD_SCALE_LOG2)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for t in range(pid_split * tiles_per_split, tl.minimum((pid_split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))):
        v = tl.load(v_ptr + tl.cast(t, tl.int64) * BLOCK_N * D + offs_v)
        s = tl.dot(u, tl.trans(v), input_precision=INPUT_PRECISION)
        g = logit_gradient_tile(
            s, t, rows, columns, sizes, scale, EXCLUDE_SELF, DECOUPLED, LABELS, ONLINE, GRAD_SCALE_LOG2, POSITIVE_GRAD
        )
        acc = tl.dot(g.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    tl.store(acc_ptr + (pid_split.to(tl.int64) * M + pid_m * BLOCK_M) * D + offs_u, acc, mask=mask_m[:, None])


@triton.jit(do_not_specialize=SIZES)
def logit_gradients_kernel(
    u_ptr,  # (M, D)
    v_ptr,  # (N_PADDED, D)
    class_ptr,  # (N_PADDED,) int32, if LABELS
    w_row_ptr,  # (M,) float32
    w_col_ptr,  # (N_PADDED,) float32
    inv_positives_ptr,  # (M,) float32, if LABELS
    g_ptr,  # (rows of the chunk, N_PADDED) out, in the tiles' dtype
    first_row,
    M,
    N,
    N_PADDED,
    positive_offset,
    rank_offset,
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
    GRAD_SCALE_LOG2: tl.constexpr,
    POSITIVE_GRAD: tl.constexpr,
):
    """For rows too wide for registers: gradients of the logits of the rows from first_row on, as input of a matmul."""
    pid_chunk, t = tl.program_id(0), tl.program_id(1)
    pid_m = first_row // BLOCK_M + pid_chunk
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    u_ptr += pid_m.to(tl.int64) * BLOCK_M * D
    row_ptrs, columns = (w_row_ptr, inv_positives_ptr), (w_col_ptr, class_ptr)
    sizes = (M, N, positive_offset, rank_offset)
    rows = load_rows(pid_m, offs_m, mask_m, row_ptrs, class_ptr, rank_offset, LABELS, ONLINE, GRAD_SCALE_LOG2)
    v_tile_ptr = v_ptr + t.to(tl.int64) * BLOCK_N * D
    s = similarity_tile(offs_m, u_ptr, v_tile_ptr, mask_m, D, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION)
    g = logit_gradient_tile(
        s, t, rows, columns, sizes, scale, EXCLUDE_SELF, DECOUPLED, LABELS, ONLINE, GRAD_SCALE_LOG2, POSITIVE_GRAD
    )
    offs_chunk = (pid_chunk * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    g_ptr += offs_chunk[:, None] * N_PADDED + (t * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    tl.store(g_ptr, g.to(g_ptr.dtype.element_ty))


def row_gradients(
    grad: Tensor,
    x: Tensor,
    side: Side,
    other: Side,
    rows: RankRows,
    labels: tuple[Tensor, Tensor] | None,
    spec: LossSpec,
    factor: float,
) -> Tensor:
    """The gradient with respect to x (M, D), this rank's rows of `side` against all rows of `other`, times factor and
    grad.  labels: classes (N_PADDED,) and 1 / number of positives (M,)."""
    m, n, offset, _ = rows
    v, width, device = other.v, other.v.shape[1], other.v.device
    classes, inv_positives = labels or (None, None)
    inputs = (side.v[rows.own], v, classes, side.w[rows.own], other.w, inv_positives)
    grad_scale_log2 = 13 if v.dtype == torch.float16 else 0  # a logit's gradient is in [-2, 2]: use float16's range
    flags = {
        "INPUT_PRECISION": input_precision(),
        "EXCLUDE_SELF": spec.exclude_self,
        "DECOUPLED": spec.decoupled,
        "LABELS": labels is not None,
        "ONLINE": spec.online,
        "GRAD_SCALE_LOG2": grad_scale_log2,
        "POSITIVE_GRAD": 0.0 if spec.decoupled and n == 2 else 2.0,  # of two rows, decoupled, every sum is empty
    }
    out = torch.empty(x.shape, dtype=x.dtype, device=device)

    def finish(acc: Tensor, first_row: int) -> None:
        """Write the rows of `out` from first_row on.  acc: (num_splits, chunk_rows, D_PADDED)."""
        num_splits, chunk_rows, _ = acc.shape
        block_d = next_power_of_2(width)
        block_m = max(1, 2048 // block_d)
        normalize_rows_backward_kernel[(cdiv(chunk_rows, block_m),)](
            acc,
            x,
            *x.stride(),
            side.inv_norm,
            grad,
            out,
            m,
            chunk_rows,
            first_row,
            num_splits,
            factor,
            D=x.shape[1],
            D_PADDED=width,
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            NORMALIZE=spec.normalize,
            SCALE=2.0**-grad_scale_log2,
        )

    if width <= MAX_D_IN_REGISTERS and v.dtype.itemsize == 2:
        tiles = gradient_tiles(width, labels is not None, device)
        programs = cdiv(m, tiles.block_m)
        num_splits, tiles_per_split = split_tiles(programs, cdiv(n, tiles.block_n), device, tiles.programs_per_sm)
        acc = torch.empty((num_splits, m, width), dtype=torch.float32, device=device)
        row_gradients_kernel[(programs, num_splits)](
            *inputs,
            acc,
            m,
            n,
            spec.positive_offset,
            offset,
            tiles_per_split,
            spec.scale,
            D=width,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            **flags,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.maxnreg,
        )
        finish(acc, 0)
        return out

    tiles = row_sums_tiles(max(width, MAX_D_IN_REGISTERS + 1), v.dtype, labels is not None, spec.decoupled, device)
    n_padded = v.shape[0]
    budget = max(MIN_WORKSPACE, v.nbytes // 2) // (n_padded * v.dtype.itemsize)
    chunk = min(max(budget // tiles.block_m, 1), cdiv(m, tiles.block_m)) * tiles.block_m
    g = torch.empty((chunk, n_padded), dtype=v.dtype, device=device)
    for first_row in range(0, m, chunk):
        logit_gradients_kernel[(chunk // tiles.block_m, n_padded // tiles.block_n)](
            *inputs,
            g,
            first_row,
            m,
            n,
            n_padded,
            spec.positive_offset,
            offset,
            spec.scale,
            D=width,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k if width % tiles.block_k == 0 else 16,
            **flags,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        finish(matmul_float32(g, v)[None], first_row)
    return out
