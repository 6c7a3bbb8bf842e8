"""Sinkhorn by scaling vectors: each half iteration reads the logits once, as they are, and nothing else is B x K.

Sums are kept as a running maximum and a sum relative to it, so logits of any range are exact.  Not measured yet.
"""

import math

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..collectives import all_reduce, group_name, named_group
from ..common import cdiv, pow2
from ..ntxent.launch import n_splits

ROWS, COLUMNS = 8, 1024  # tile of a column pass: a thread holds whole columns of it, so their sums need no exchange
BLOCK = 2048  # columns that a program of a row pass reads at a time
GROUP = tl.constexpr(8)  # neighbours that share a running maximum: of bfloat16, what a thread loads at once
SIZES = ("b", "k", "sx_r", "rows_split", "splits")  # one build for all, but for what alignment() says of them


def alignment(k: int, *tensors: Tensor) -> int:
    """What the number of columns and the row strides are a multiple of, up to 16: without it, the mask of the last
    columns would keep every load from 16 bytes, and Triton's own hint knows 16 alone (SwAV has 3000 prototypes)."""
    return math.gcd(16, k, *(x.stride(0) for x in tensors))


@triton.jit
def multiple(x, ALIGN: tl.constexpr):
    """x, which is a multiple of ALIGN, so that the compiler sees it."""
    return x // ALIGN * ALIGN


@triton.jit
def grouped(first, BK: tl.constexpr):
    """Columns first.. first + BK as (BK / GROUP, GROUP)."""
    return first + tl.arange(0, BK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def running_maximum(b_max, b_x):
    """Of rows of b_x: the new running maximum, a finite stand-in for it, and what sums so far are to be scaled by."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_safe[:, None], tl.exp2(b_max - b_safe)


@triton.jit(do_not_specialize=SIZES)
def column_kernel(
    p_x,
    sx_r,
    sx_k,
    p_row,
    p_part,
    b,
    k,
    rows_split,
    c,
    BR: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    FIRST: tl.constexpr,
):
    """part (2, splits, K): over a part of the rows, the maximum of c x + row and the sum of 2^ relative to it."""
    k, sx_r = multiple(k, ALIGN), multiple(sx_r, ALIGN)
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    i_split = tl.program_id(1)
    m_k = o_k < k
    b_max = tl.full([BK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BK], tl.float32)
    stop = tl.minimum((i_split + 1) * rows_split, b)
    for first in range(i_split * rows_split, stop, BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < stop
        p = p_x + o_r.to(tl.int64)[:, None] * sx_r + o_k.to(tl.int64)[None, :] * sx_k
        b_x = tl.load(p, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32) * c
        if not FIRST:
            b_x += tl.load(p_row + o_r, mask=m_r, other=0.0)[:, None]
        b_x = tl.where(m_r[:, None], b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 0))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_x - b_new[None, :]), 0)
        b_max = b_new
    tl.store(p_part + i_split * k + o_k, b_max, mask=m_k)
    tl.store(p_part + (tl.num_programs(1) + i_split) * k + o_k, b_sum, mask=m_k)


@triton.jit(do_not_specialize=SIZES)
def column_end_kernel(p_part, p_max, p_column, k, splits, BK: tl.constexpr, LOG: tl.constexpr):
    """Joins the splits.  LOG: column = maximum + log2 of the sum; else the maximum and the sum, for other ranks."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    m_k = o_k < k
    b_max = tl.full([BK], float("-inf"), tl.float32)
    for s in range(0, splits):
        b_max = tl.maximum(b_max, tl.load(p_part + s * k + o_k, mask=m_k, other=0.0))
    b_sum = tl.zeros([BK], tl.float32)
    for s in range(0, splits):
        b_part_max = tl.load(p_part + s * k + o_k, mask=m_k, other=0.0)
        b_sum += tl.exp2(b_part_max - b_max) * tl.load(p_part + (splits + s) * k + o_k, mask=m_k, other=1.0)
    if LOG:
        tl.store(p_column + o_k, b_max + tl.log2(b_sum), mask=m_k)
    else:
        tl.store(p_max + o_k, b_max, mask=m_k)
        tl.store(p_column + o_k, b_sum, mask=m_k)


@triton.jit(do_not_specialize=SIZES)
def row_kernel(
    p_x,
    sx_r,
    sx_k,
    p_column,
    p_row,
    p_out,
    k,
    c,
    column_scale,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    WRITE: tl.constexpr,
):
    """row = -log2 sum_k 2^(c x - column); WRITE: instead the softmax of the row, out (B, K)."""
    k, sx_r = multiple(k, ALIGN), multiple(sx_r, ALIGN)
    i = tl.program_id(0)
    p_x += i.to(tl.int64) * sx_r
    b_max = tl.full([BK // GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([BK // GROUP], tl.float32)
    for first in range(0, k, BK):
        o_k = grouped(first, BK)
        m_k = o_k < k
        b_x = tl.load(p_x + o_k.to(tl.int64) * sx_k, mask=m_k, other=0.0).to(tl.float32) * c
        b_x = tl.where(m_k, b_x - tl.load(p_column + o_k, mask=m_k, other=0.0) * column_scale, float("-inf"))
        b_max, b_safe, b_scale = running_maximum(b_max, b_x)
        b_sum = b_sum * b_scale + tl.sum(tl.exp2(b_x - b_safe), 1)
    top = tl.max(b_max, 0)
    total = top + tl.log2(tl.sum(b_sum * tl.exp2(b_max - top), 0))
    if WRITE:
        p_out += i.to(tl.int64) * k
        for first in range(0, k, BK):
            o_k = grouped(first, BK)
            m_k = o_k < k
            b_x = tl.load(p_x + o_k.to(tl.int64) * sx_k, mask=m_k, other=0.0).to(tl.float32) * c
            b_x -= tl.load(p_column + o_k, mask=m_k, other=0.0) * column_scale
            tl.store(p_out + o_k, tl.exp2(b_x - total), mask=m_k)
    else:
        tl.store(p_row + i, -total)


def row_block(k: int) -> int:
    return min(BLOCK, pow2(max(k, GROUP.value)))


def center(logits, epsilon, iterations, group):
    b, k = logits.shape
    if logits.stride(1) != 1:  # a tile of scattered columns would not fit into registers
        logits = logits.contiguous()
    c, align = 1 / (math.log(2) * epsilon), alignment(k, logits)
    f32 = {"dtype": torch.float32, "device": logits.device}
    row, column, top = torch.empty(b, **f32), torch.empty(k, **f32), torch.empty(k, **f32)
    programs = cdiv(k, COLUMNS)
    splits, each = n_splits(programs, max(cdiv(b, ROWS), 1), logits.device)
    part = torch.empty((2, splits, k), **f32)
    for i in range(iterations):
        column_kernel[(programs, splits)](
            logits, *logits.stride(), row, part, b, k, each * ROWS, c, BR=ROWS, BK=COLUMNS, ALIGN=align, FIRST=i == 0
        )
        column_end_kernel[(cdiv(k, 1024),)](part, top, column, k, splits, BK=1024, LOG=group is None)
        if group is not None:
            own = top.clone()
            all_reduce(top, group, dist.ReduceOp.MAX)
            column = top + all_reduce(column * torch.exp2(own - top), group).log2()
        if i < iterations - 1:  # the last scaling of the rows is the softmax of whoever uses the center
            row_kernel[(b,)](
                logits, *logits.stride(), column, row, row, k, c, 1.0, BK=row_block(k), ALIGN=align, WRITE=False
            )
    return column / c


def assignments(logits, center, epsilon):
    b, k = logits.shape
    c = 1 / (math.log(2) * epsilon)
    out = torch.empty((b, k), dtype=torch.float32, device=logits.device)
    row_kernel[(b,)](
        logits, *logits.stride(), center, out, out, k, c, c, BK=row_block(k), ALIGN=alignment(k, logits), WRITE=True
    )
    return out


@torch.library.custom_op("fastssl::sinkhorn_center", mutates_args=())
def center_op(logits: Tensor, epsilon: float, iterations: int, group: str) -> Tensor:
    return center(logits, epsilon, iterations, named_group(group))


@center_op.register_fake
def _(logits, epsilon, iterations, group):
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


@torch.library.custom_op("fastssl::sinkhorn_assign", mutates_args=())
def assign_op(logits: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return assignments(logits, center, epsilon)


@assign_op.register_fake
def _(logits, center, epsilon):
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


def sinkhorn_center(logits, epsilon, iterations, group):
    return center_op(logits.detach(), float(epsilon), iterations, group_name(group))


def assign(logits, center, epsilon):
    return assign_op(logits.detach(), center, float(epsilon))
