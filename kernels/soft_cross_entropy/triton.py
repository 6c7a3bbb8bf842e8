"""Teacher-student cross entropy: one pass keeps both softmaxes' maxima and sums and their product's, one writes the
gradient.  Bound by memory: student and teacher read twice, the gradient written.  Not measured yet on a GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv
from ..ntxent.launch import n_splits
from ..ntxent.rows import LN2
from ..sinkhorn.triton import GROUP, alignment, grouped, multiple, row_block

SIZES = ("n", "k", "ss_r", "st_r", "columns_split", "splits")  # one build for all, but for their alignment


@triton.jit
def _teacher(p_t, p_center, o_k, stride, mask, CENTER: tl.constexpr, LOGITS: tl.constexpr):
    b_t = tl.load(p_t + o_k.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        b_t -= tl.load(p_center + o_k, mask=mask, other=0.0).to(tl.float32)
    if LOGITS:
        b_t = tl.where(mask, b_t, float("-inf"))
    return b_t


@triton.jit
def _running_maximum(b_max, b_x, c):
    """Of rows of b_x: the new running maximum, a finite stand-in for it, and what sums so far are to be scaled by."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_safe[:, None], tl.exp2((b_max - b_safe) * c)


@triton.jit(do_not_specialize=SIZES)
def stats_kernel(
    p_s,
    ss_r,
    ss_k,
    p_t,
    st_r,
    st_k,
    p_center,
    p_stat,
    n,
    k,
    columns_split,
    cs,
    ct,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTER: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """stat (5, splits, N): maximum and sum of the student's, of the teacher's, and sum of teacher weight x student.

    Logits meet their maximum before the temperature, 2^((x - maximum) c): of c x the compiler keeps more bits where it
    joins it with a sum than where it does not, and a maximum would not cancel itself.
    """
    ss_r, st_r, k = multiple(ss_r, ALIGN), multiple(st_r, ALIGN), multiple(k, ALIGN)
    columns_split = multiple(columns_split, ALIGN)
    i, i_split = tl.program_id(0), tl.program_id(1)
    p_s += i.to(tl.int64) * ss_r
    p_t += i.to(tl.int64) * st_r
    b_ms = tl.full([BK // GROUP], float("-inf"), tl.float32)
    b_mt = tl.full([BK // GROUP], float("-inf"), tl.float32)
    b_ls = tl.zeros([BK // GROUP], tl.float32)
    b_lt = tl.zeros([BK // GROUP], tl.float32)
    b_dot = tl.zeros([BK // GROUP], tl.float32)
    stop = tl.minimum((i_split + 1) * columns_split, k)
    for first in range(i_split * columns_split, stop, BK):
        o_k = grouped(first, BK)
        m_k = o_k < stop
        b_s = tl.load(p_s + o_k.to(tl.int64) * ss_k, mask=m_k, other=0.0).to(tl.float32)
        b_x = tl.where(m_k, b_s, float("-inf"))
        b_ms, b_safe, b_scale = _running_maximum(b_ms, b_x, cs)
        b_ls = b_ls * b_scale + tl.sum(tl.exp2((b_x - b_safe) * cs), 1)
        b_t = _teacher(p_t, p_center, o_k, st_k, m_k, CENTER, LOGITS)
        if LOGITS:
            b_mt, b_safe, b_scale = _running_maximum(b_mt, b_t, ct)
            b_t = tl.exp2((b_t - b_safe) * ct)
            b_lt *= b_scale
            b_dot *= b_scale
        b_lt += tl.sum(b_t, 1)
        b_dot += tl.sum(b_t * b_s, 1)
    plane = tl.num_programs(1) * n
    p_stat += i_split * n + i
    ms = tl.max(b_ms, 0)
    tl.store(p_stat, ms)
    tl.store(p_stat + plane, tl.sum(b_ls * tl.exp2((b_ms - ms) * cs), 0))
    if LOGITS:
        mt = tl.max(b_mt, 0)
        b_scale = tl.exp2((b_mt - mt) * ct)
        tl.store(p_stat + 2 * plane, mt)
        tl.store(p_stat + 3 * plane, tl.sum(b_lt * b_scale, 0))
        tl.store(p_stat + 4 * plane, tl.sum(b_dot * b_scale, 0))
    else:
        tl.store(p_stat + 2 * plane, 0.0)
        tl.store(p_stat + 3 * plane, tl.sum(b_lt, 0))
        tl.store(p_stat + 4 * plane, tl.sum(b_dot, 0))


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(p_stat, p_end, p_loss, n, splits, cs, ct, factor, BR: tl.constexpr, LOGITS: tl.constexpr):
    """end (4, N): the student's maximum and 1 / sum, and the teacher's (of probabilities, just their sum); the loss of
    each block of rows, in powers of two, times factor.

    Not the logarithm of the sum: 2^(x - maximum) / sum keeps bits that 2^(x - log sum) rounds away.
    """
    o = tl.program_id(0) * BR + tl.arange(0, BR)
    m = o < n
    plane = splits * n
    b_ms = tl.full([BR], float("-inf"), tl.float32)
    b_mt = tl.full([BR], float("-inf"), tl.float32)
    for s in range(0, splits):
        b_ms = tl.maximum(b_ms, tl.load(p_stat + s * n + o, mask=m, other=0.0))
        b_mt = tl.maximum(b_mt, tl.load(p_stat + 2 * plane + s * n + o, mask=m, other=0.0))
    b_ls = tl.zeros([BR], tl.float32)
    b_lt = tl.zeros([BR], tl.float32)
    b_dot = tl.zeros([BR], tl.float32)
    for s in range(0, splits):
        p = p_stat + s * n + o
        b_ls += tl.exp2((tl.load(p, mask=m, other=0.0) - b_ms) * cs) * tl.load(p + plane, mask=m, other=1.0)
        b_scale = tl.exp2((tl.load(p + 2 * plane, mask=m, other=0.0) - b_mt) * ct)
        b_lt += b_scale * tl.load(p + 3 * plane, mask=m, other=1.0)
        b_dot += b_scale * tl.load(p + 4 * plane, mask=m, other=0.0)
    if LOGITS:
        b_loss = (b_ms - b_dot / b_lt) * cs + tl.log2(b_ls)
    else:
        b_loss = (b_lt * b_ms - b_dot) * cs + b_lt * tl.log2(b_ls)
    p_end += o
    tl.store(p_end, b_ms, mask=m)
    tl.store(p_end + n, 1.0 / b_ls, mask=m)
    tl.store(p_end + 2 * n, b_mt, mask=m)
    tl.store(p_end + 3 * n, 1.0 / b_lt if LOGITS else b_lt, mask=m)
    tl.store(p_loss + tl.program_id(0), tl.sum(tl.where(m, b_loss, 0.0), 0) * factor)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    p_s,
    ss_r,
    ss_k,
    p_t,
    st_r,
    st_k,
    p_center,
    p_end,
    p_grad,
    p_out,
    n,
    k,
    cs,
    ct,
    factor,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTER: tl.constexpr,
    LOGITS: tl.constexpr,
):
    ss_r, st_r, k = multiple(ss_r, ALIGN), multiple(st_r, ALIGN), multiple(k, ALIGN)
    i = tl.program_id(0)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < k
    p_end += i
    ms, ls, mt, lt = tl.load(p_end), tl.load(p_end + n), tl.load(p_end + 2 * n), tl.load(p_end + 3 * n)
    b_s = tl.load(p_s + i.to(tl.int64) * ss_r + o_k.to(tl.int64) * ss_k, mask=m_k, other=0.0).to(tl.float32)
    b_t = _teacher(p_t + i.to(tl.int64) * st_r, p_center, o_k, st_k, m_k, CENTER, LOGITS)
    b_q = tl.exp2((b_s - ms) * cs) * ls
    b_g = b_q - tl.exp2((b_t - mt) * ct) * lt if LOGITS else b_q * lt - b_t
    b_g *= factor * tl.load(p_grad).to(tl.float32)
    tl.store(p_out + i.to(tl.int64) * k + o_k, b_g.to(p_out.dtype.element_ty), mask=m_k)


def _scales(student_temperature, teacher_temperature):
    return tuple(1 / (math.log(2) * t) for t in (student_temperature, teacher_temperature or 1.0))


def forward(student, teacher, student_temperature, teacher_temperature, center):
    """-> loss, and what the gradient needs of each row (4, N)."""
    n, k = student.shape
    f32 = {"dtype": torch.float32, "device": student.device}
    block = row_block(k)
    splits, each = n_splits(n, cdiv(k, block), student.device)
    stat = torch.empty((5, splits, n), **f32)
    flags = {"CENTER": center is not None, "LOGITS": teacher_temperature is not None}
    scales = _scales(student_temperature, teacher_temperature)
    stats_kernel[(n, splits)](
        student,
        *student.stride(),
        teacher,
        *teacher.stride(),
        center,
        stat,
        n,
        k,
        each * block,
        *scales,
        BK=block,
        ALIGN=alignment(k, student, teacher),
        **flags,
    )
    end, loss = torch.empty((4, n), **f32), torch.empty(cdiv(n, 128), **f32)
    rows_kernel[(cdiv(n, 128),)](stat, end, loss, n, splits, *scales, LN2 / n, BR=128, LOGITS=flags["LOGITS"])
    return loss.sum(), end


def backward(grad, student, teacher, center, end, student_temperature, teacher_temperature):
    n, k = student.shape
    out = torch.empty((n, k), dtype=student.dtype, device=student.device)
    block = row_block(k)
    gradient_kernel[(n, cdiv(k, block))](
        student,
        *student.stride(),
        teacher,
        *teacher.stride(),
        center,
        end,
        grad,
        out,
        n,
        k,
        *_scales(student_temperature, teacher_temperature),
        1 / (n * student_temperature),
        BK=block,
        ALIGN=alignment(k, student, teacher),
        CENTER=center is not None,
        LOGITS=teacher_temperature is not None,
    )
    return out


@torch.library.custom_op("fastssl::soft_cross_entropy", mutates_args=())
def soft_cross_entropy_op(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float | None,
) -> tuple[Tensor, Tensor]:
    return forward(student, teacher, student_temperature, teacher_temperature, center)


@soft_cross_entropy_op.register_fake
def _(student, teacher, center, student_temperature, teacher_temperature):
    f32 = {"dtype": torch.float32}
    return student.new_empty((), **f32), student.new_empty((4, student.shape[0]), **f32)


@torch.library.custom_op("fastssl::soft_cross_entropy_backward", mutates_args=())
def soft_cross_entropy_backward_op(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    end: Tensor,
    student_temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    return backward(grad, student, teacher, center, end, student_temperature, teacher_temperature)


@soft_cross_entropy_backward_op.register_fake
def _(grad, student, teacher, center, end, student_temperature, teacher_temperature):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    student, teacher, center, *ctx.temperatures = inputs
    ctx.save_for_backward(student, teacher, center, *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return soft_cross_entropy_backward_op(grad, *ctx.saved_tensors, *ctx.temperatures), None, None, None, None


soft_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def soft_cross_entropy(student, teacher, student_temperature, teacher_temperature, center):
    center = None if center is None else center.detach().contiguous()
    tt = None if teacher_temperature is None else float(teacher_temperature)
    return soft_cross_entropy_op(student, teacher.detach(), center, float(student_temperature), tt)[0]
