"""The two passes over the tiles of a similarity matrix that is never held: row sums, then row-owned gradients.

Row i of u against all columns j of v (docs/kernels.md has the algebra; c = log2(e) / temperature):
  row sums   r_i = sum_j e_ij, with e_ij = 2^(c s_ij): unit rows need no maximum, 2^c and 2^-c are far from the limits,
  gradients  acc_i = sum_j (e_ij (w_i + w_j) - 2 [j is i's positive]) v_j, with w = 1/r: one exponential serves both
             directions, and of a positive the small difference is rounded, not its two halves.
Below LOWEST_FIXED, or for rows of any length, ONLINE keeps a running maximum, and w holds log2 of the row sum instead.

Names: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ values of a tile.  m rows of this rank, n columns of all.
"""

import triton
import triton.language as tl

LOWEST_FIXED = 0.015  # |c s| <= 96.2 there: neither e nor 1/r leaves float32's [2^-126, 2^127], for 2^30 rows
SIZES = ("m", "n", "half", "offset", "tiles_split", "first")  # one build for all sizes


@triton.jit
def _of_rows(p, first, o_row, m_row, LABELS: tl.constexpr):
    """Classes or pulls of this block's rows, read once; without labels a stand-in that is not used."""
    if LABELS:
        return tl.load(p + first + o_row, mask=m_row, other=0)
    else:
        return o_row


@triton.jit
def _valid(o_row, o_col, n, offset, DIAG: tl.constexpr):
    """Entries that exist: not past the last column, and (DIAG) not a row with itself.  Rows past the end are computed
    like any other, and never stored."""
    inside = (o_col < n)[None, :]
    if DIAG:
        return inside & ((o_row + offset)[:, None] != o_col[None, :])
    else:
        return inside


@triton.jit
def _partner(o_row, o_col, m, half, offset):
    return ((o_row + half) % m + offset)[:, None] == o_col[None, :]


@triton.jit
def _same_class(b_class, p_class, o_col):
    return b_class[:, None] == tl.load(p_class + o_col)[None, :]


@triton.jit
def _similarity(
    b_u, p_u, p_v, m_row, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """The tile u v^T in float32; p_u and p_v point at its first row and column.

    BK = D: b_u is the whole row block, held.  BK < D: both sides are read chunk by chunk, and b_u is not used.
    """
    o_u, o_v, o_k = tl.arange(0, BM)[:, None] * D, tl.arange(0, BN)[:, None] * D, tl.arange(0, BK)[None, :]
    b_s = tl.zeros([BM, BN], tl.float32)
    if BK == D:
        b_s = tl.dot(b_u, tl.trans(tl.load(p_v + o_v + o_k)), b_s, input_precision=PRECISION)
    else:
        for k in range(0, D, BK):
            b_uk = tl.load(p_u + o_u + (k + o_k), mask=m_row[:, None], other=0.0)
            b_s = tl.dot(b_uk, tl.trans(tl.load(p_v + o_v + (k + o_k))), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _special(
    t, i_row, n, half, offset, BM: tl.constexpr, BN: tl.constexpr, DIAG: tl.constexpr, POSITIVES: tl.constexpr
):
    """Whether column tile t may meet the diagonal, the positives of this row block, or the end: others need no mask."""
    row, col = i_row * BM, t * BN - offset
    special = (t + 1) * BN > n
    if DIAG:
        special = special | ((col < row + BM) & (col + BN > row))
    if POSITIVES:
        special = special | ((col < row + BM + half) & (col + BN > row + half))
        special = special | ((col < row + BM - half) & (col + BN > row - half))
    return special


@triton.jit(do_not_specialize=SIZES)
def row_sums_kernel(
    p_u,
    p_v,
    p_class,
    p_stat,
    m,
    n,
    half,
    offset,
    tiles_split,
    c,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAG: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """p_stat (3, splits, m): sum of the exponentials, sum of the positives' c s, maximum of c s (ONLINE).

    The positives come from the same product as the sum: tensor cores cut off bits, and what cancels in the loss has to
    be cut alike (docs/kernels.md).
    """
    i_row, i_split = tl.program_id(0), tl.program_id(1)
    o_row = i_row * BM + tl.arange(0, BM)
    m_row = o_row < m
    p_u += i_row.to(tl.int64) * BM * D
    b_u = o_row  # stands in for the row block where it is read chunk by chunk
    if BK == D:
        b_u = tl.load(p_u + tl.arange(0, BM)[:, None] * D + tl.arange(0, D)[None, :], mask=m_row[:, None], other=0.0)
    b_class = _of_rows(p_class, offset, o_row, m_row, LABELS)
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_pos = tl.zeros([BM], tl.float32)

    for t in range(i_split * tiles_split, tl.minimum((i_split + 1) * tiles_split, tl.cdiv(n, BN))):
        o_col = t * BN + tl.arange(0, BN)
        b_s = _similarity(b_u, p_u, p_v + tl.cast(t, tl.int64) * BN * D, m_row, D, BM, BN, BK, PRECISION)
        b_x = b_s * c
        if LABELS:
            positive = _same_class(b_class, p_class, o_col)
            if _special(t, i_row, n, half, offset, BM, BN, DIAG, False):
                valid = _valid(o_row, o_col, n, offset, DIAG)
                b_pos += tl.sum(tl.where(positive & valid, b_x, 0.0), 1)
                b_x = tl.where(valid, b_x, float("-inf"))
            else:
                b_pos += tl.sum(tl.where(positive, b_x, 0.0), 1)
            if DECOUPLED:
                b_x = tl.where(positive, float("-inf"), b_x)
        else:
            if _special(t, i_row, n, half, offset, BM, BN, DIAG, True):
                keep, positive = _valid(o_row, o_col, n, offset, DIAG), _partner(o_row, o_col, m, half, offset)
                b_pos += tl.sum(tl.where(positive, b_x, 0.0), 1)
                if DECOUPLED:
                    keep = keep & (positive == 0)
                b_x = tl.where(keep, b_x, float("-inf"))
        if ONLINE:
            b_new = tl.maximum(b_max, tl.max(b_x, 1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_x - b_safe[:, None]), 1)
            b_max = b_new
        else:
            b_sum += tl.sum(tl.exp2(b_x), 1)

    plane = tl.num_programs(1) * m
    p_stat += i_split * m + o_row
    tl.store(p_stat, b_sum, mask=m_row)
    tl.store(p_stat + plane, b_pos, mask=m_row)
    if ONLINE:
        tl.store(p_stat + 2 * plane, b_max, mask=m_row)


@triton.jit
def _scaled(b_w, ONLINE: tl.constexpr, GEXP: tl.constexpr):
    """w times 2^GEXP: a factor, or ONLINE an exponent."""
    if ONLINE:
        return b_w - GEXP
    else:
        return b_w * (2.0**GEXP)


@triton.jit
def _gradient_tile(
    b_s,
    b_wr,
    b_class,
    b_pull,
    t,
    i_row,
    o_row,
    p_w,
    p_class,
    m,
    n,
    half,
    offset,
    c,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DIAG: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GEXP: tl.constexpr,
    PULL: tl.constexpr,
):
    """The gradient with respect to the logits of row block i_row and column tile t, both directions, times 2^GEXP.

    Of positives it has the pull too: -PULL, or with labels -2 a_i, as a is the same for all rows of a class.
    """
    o_col = t * BN + tl.arange(0, BN)
    b_wc = _scaled(tl.load(p_w + o_col), ONLINE, GEXP)
    b_x = b_s * c
    if ONLINE:
        b_g = tl.exp2(b_x - b_wr[:, None]) + tl.exp2(b_x - b_wc[None, :])
    else:
        b_g = tl.exp2(b_x) * (b_wr[:, None] + b_wc[None, :])
    if LABELS:
        positive = _same_class(b_class, p_class, o_col)
        b_g = tl.where(positive, -b_pull[:, None] if DECOUPLED else b_g - b_pull[:, None], b_g)
        if _special(t, i_row, n, half, offset, BM, BN, DIAG, False):
            b_g = tl.where(_valid(o_row, o_col, n, offset, DIAG), b_g, 0.0)
    else:
        if _special(t, i_row, n, half, offset, BM, BN, DIAG, True):
            keep, positive = _valid(o_row, o_col, n, offset, DIAG), _partner(o_row, o_col, m, half, offset)
            if DECOUPLED:
                keep = keep & (positive == 0)
            b_g = tl.where(keep, b_g, 0.0) - tl.where(positive, PULL * (2.0**GEXP), 0.0)
    return b_g


@triton.jit(do_not_specialize=SIZES)
def row_gradients_kernel(
    p_u,
    p_v,
    p_class,
    p_w_row,
    p_w_col,
    p_a,
    p_acc,
    m,
    n,
    half,
    offset,
    tiles_split,
    c,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAG: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GEXP: tl.constexpr,
    PULL: tl.constexpr,
):
    """p_acc (splits, m, D) float32; w_row and a (m,); w_col and the classes as long as v."""
    i_row, i_split = tl.program_id(0), tl.program_id(1)
    o_row, o_d = i_row * BM + tl.arange(0, BM), tl.arange(0, D)
    m_row = o_row < m
    o_u, o_v = tl.arange(0, BM)[:, None] * D + o_d[None, :], tl.arange(0, BN)[:, None] * D + o_d[None, :]
    b_u = tl.load(p_u + i_row.to(tl.int64) * BM * D + o_u, mask=m_row[:, None], other=0.0)
    b_wr = _scaled(tl.load(p_w_row + o_row, mask=m_row, other=0.0), ONLINE, GEXP)
    b_class = _of_rows(p_class, offset, o_row, m_row, LABELS)
    b_pull = _of_rows(p_a, 0, o_row, m_row, LABELS) * (2.0 ** (GEXP + 1))
    b_acc = tl.zeros([BM, D], tl.float32)
    for t in range(i_split * tiles_split, tl.minimum((i_split + 1) * tiles_split, tl.cdiv(n, BN))):
        b_v = tl.load(p_v + tl.cast(t, tl.int64) * BN * D + o_v)
        b_s = tl.dot(b_u, tl.trans(b_v), input_precision=PRECISION)
        b_g = _gradient_tile(
            b_s,
            b_wr,
            b_class,
            b_pull,
            t,
            i_row,
            o_row,
            p_w_col,
            p_class,
            m,
            n,
            half,
            offset,
            c,
            BM,
            BN,
            DIAG,
            DECOUPLED,
            LABELS,
            ONLINE,
            GEXP,
            PULL,
        )
        b_acc = tl.dot(b_g.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    tl.store(p_acc + (i_split.to(tl.int64) * m + i_row * BM) * D + o_u, b_acc, mask=m_row[:, None])


@triton.jit(do_not_specialize=SIZES)
def gradient_chunk_kernel(
    p_u,
    p_v,
    p_class,
    p_w_row,
    p_w_col,
    p_a,
    p_g,
    first,
    m,
    n,
    n_padded,
    half,
    offset,
    c,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAG: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GEXP: tl.constexpr,
    PULL: tl.constexpr,
):
    """Where D is too wide to hold a row block of gradients: logit gradients of rows `first`.., for a matmul."""
    i_local, t = tl.program_id(0), tl.program_id(1)
    i_row = first // BM + i_local
    o_row = i_row * BM + tl.arange(0, BM)
    m_row = o_row < m
    p_u += i_row.to(tl.int64) * BM * D
    b_wr = _scaled(tl.load(p_w_row + o_row, mask=m_row, other=0.0), ONLINE, GEXP)
    b_class = _of_rows(p_class, offset, o_row, m_row, LABELS)
    b_pull = _of_rows(p_a, 0, o_row, m_row, LABELS) * (2.0 ** (GEXP + 1))
    b_s = _similarity(o_row, p_u, p_v + t.to(tl.int64) * BN * D, m_row, D, BM, BN, BK, PRECISION)
    b_g = _gradient_tile(
        b_s,
        b_wr,
        b_class,
        b_pull,
        t,
        i_row,
        o_row,
        p_w_col,
        p_class,
        m,
        n,
        half,
        offset,
        c,
        BM,
        BN,
        DIAG,
        DECOUPLED,
        LABELS,
        ONLINE,
        GEXP,
        PULL,
    )
    o_local = (i_local * BM + tl.arange(0, BM)).to(tl.int64)
    p_g += o_local[:, None] * n_padded + (t * BN + tl.arange(0, BN))[None, :]
    tl.store(p_g, b_g.to(p_g.dtype.element_ty))
