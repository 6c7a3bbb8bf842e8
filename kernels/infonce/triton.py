"""InfoNCE whose keys get no gradient: loss and dq in ONE pass over the keys, like attention whose values are its keys.

dq_i = (sum_j p_ij k_j - k_i) / (N temperature): the softmax runs online, split over the keys when queries are few, and
the backward is a scaling.  4 N K D operations, no logits in memory.  Times: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..collectives import group_name, named_group, rank_world
from ..common import capability, cdiv, l2_normalize, pow2
from ..ntxent.launch import HELD, Form, Tiles, matmul_float32, n_splits, precision, prepare, small_memory
from ..ntxent.rows import LN2, inverse_norm

LOGIT_BYTES = 64 << 20  # of logits held at a time where rows are too wide for one pass
SIZES = ("m", "n", "own", "tiles_split", "splits")


@triton.jit(do_not_specialize=SIZES)
def one_pass_kernel(
    p_q,
    p_k,
    sk_r,
    sk_d,
    p_stat,
    p_acc,
    m,
    n,
    own,
    tiles_split,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PEXP: tl.constexpr,
    SKIP_OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q (m, DP) cast, keys (n, D) of any float and strides; stat (2, splits, m) maxima and sums, acc (splits, m, DP).

    Sums and acc are relative to 2^(maximum - PEXP): the small p of a large queue stay normal numbers in float16.
    SKIP_OWN: key own + i is the positive of row i, which combine_kernel adds.
    """
    i_row, i_split = tl.program_id(0), tl.program_id(1)
    o_row, o_n, o_d = i_row * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    m_row, m_d = o_row < m, (o_d < D)[None, :]
    b_q = tl.load(p_q + o_row.to(tl.int64)[:, None] * DP + o_d[None, :], mask=m_row[:, None], other=0.0)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)

    o_key = o_n[:, None] * sk_r + o_d[None, :] * sk_d  # 32 bits: a tile of 64-bit offsets costs registers
    for t in range(i_split * tiles_split, tl.minimum((i_split + 1) * tiles_split, tl.cdiv(n, BN))):
        m_col = t * BN + o_n < n
        m_tile = m_col[:, None] if D == DP else m_col[:, None] & m_d
        b_k = tl.load(p_k + tl.cast(t, tl.int64) * (BN * sk_r) + o_key, mask=m_tile, other=0.0).to(b_q.dtype)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * c
        if (t + 1) * BN > n:
            b_x = tl.where(m_col[None, :], b_x, float("-inf"))
        if SKIP_OWN:
            b_x = tl.where((own + o_row)[:, None] == (t * BN + o_n)[None, :], float("-inf"), b_x)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row whose only key so far is its own has no term yet
        b_p = tl.exp2(b_x - (b_safe - PEXP)[:, None])
        b_scale = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_k.dtype), b_k, b_acc * b_scale[:, None], input_precision=PRECISION)
        b_max = b_new

    o_stat = i_split * m + o_row
    tl.store(p_stat + o_stat, b_max, mask=m_row)
    tl.store(p_stat + tl.num_programs(1) * m + o_stat, b_sum, mask=m_row)
    tl.store(p_acc + o_stat.to(tl.int64)[:, None] * DP + o_d[None, :], b_acc, mask=m_row[:, None])


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    p_stat,
    p_acc,
    p_dot,
    p_positive,
    sp_r,
    sp_d,
    p_q,
    sq_r,
    sq_d,
    p_inv,
    p_loss,
    p_dq,
    m,
    splits,
    c,
    factor,
    loss_factor,
    D: tl.constexpr,
    DP: tl.constexpr,
    BS: tl.constexpr,
    PEXP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_POSITIVE: tl.constexpr,
):
    """Joins a row's splits, BS at a time, and its positive, which is none of their keys; dq (m, D) float32.

    A row a program: 256 queries would else leave most of the card idle while it reads 17 MB of parts.
    """
    i, o_s, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, DP)
    m_d = (o_d < D)[None, :]
    positive_x = tl.load(p_dot + i) * c
    b_positive = tl.load(p_positive + i * sp_r + o_d.to(tl.int64)[None, :] * sp_d, mask=m_d, other=0.0).to(tl.float32)
    b_positive *= inverse_norm(b_positive, NORMALIZE_POSITIVE)[:, None]

    b_max = tl.full([BS], float("-inf"), tl.float32)
    for s in range(0, splits, BS):
        b_max = tl.maximum(b_max, tl.load(p_stat + (s + o_s) * m + i, mask=s + o_s < splits, other=float("-inf")))
    row_max = tl.maximum(tl.max(b_max, 0), positive_x)
    b_others = tl.zeros([BS], tl.float32)
    b_acc = tl.zeros([BS, DP], tl.float32)
    for s in range(0, splits, BS):
        o_part = (s + o_s).to(tl.int64) * m + i
        m_part = s + o_s < splits
        b_scale = tl.exp2(tl.load(p_stat + o_part, mask=m_part, other=float("-inf")) - row_max)
        b_others += b_scale * tl.load(p_stat + splits * m + o_part, mask=m_part, other=0.0)
        b_part = tl.load(p_acc + o_part[:, None] * DP + o_d[None, :], mask=m_part[:, None], other=0.0)
        b_acc += b_scale[:, None] * b_part
    others = tl.sum(b_others, 0)
    total = tl.exp2(positive_x - row_max + PEXP) + others
    tl.store(p_loss + i, (row_max - PEXP + tl.log2(total) - positive_x) * loss_factor)

    # own / total - 1 = -others / total, without cancelling
    b_g = (tl.sum(b_acc, 0)[None, :] - others * b_positive) / total
    if NORMALIZE:
        inv = tl.load(p_inv + i)
        b_u = tl.load(p_q + i * sq_r + o_d.to(tl.int64)[None, :] * sq_d, mask=m_d, other=0.0).to(tl.float32) * inv
        b_g = (b_g - b_u * tl.sum(b_u * b_g, 1)[:, None]) * inv
    tl.store(p_dq + i * D + o_d[None, :], b_g * factor, mask=m_d)


def one_pass_tiles(width: int, same_dtype: bool, full: bool, device) -> Tiles:
    """Two programs to a multiprocessor where their registers suffice: one's exponentials hide behind the other's
    products.  Casting keys takes more of them, masking their width (not `full`) too."""
    if small_memory(device):
        if width <= 128:
            return Tiles(128, 32, width, 8, 3)
        return Tiles(128, 32 if same_dtype else 16, width, 8, 2)  # float32 keys as wide: 105 KB, and some cards have 99
    if capability(device) // 10 == 9 and same_dtype and full:  # by bench/tiles.py on an H200: 8 and 16 % shorter
        return Tiles(64, 128, width, 4, 2, resident=2) if width <= 128 else Tiles(128, 64, width, 8, 3)
    return Tiles(128, 64, width, 8, 2)


def forward(q, k, queue, temperature, normalize, group, normalize_k=None):
    """-> loss, dloss/dq in float32 (in q's dtype it would lose what a loss scale is there to keep)."""
    normalize_k = normalize if normalize_k is None else normalize_k
    m, d = q.shape
    rank, world = rank_world(group)
    form = Form(temperature, normalize, diagonal=False, decoupled=False, half=0)
    u, inv, positive_dot = prepare(q, k, form, None, normalize_k)
    width = u.shape[1]
    if queue is None:
        keys, n, own = prepare(k, None, form, group)[0], m * world, rank * m
    else:
        keys, n, own = queue, queue.shape[0], None
    if width > HELD or u.dtype.itemsize == 4:
        if queue is not None:
            keys = torch.nn.functional.pad(queue.to(u.dtype), (0, width - d))
        positive = torch.nn.functional.pad(l2_normalize(k) if normalize_k else k, (0, width - d))
        return chunked(q, u[:m], inv, positive, positive_dot, keys[:n], own, form)

    t = one_pass_tiles(width, keys.dtype == u.dtype, keys.shape[1] == width, q.device)
    if t.bn * keys.stride(0) + width * keys.stride(1) >= 2**31:
        keys = keys.contiguous()
    programs, tiles = cdiv(m, t.bm), max(cdiv(n, t.bn), 1)
    splits, each = n_splits(programs, tiles, q.device, t.resident)
    stat = torch.empty((2, splits, m), dtype=torch.float32, device=q.device)
    acc = torch.empty((splits, m, width), dtype=torch.float32, device=q.device)
    pexp = 14 if u.dtype == torch.float16 else 0
    one_pass_kernel[(programs, splits)](
        u,
        keys,
        *keys.stride(),
        stat,
        acc,
        m,
        n,
        own or 0,
        each,
        form.c,
        D=keys.shape[1],
        DP=width,
        BM=t.bm,
        BN=t.bn,
        PEXP=pexp,
        SKIP_OWN=own is not None,
        PRECISION=precision(),
        num_warps=t.warps,
        num_stages=t.stages,
        maxnreg=t.registers,
    )
    return combine(stat, acc, positive_dot, k, q, inv, form, pexp, normalize_k)


def combine(stat, acc, positive_dot, positive, q, inv, form, pexp, normalize_positive):
    m, d = q.shape
    splits, width = stat.shape[1], acc.shape[2]
    block = min(max(1, 4096 // width), pow2(splits))
    loss = torch.empty(m, dtype=torch.float32, device=q.device)
    dq = torch.empty((m, d), dtype=torch.float32, device=q.device)
    combine_kernel[(m,)](
        stat,
        acc,
        positive_dot,
        positive,
        *positive.stride(),
        q,
        *q.stride(),
        inv,
        loss,
        dq,
        m,
        splits,
        form.c,
        1 / (m * form.temperature),
        LN2 / m,
        D=d,
        DP=width,
        BS=block,
        PEXP=pexp,
        NORMALIZE=form.normalize,
        NORMALIZE_POSITIVE=normalize_positive,
        num_warps=min(4, max(1, block * width // 1024)),
    )
    return loss.sum(), dq


def chunked(q, u, inv, positive, positive_dot, keys, own, form):
    """The same by matmuls over blocks of queries, where a row is wider than the tiles hold, or float32 is asked for."""
    m, d = q.shape
    total = torch.zeros((), device=q.device)
    dq = torch.empty((m, d), dtype=torch.float32, device=q.device)
    block = max(1, min(m, LOGIT_BYTES // (4 * max(keys.shape[0], 1))))
    for first in range(0, m, block):
        rows = slice(first, first + block)
        y, y_dot = positive[rows].float(), positive_dot[rows, None] / form.temperature
        logits = matmul_float32(u[rows], keys.T) / form.temperature
        if own is not None:
            logits.diagonal(own + first).fill_(-torch.inf)
        lse = torch.cat([logits, y_dot], 1).logsumexp(1, keepdim=True)
        total += (lse - y_dot).sum()
        p = logits.sub_(lse).exp_()
        g = matmul_float32((p * 2.0**14).to(keys.dtype), keys) * 2.0**-14 - p.sum(1, keepdim=True) * y
        g = g[:, :d]
        if form.normalize:
            direction = q[rows].float() * inv[rows, None]
            g = (g - direction * (direction * g).sum(1, keepdim=True)) * inv[rows, None]
        dq[rows] = g / (m * form.temperature)
    return total / m, dq


@torch.library.custom_op("fastssl::infonce", mutates_args=())
def infonce_op(
    q: Tensor, k: Tensor, queue: Tensor | None, temperature: float, normalize: bool, group: str
) -> tuple[Tensor, Tensor]:
    return forward(q, k, queue, temperature, normalize, named_group(group))


@infonce_op.register_fake
def _(q, k, queue, temperature, normalize, group):
    return q.new_empty((), dtype=torch.float32), torch.empty(q.shape, dtype=torch.float32, device=q.device)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only saved would cost memory and time
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    dq = ctx.saved_tensors[0]
    if ctx.dtype != dq.dtype:  # multiplied and rounded in one launch
        return torch.mul(dq, grad, out=torch.empty_like(dq, dtype=ctx.dtype)), None, None, None, None, None
    return grad * dq, None, None, None, None, None


infonce_op.register_autograd(_backward, setup_context=_setup)


def infonce(q, k, queue, temperature, normalize, group):
    queue = None if queue is None else queue.detach()
    return infonce_op(q, k.detach(), queue, float(temperature), normalize, group_name(group))[0]
