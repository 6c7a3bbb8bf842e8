"""Cross entropy between two softmaxes: one pass for both maxima, sums and the sum of their product, one for the
gradient.  Bound by memory: student and teacher read twice, the gradient written.  Not measured yet on a GPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import cdiv, split_tiles
from ..wide_rows import GROUP, alignment, assume_multiple, grouped_columns, row_block, update_max

BLOCK_ROWS = 128  # rows of one program of rows_kernel
SIZES = ("M", "K", "stride_sm", "stride_tm", "columns_per_split", "num_splits")  # one build for sizes of one alignment


@triton.jit
def load_teacher(t_ptr, center_ptr, offs_k, stride_tk, mask_k, CENTER: tl.constexpr, LOGITS: tl.constexpr):
    t = tl.load(t_ptr + offs_k.to(tl.int64) * stride_tk, mask=mask_k, other=0.0).to(tl.float32)
    if CENTER:
        t -= tl.load(center_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if LOGITS:
        t = tl.where(mask_k, t, float("-inf"))
    return t


@triton.jit(do_not_specialize=SIZES)
def stats_kernel(
    s_ptr,  # (M, K) student logits, any float
    stride_sm,
    stride_sk,
    t_ptr,  # (M, K) teacher logits (LOGITS) or probabilities, any float
    stride_tm,
    stride_tk,
    center_ptr,  # (K,) any float, if CENTER
    stats_ptr,  # (5, num_splits, M) float32 out: student's maximum and sum, teacher's, sum of teacher x student logit
    M,
    K,
    columns_per_split,
    s_scale,
    t_scale,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTER: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """One program: one row, one split of the columns.

    The maximum is subtracted before the multiplication, 2^((x - maximum) scale).  In scale x - maximum, a fused
    multiply-add would keep more bits of scale x than the maximum has, so that the largest logit does not give 0.
    """
    stride_sm, stride_tm = assume_multiple(stride_sm, ALIGN), assume_multiple(stride_tm, ALIGN)
    K, columns_per_split = assume_multiple(K, ALIGN), assume_multiple(columns_per_split, ALIGN)
    i, pid_split = tl.program_id(0), tl.program_id(1)
    s_ptr += i.to(tl.int64) * stride_sm
    t_ptr += i.to(tl.int64) * stride_tm
    s_max = tl.full([BLOCK_K // GROUP], float("-inf"), tl.float32)
    t_max = tl.full([BLOCK_K // GROUP], float("-inf"), tl.float32)
    s_sum = tl.zeros([BLOCK_K // GROUP], tl.float32)
    t_sum = tl.zeros([BLOCK_K // GROUP], tl.float32)
    dot = tl.zeros([BLOCK_K // GROUP], tl.float32)
    stop = tl.minimum((pid_split + 1) * columns_per_split, K)
    for first in range(pid_split * columns_per_split, stop, BLOCK_K):
        offs_k = grouped_columns(first, BLOCK_K)
        mask_k = offs_k < stop
        s = tl.load(s_ptr + offs_k.to(tl.int64) * stride_sk, mask=mask_k, other=0.0).to(tl.float32)
        x = tl.where(mask_k, s, float("-inf"))
        s_max, finite_max, alpha = update_max(s_max, x, s_scale)
        s_sum = s_sum * alpha + tl.sum(tl.exp2((x - finite_max) * s_scale), 1)
        t = load_teacher(t_ptr, center_ptr, offs_k, stride_tk, mask_k, CENTER, LOGITS)
        if LOGITS:
            t_max, finite_max, alpha = update_max(t_max, t, t_scale)
            t = tl.exp2((t - finite_max) * t_scale)
            t_sum *= alpha
            dot *= alpha
        t_sum += tl.sum(t, 1)
        dot += tl.sum(t * s, 1)
    plane = tl.num_programs(1) * M
    stats_ptr += pid_split * M + i
    s_row_max = tl.max(s_max, 0)
    tl.store(stats_ptr, s_row_max)
    tl.store(stats_ptr + plane, tl.sum(s_sum * tl.exp2((s_max - s_row_max) * s_scale), 0))
    if LOGITS:
        t_row_max = tl.max(t_max, 0)
        alpha = tl.exp2((t_max - t_row_max) * t_scale)
        tl.store(stats_ptr + 2 * plane, t_row_max)
        tl.store(stats_ptr + 3 * plane, tl.sum(t_sum * alpha, 0))
        tl.store(stats_ptr + 4 * plane, tl.sum(dot * alpha, 0))
    else:
        tl.store(stats_ptr + 2 * plane, 0.0)
        tl.store(stats_ptr + 3 * plane, tl.sum(t_sum, 0))
        tl.store(stats_ptr + 4 * plane, tl.sum(dot, 0))


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    stats_ptr,  # (5, num_splits, M) float32
    softmax_ptr,  # (4, M) float32 out: student's maximum and 1 / sum, teacher's (of probabilities: 0 and their sum)
    loss_ptr,  # (cdiv(M, BLOCK_M),) float32 out: each block's loss, in powers of two, times factor
    M,
    num_splits,
    s_scale,
    t_scale,
    factor,
    BLOCK_M: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Combines the splits of each row.

    1 / sum is stored instead of log sum, because 2^(x - maximum) / sum is more precise than 2^(x - log sum).
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    plane = num_splits * M
    s_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    t_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, num_splits):
        s_max = tl.maximum(s_max, tl.load(stats_ptr + split * M + offs_m, mask=mask_m, other=0.0))
        t_max = tl.maximum(t_max, tl.load(stats_ptr + 2 * plane + split * M + offs_m, mask=mask_m, other=0.0))
    s_sum = tl.zeros([BLOCK_M], tl.float32)
    t_sum = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float32)
    for split in range(0, num_splits):
        ptrs = stats_ptr + split * M + offs_m
        split_s_max = tl.load(ptrs, mask=mask_m, other=0.0)
        s_sum += tl.exp2((split_s_max - s_max) * s_scale) * tl.load(ptrs + plane, mask=mask_m, other=1.0)
        alpha = tl.exp2((tl.load(ptrs + 2 * plane, mask=mask_m, other=0.0) - t_max) * t_scale)
        t_sum += alpha * tl.load(ptrs + 3 * plane, mask=mask_m, other=1.0)
        dot += alpha * tl.load(ptrs + 4 * plane, mask=mask_m, other=0.0)
    if LOGITS:
        loss = (s_max - dot / t_sum) * s_scale + tl.log2(s_sum)
    else:
        loss = (t_sum * s_max - dot) * s_scale + t_sum * tl.log2(s_sum)
    softmax_ptr += offs_m
    tl.store(softmax_ptr, s_max, mask=mask_m)
    tl.store(softmax_ptr + M, 1.0 / s_sum, mask=mask_m)
    tl.store(softmax_ptr + 2 * M, t_max, mask=mask_m)
    tl.store(softmax_ptr + 3 * M, 1.0 / t_sum if LOGITS else t_sum, mask=mask_m)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(mask_m, loss, 0.0), 0) * factor)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    s_ptr,  # (M, K) student logits, any float
    stride_sm,
    stride_sk,
    t_ptr,  # (M, K) teacher logits (LOGITS) or probabilities, any float
    stride_tm,
    stride_tk,
    center_ptr,  # (K,) any float, if CENTER
    softmax_ptr,  # (4, M) float32, as rows_kernel writes it
    grad_ptr,  # () incoming gradient of the loss
    out_ptr,  # (M, K) out, in the student's dtype
    M,
    K,
    s_scale,
    t_scale,
    factor,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTER: tl.constexpr,
    LOGITS: tl.constexpr,
):
    stride_sm, stride_tm = assume_multiple(stride_sm, ALIGN), assume_multiple(stride_tm, ALIGN)
    K = assume_multiple(K, ALIGN)
    i = tl.program_id(0)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    softmax_ptr += i
    s_max, s_inv_sum = tl.load(softmax_ptr), tl.load(softmax_ptr + M)
    t_max, t_inv_sum = tl.load(softmax_ptr + 2 * M), tl.load(softmax_ptr + 3 * M)
    s_ptrs = s_ptr + i.to(tl.int64) * stride_sm + offs_k.to(tl.int64) * stride_sk
    s = tl.load(s_ptrs, mask=mask_k, other=0.0).to(tl.float32)
    t = load_teacher(t_ptr + i.to(tl.int64) * stride_tm, center_ptr, offs_k, stride_tk, mask_k, CENTER, LOGITS)
    q = tl.exp2((s - s_max) * s_scale) * s_inv_sum
    if LOGITS:
        g = q - tl.exp2((t - t_max) * t_scale) * t_inv_sum
    else:
        g = q * t_inv_sum - t  # t_inv_sum is the sum of the probabilities
    g *= factor * tl.load(grad_ptr).to(tl.float32)
    tl.store(out_ptr + i.to(tl.int64) * K + offs_k, g.to(out_ptr.dtype.element_ty), mask=mask_k)


def _launch_arguments(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float | None,
) -> tuple[tuple, tuple[float, float], dict[str, int | bool]]:
    """What the launches over student and teacher have in common: tensors with strides, scales, constants."""
    return (
        (student, *student.stride(), teacher, *teacher.stride(), center),
        (1 / (math.log(2) * student_temperature), 1 / (math.log(2) * (teacher_temperature or 1.0))),
        {
            "BLOCK_K": row_block(student.shape[1]),
            "ALIGN": alignment(student.shape[1], student, teacher),
            "CENTER": center is not None,
            "LOGITS": teacher_temperature is not None,
        },
    )


def forward(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    center: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and the (4, M) float32 numbers of the rows that the gradient needs (see rows_kernel)."""
    m, k = student.shape
    f32 = {"dtype": torch.float32, "device": student.device}
    inputs, scales, constants = _launch_arguments(student, teacher, center, student_temperature, teacher_temperature)
    block_k = constants["BLOCK_K"]
    num_splits, tiles_per_split = split_tiles(m, cdiv(k, block_k), student.device, programs_per_sm=2)
    stats = torch.empty((5, num_splits, m), **f32)
    stats_kernel[(m, num_splits)](*inputs, stats, m, k, tiles_per_split * block_k, *scales, **constants)
    softmax, loss = torch.empty((4, m), **f32), torch.empty(cdiv(m, BLOCK_ROWS), **f32)
    rows_kernel[(len(loss),)](
        stats, softmax, loss, m, num_splits, *scales, math.log(2) / m, BLOCK_M=BLOCK_ROWS, LOGITS=constants["LOGITS"]
    )
    return loss.sum(), softmax


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    softmax: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    m, k = student.shape
    out = torch.empty((m, k), dtype=student.dtype, device=student.device)
    inputs, scales, constants = _launch_arguments(student, teacher, center, student_temperature, teacher_temperature)
    factor = 1 / (m * student_temperature)
    gradient_kernel[(m, cdiv(k, constants["BLOCK_K"]))](*inputs, softmax, grad, out, m, k, *scales, factor, **constants)
    return out


soft_cross_entropy_op = torch.library.custom_op("fastssl::soft_cross_entropy", forward, mutates_args=())
soft_cross_entropy_backward_op = torch.library.custom_op(
    "fastssl::soft_cross_entropy_backward", backward, mutates_args=()
)


@soft_cross_entropy_op.register_fake
def _(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    f32 = {"dtype": torch.float32}
    return student.new_empty((), **f32), student.new_empty((4, student.shape[0]), **f32)


@soft_cross_entropy_backward_op.register_fake
def _(grad: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    student, teacher, *ctx.temperatures, center = inputs
    ctx.save_for_backward(student, teacher, center, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return soft_cross_entropy_backward_op(grad, *ctx.saved_tensors, *ctx.temperatures), None, None, None, None


soft_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
    center: Tensor | None,
) -> Tensor:
    center = None if center is None else center.detach().contiguous()
    tt = None if teacher_temperature is None else float(teacher_temperature)
    return soft_cross_entropy_op(student, teacher.detach(), float(student_temperature), tt, center)[0]
