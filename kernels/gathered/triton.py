"""NPID's loss with gathered negatives: each is read once, for its logit and for dq together, and none is written.

Bound by the gather: N K rows of the bank.  Shared negatives go through infonce.  Not measured yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, pow2
from ..infonce import triton as infonce
from ..ntxent.launch import Form, n_splits
from ..ntxent.rows import inverse_norm


@triton.jit(do_not_specialize=("m", "n", "per_split"))
def gathered_kernel(
    p_q,
    sq_r,
    sq_d,
    p_bank,
    sb_r,
    sb_d,
    p_positive,
    sp,
    p_negative,
    sn_r,
    sn_k,
    p_stat,
    p_acc,
    p_dot,
    p_inv,
    m,
    n,
    per_split,
    c,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One query, a part of its negatives; the first part takes the positive's logit too.  All float32."""
    i, i_split = tl.program_id(0), tl.program_id(1)
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    m_d = o_d < D
    b_q = tl.load(p_q + i.to(tl.int64) * sq_r + o_d.to(tl.int64) * sq_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_inv = inverse_norm(b_q, NORMALIZE)
    b_q *= b_inv[:, None]
    o_bank = o_d.to(tl.int64)[None, :] * sb_d

    own = tl.load(p_positive + i.to(tl.int64) * sp)
    b_y = tl.load(p_bank + own * sb_r + o_bank, mask=m_d[None, :], other=0.0).to(tl.float32)
    b_dot = tl.sum(b_q * b_y, 1)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_acc = tl.zeros([1, BD], tl.float32)
    stop = tl.minimum((i_split + 1) * per_split, n)
    for k in range(i_split * per_split, stop, BN):
        m_n = k + o_n < stop
        o_row = tl.load(p_negative + i.to(tl.int64) * sn_r + (k + o_n).to(tl.int64) * sn_k, mask=m_n, other=0)
        p = p_bank + o_row[:, None] * sb_r + o_bank
        b_k = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_x = tl.where(m_n, tl.sum(b_k * b_q, 1) * c, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 0))
        b_p = tl.exp2(b_x - b_new)
        b_scale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_scale + tl.sum(b_p, 0)
        b_acc = b_acc * b_scale[:, None] + tl.sum(b_p[:, None] * b_k, 0)[None, :]
        b_max = b_new

    o_one = tl.arange(0, 1)
    o_stat = i_split * m + i + o_one
    tl.store(p_stat + o_stat, b_max)
    tl.store(p_stat + tl.num_programs(1) * m + o_stat, b_sum)
    tl.store(p_acc + o_stat.to(tl.int64)[:, None] * BD + o_d[None, :], b_acc)
    tl.store(p_dot + i + o_one, b_dot, mask=(i_split == 0) & (o_one == 0))
    tl.store(p_inv + i + o_one, b_inv, mask=(i_split == 0) & (o_one == 0))


def forward(q, bank, positive, negatives, temperature, normalize):
    """-> loss, dloss/dq in float32."""
    if negatives.ndim == 1:
        return infonce.forward(q, bank[positive], bank[negatives], temperature, normalize, None, normalize_k=False)
    m, d = q.shape
    n = negatives.shape[1]
    form = Form(temperature, normalize, diagonal=False, decoupled=False, half=0)
    block_d = pow2(d)
    block_n = max(8, 4096 // block_d)
    splits, each = n_splits(cdiv(m, 4), max(cdiv(n, block_n), 1), q.device)  # four small programs a processor
    f32 = {"dtype": torch.float32, "device": q.device}
    stat, acc = torch.empty((2, splits, m), **f32), torch.empty((splits, m, block_d), **f32)
    dot, inv = torch.empty(m, **f32), torch.empty(m, **f32)
    gathered_kernel[(m, splits)](
        q,
        *q.stride(),
        bank,
        *bank.stride(),
        positive,
        positive.stride(0),
        negatives,
        *negatives.stride(),
        stat,
        acc,
        dot,
        inv,
        m,
        n,
        each * block_n,
        form.c,
        D=d,
        BD=block_d,
        BN=block_n,
        NORMALIZE=normalize,
    )
    return infonce.combine(stat, acc, dot, bank[positive], q, inv, form, 0, False)


@torch.library.custom_op("fastssl::gathered_nce", mutates_args=())
def gathered_op(
    q: Tensor, bank: Tensor, positive: Tensor, negatives: Tensor, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    return forward(q, bank, positive, negatives, temperature, normalize)


@gathered_op.register_fake
def _(q, bank, positive, negatives, temperature, normalize):
    return q.new_empty((), dtype=torch.float32), torch.empty(q.shape, dtype=torch.float32, device=q.device)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None, None


gathered_op.register_autograd(_backward, setup_context=_setup)


def gathered_nce(q, bank, positive, negatives, temperature, normalize):
    return gathered_op(q, bank.detach(), positive, negatives, float(temperature), normalize)[0]
