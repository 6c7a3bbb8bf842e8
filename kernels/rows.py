"""Normalisation of rows in kernels: a pass that normalises, casts and pads a matrix of rows for the tiled passes, and a
pass that applies the gradient of the normalisation to their result."""

import torch
import torch.distributed as td
import triton
import triton.language as tl
from torch import Tensor

from .collectives import Group
from .precision import tile_dtype
from .tiling import ROW_PADDING, cdiv, next_power_of_2, padded_width


@triton.jit
def load_rows(x_ptr, stride_m, stride_d, offs_m, offs_d, mask_m, D: tl.constexpr):
    """(BLOCK_M, BLOCK_D) of x (M, D) in float32, zeros outside."""
    ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_d.to(tl.int64)[None, :] * stride_d
    return tl.load(ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x, NORMALIZE: tl.constexpr):
    """1 / |row| of each row of x, 0 for a zero row; all 1 without NORMALIZE."""
    square = tl.sum(x * x, 1)
    inv = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    if not NORMALIZE:
        inv = tl.full(inv.shape, 1.0, tl.float32)
    return inv


@triton.jit(do_not_specialize=("M", "M_PADDED"))
def normalize_rows_kernel(
    x_ptr,  # (M, D), any float
    stride_xm,
    stride_xd,
    y_ptr,  # (M, D), any float, read if DOT
    stride_ym,
    stride_yd,
    u_ptr,  # (M_PADDED, D_PADDED) out: rows of x at unit length in the tiles' dtype, padded with zeros
    inv_norm_ptr,  # (M,) float32 out: 1 / |x_i|
    dot_ptr,  # (M,) float32 out if DOT: <x_i, y_i> of the normalised rows before the cast
    M,
    M_PADDED,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
    NORMALIZE_Y: tl.constexpr,
):
    offs_m, offs_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    x = load_rows(x_ptr, stride_xm, stride_xd, offs_m, offs_d, mask_m, D)
    inv_norm = inverse_norm(x, NORMALIZE)
    u = (x * inv_norm[:, None]).to(u_ptr.dtype.element_ty)
    tl.store(
        u_ptr + offs_m.to(tl.int64)[:, None] * D_PADDED + offs_d[None, :],
        u,
        mask=(offs_m < M_PADDED)[:, None] & (offs_d < D_PADDED)[None, :],
    )
    tl.store(inv_norm_ptr + offs_m, inv_norm, mask=mask_m)
    if DOT:
        y = load_rows(y_ptr, stride_ym, stride_yd, offs_m, offs_d, mask_m, D)
        x, y = x * inv_norm[:, None], y * inverse_norm(y, NORMALIZE_Y)[:, None]
        tl.store(dot_ptr + offs_m, tl.sum(x * y, 1), mask=mask_m)


@triton.jit(do_not_specialize=("M", "chunk_rows", "first_row", "num_splits"))
def normalize_rows_backward_kernel(
    acc_ptr,  # (num_splits, chunk_rows, D_PADDED) float32; row 0 is row first_row of x
    x_ptr,  # (M, D), any float
    stride_xm,
    stride_xd,
    inv_norm_ptr,  # (M,) float32
    grad_ptr,  # () incoming gradient of the loss
    out_ptr,  # (M, D) out
    M,
    chunk_rows,
    first_row,
    num_splits,
    factor,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Adds the splits of acc, times SCALE, and applies the gradient of the normalisation, times factor and grad."""
    offs_chunk, offs_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offs_m = first_row + offs_chunk
    mask_m = (offs_chunk < chunk_rows) & (offs_m < M)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_ptr += offs_chunk.to(tl.int64)[:, None] * D_PADDED + offs_d[None, :]
    for _ in range(0, num_splits):
        acc += tl.load(acc_ptr, mask=mask, other=0.0)
        acc_ptr += chunk_rows.to(tl.int64) * D_PADDED
    acc *= SCALE
    if NORMALIZE:
        inv_norm = tl.load(inv_norm_ptr + offs_m, mask=mask_m, other=0.0)
        u = load_rows(x_ptr, stride_xm, stride_xd, offs_m, offs_d, mask_m, D) * inv_norm[:, None]
        acc = (acc - u * tl.sum(u * acc, 1)[:, None]) * inv_norm[:, None]
    acc *= factor * tl.load(grad_ptr).to(tl.float32)
    tl.store(out_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def normalize_rows(
    x: Tensor, normalize: bool, group: Group, y: Tensor | None = None, normalize_y: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x (M, D), at unit length if `normalize`, cast to the tiles' dtype and padded with zeros.

    Returns v (ROW_PADDING-multiple of the rows of all ranks of `group`, padded width), the inverse norms of x (M,), and
    the products <x_i, y_i> (M,) of the normalised rows before the cast (empty without y).
    """
    m, d = x.shape
    dtype = tile_dtype(x.dtype, normalize)
    width = padded_width(d, dtype)
    world = 1 if group is None else td.get_world_size(group)
    v = torch.empty((cdiv(m * world, ROW_PADDING) * ROW_PADDING, width), dtype=dtype, device=x.device)
    u = v if world == 1 else torch.empty((m, width), dtype=dtype, device=x.device)
    inv_norm = torch.empty(m, dtype=torch.float32, device=x.device)
    dot = torch.empty(m if y is not None else 0, dtype=torch.float32, device=x.device)
    block_d = next_power_of_2(width)
    block_m = max(1, 4096 // block_d)
    other = x if y is None else y
    normalize_rows_kernel[(cdiv(u.shape[0], block_m),)](
        x,
        *x.stride(),
        other,
        *other.stride(),
        u,
        inv_norm,
        dot,
        m,
        u.shape[0],
        D=d,
        D_PADDED=width,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        NORMALIZE=normalize,
        DOT=y is not None,
        NORMALIZE_Y=normalize_y,
    )
    if world > 1:
        td.all_gather_into_tensor(v[: m * world], u, group=group)
        v[m * world :].zero_()
    return v, inv_norm, dot


def fake_normalized_rows(x: Tensor, normalize: bool, world: int) -> tuple[Tensor, Tensor]:
    """normalize_rows' v and inverse norms for torch.library's fake implementations: only shapes and dtypes."""
    dtype = tile_dtype(x.dtype, normalize)
    rows = cdiv(x.shape[0] * world, ROW_PADDING) * ROW_PADDING
    v = x.new_empty((rows, padded_width(x.shape[1], dtype)), dtype=dtype)
    return v, x.new_empty(x.shape[0], dtype=torch.float32)
