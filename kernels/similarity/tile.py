"""One tile of the similarity matrix inside a kernel: its products, which of its entries count, and their gradients."""

import triton
import triton.language as tl


@triton.jit
def load_if_labels(ptr, first, offs_m, mask_m, LABELS: tl.constexpr):
    """Values of this block's rows; without labels an unused placeholder."""
    if LABELS:
        return tl.load(ptr + first + offs_m, mask=mask_m, other=0)
    else:
        return offs_m


@triton.jit
def valid_entries(offs_m, offs_n, N, rank_offset, EXCLUDE_SELF: tl.constexpr):
    """Entries that exist: not past the last column and (EXCLUDE_SELF) not a row with itself.

    Rows past the last one are computed like any other and never stored.
    """
    valid = (offs_n < N)[None, :]
    if EXCLUDE_SELF:
        return valid & ((offs_m + rank_offset)[:, None] != offs_n[None, :])
    else:
        return valid


@triton.jit
def is_positive(offs_m, offs_n, M, positive_offset, rank_offset):
    return ((offs_m + positive_offset) % M + rank_offset)[:, None] == offs_n[None, :]


@triton.jit
def same_class(classes, class_ptr, offs_n):
    return classes[:, None] == tl.load(class_ptr + offs_n)[None, :]


@triton.jit
def similarity_tile(
    u,
    u_ptr,  # (BLOCK_M, D) first row of the block
    v_ptr,  # (BLOCK_N, D) first column of the tile
    mask_m,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The tile u v^T (BLOCK_M, BLOCK_N) in float32.

    BLOCK_K = D: u is the whole block of rows, in registers.  BLOCK_K < D: both sides are read chunk by chunk, and u is
    not used.
    """
    offs_u, offs_v = tl.arange(0, BLOCK_M)[:, None] * D, tl.arange(0, BLOCK_N)[:, None] * D
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_K == D:
        s = tl.dot(u, tl.trans(tl.load(v_ptr + offs_v + offs_k)), s, input_precision=INPUT_PRECISION)
    else:
        for k in range(0, D, BLOCK_K):
            u_k = tl.load(u_ptr + offs_u + (k + offs_k), mask=mask_m[:, None], other=0.0)
            s = tl.dot(u_k, tl.trans(tl.load(v_ptr + offs_v + (k + offs_k))), s, input_precision=INPUT_PRECISION)
    return s


@triton.jit
def needs_mask(
    t,
    pid_m,
    N,
    positive_offset,
    rank_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    POSITIVES: tl.constexpr,
):
    """Whether column tile t may contain the diagonal, positives of this block of rows, or the last column."""
    row, col = pid_m * BLOCK_M, t * BLOCK_N - rank_offset
    needed = (t + 1) * BLOCK_N > N
    if EXCLUDE_SELF:
        needed = needed | ((col < row + BLOCK_M) & (col + BLOCK_N > row))
    if POSITIVES:
        needed = needed | ((col < row + BLOCK_M + positive_offset) & (col + BLOCK_N > row + positive_offset))
        needed = needed | ((col < row + BLOCK_M - positive_offset) & (col + BLOCK_N > row - positive_offset))
    return needed


@triton.jit
def scale_weight(w, ONLINE: tl.constexpr, GRAD_SCALE_LOG2: tl.constexpr):
    """w times 2^GRAD_SCALE_LOG2, which is a factor, or ONLINE an exponent."""
    if ONLINE:
        return w - GRAD_SCALE_LOG2
    else:
        return w * (2.0**GRAD_SCALE_LOG2)


@triton.jit
def load_rows(
    pid_m,
    offs_m,
    mask_m,
    row_ptrs,  # w and, if LABELS, 1 / number of positives, of this rank's rows
    class_ptr,
    rank_offset,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GRAD_SCALE_LOG2: tl.constexpr,
):
    """The block of rows pid_m for logit_gradient_tile: pid_m, offs_m, w, and if LABELS the class and what is subtracted
    at each positive."""
    w_ptr, inv_positives_ptr = row_ptrs
    w = scale_weight(tl.load(w_ptr + offs_m, mask=mask_m, other=0.0), ONLINE, GRAD_SCALE_LOG2)
    row_class = load_if_labels(class_ptr, rank_offset, offs_m, mask_m, LABELS)
    positive_grad = load_if_labels(inv_positives_ptr, 0, offs_m, mask_m, LABELS) * (2.0 ** (GRAD_SCALE_LOG2 + 1))
    return pid_m, offs_m, w, row_class, positive_grad


@triton.jit
def logit_gradient_tile(
    s,  # (BLOCK_M, BLOCK_N) similarities
    t,
    rows,  # of load_rows
    columns,  # w_col_ptr, class_ptr
    sizes,  # M, N, positive_offset, rank_offset
    scale,
    EXCLUDE_SELF: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
    GRAD_SCALE_LOG2: tl.constexpr,
    POSITIVE_GRAD: tl.constexpr,
):
    """The gradient of both directions with respect to the logits of a tile, times 2^GRAD_SCALE_LOG2.

    POSITIVE_GRAD is subtracted at a row's positive; with labels it is 2 / number of positives, equal for all rows of a
    class.
    """
    BLOCK_M: tl.constexpr = s.shape[0]
    BLOCK_N: tl.constexpr = s.shape[1]
    pid_m, offs_m, w_row, row_class, positive_grad = rows
    w_col_ptr, class_ptr = columns
    M, N, positive_offset, rank_offset = sizes
    offs_n = t * BLOCK_N + tl.arange(0, BLOCK_N)
    w_col = scale_weight(tl.load(w_col_ptr + offs_n), ONLINE, GRAD_SCALE_LOG2)
    x = s * scale
    if ONLINE:
        g = tl.exp2(x - w_row[:, None]) + tl.exp2(x - w_col[None, :])
    else:
        g = tl.exp2(x) * (w_row[:, None] + w_col[None, :])
    if LABELS:
        positive = same_class(row_class, class_ptr, offs_n)
        g = tl.where(positive, -positive_grad[:, None] if DECOUPLED else g - positive_grad[:, None], g)
        if needs_mask(t, pid_m, N, positive_offset, rank_offset, BLOCK_M, BLOCK_N, EXCLUDE_SELF, False):
            g = tl.where(valid_entries(offs_m, offs_n, N, rank_offset, EXCLUDE_SELF), g, 0.0)
    else:
        if needs_mask(t, pid_m, N, positive_offset, rank_offset, BLOCK_M, BLOCK_N, EXCLUDE_SELF, True):
            summed = valid_entries(offs_m, offs_n, N, rank_offset, EXCLUDE_SELF)
            positive = is_positive(offs_m, offs_n, M, positive_offset, rank_offset)
            if DECOUPLED:
                summed = summed & (positive == 0)
            g = tl.where(summed, g, 0.0) - tl.where(positive, POSITIVE_GRAD * (2.0**GRAD_SCALE_LOG2), 0.0)
    return g
