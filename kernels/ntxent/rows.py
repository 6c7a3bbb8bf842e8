"""The passes over rows around the tiles of tiles.py: normalise and cast before, losses and weights between, the
gradient of the normalisation after.  All memory-bound and small; everything is float32 inside.
"""

import triton
import triton.language as tl

LN2 = 0.6931471805599453
SIZES = ("m", "rows", "first", "splits")


@triton.jit
def _load_rows(p_x, stride_r, stride_d, o_row, o_d, mask, D: tl.constexpr):
    p = p_x + o_row.to(tl.int64)[:, None] * stride_r + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p, mask=mask[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(b_x, NORMALIZE: tl.constexpr):
    """1 / |row|, 0 for a zero row."""
    b_square = tl.sum(b_x * b_x, 1)
    b_inv = tl.where(b_square > 0, 1.0 / tl.sqrt(tl.where(b_square > 0, b_square, 1.0)), 0.0)
    if not NORMALIZE:
        b_inv = tl.full(b_inv.shape, 1.0, tl.float32)
    return b_inv


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    p_x,
    sx_r,
    sx_d,
    p_y,
    sy_r,
    sy_d,
    p_u,
    p_inv,
    p_dot,
    m,
    rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
    NORMALIZE_Y: tl.constexpr,
):
    """u = rows of x at unit length, cast, padded with zeros to (rows, DP); DOT: <x_i, y_i> of unit rows, not cast."""
    o_row, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_row = o_row < m
    b_x = _load_rows(p_x, sx_r, sx_d, o_row, o_d, m_row, D)
    b_inv = inverse_norm(b_x, NORMALIZE)
    b_u = (b_x * b_inv[:, None]).to(p_u.dtype.element_ty)
    tl.store(
        p_u + o_row.to(tl.int64)[:, None] * DP + o_d[None, :], b_u, mask=(o_row < rows)[:, None] & (o_d < DP)[None, :]
    )
    tl.store(p_inv + o_row, b_inv, mask=m_row)
    if DOT:
        b_y = _load_rows(p_y, sy_r, sy_d, o_row, o_d, m_row, D)
        b_x, b_y = b_x * b_inv[:, None], b_y * inverse_norm(b_y, NORMALIZE_Y)[:, None]
        tl.store(p_dot + o_row, tl.sum(b_x * b_y, 1), mask=m_row)


@triton.jit(do_not_specialize=("n", "slots"))
def classes_kernel(p_label, p_keys, p_count, p_class, n, slots, BR: tl.constexpr):
    """class: for each label its slot in a hash table (keys and counts, zeroed before), -1 past row n; count its rows.

    Which slot a label gets can change from run to run; that rows have the same one, and how many do, cannot.
    """
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    m_row = o_row < n
    b_label = tl.load(p_label + tl.where(m_row, o_row, 0))
    b_key = b_label ^ -9223372036854775808  # 0 marks a free slot, and no label is the lowest integer
    b_hash = (b_label ^ (b_label >> 32)).to(tl.uint32) * 2654435769
    b_slot = (b_hash ^ (b_hash >> 15)).to(tl.int32) & (slots - 1)
    pending = 1
    while pending > 0:
        b_found = tl.atomic_cas(p_keys + b_slot, tl.zeros([BR], tl.int64), b_key)
        b_taken = ((b_found != 0) & (b_found != b_key)).to(tl.int32)
        b_slot = (b_slot + b_taken) & (slots - 1)
        pending = tl.max(b_taken, 0)
    tl.atomic_add(p_count + b_slot, 1, mask=m_row)
    tl.store(p_class + o_row, tl.where(m_row, b_slot, -1))


@triton.jit(do_not_specialize=(*SIZES, "offset"))
def row_losses_kernel(
    p_stat,
    p_class,
    p_count,
    p_w,
    p_a,
    p_loss,
    m,
    splits,
    offset,
    factor,
    BR: tl.constexpr,
    LABELS: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Each row's weight w in the gradient, (LABELS) one over the number of its positives, or 0, and the sum of the
    rows' losses, in powers of two, times factor."""
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    m_row = o_row < m
    plane = splits * m
    b_sum = tl.zeros([BR], tl.float32)
    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_pos = tl.zeros([BR], tl.float32)
    if ONLINE:
        for s in range(0, splits):
            b_max = tl.maximum(b_max, tl.load(p_stat + 2 * plane + s * m + o_row, mask=m_row, other=0.0))
    for s in range(0, splits):
        p = p_stat + s * m + o_row
        b_part = tl.load(p, mask=m_row, other=1.0)
        if ONLINE:
            b_part_max = tl.load(p + 2 * plane, mask=m_row, other=0.0)
            b_part *= tl.where(b_part_max == float("-inf"), 0.0, tl.exp2(b_part_max - b_max))
        b_sum += b_part
        b_pos += tl.load(p + plane, mask=m_row, other=0.0)

    active = (b_sum > 0) | (b_sum != b_sum)  # what is not a number must show in the loss
    if LABELS:
        b_class = tl.load(p_class + offset + o_row, mask=m_row, other=0)
        b_count = tl.load(p_count + b_class, mask=m_row, other=0).to(tl.float32) - 1.0  # without itself
        active = active & (b_count > 0)
        b_pos = b_pos / tl.maximum(b_count, 1.0)
        tl.store(p_a + o_row, tl.where(active, 1.0 / tl.maximum(b_count, 1.0), 0.0), mask=m_row)
    b_log = tl.log2(tl.where(active, b_sum, 1.0))
    if ONLINE:
        b_log += tl.where(active, b_max, 0.0)
        tl.store(p_w + o_row, tl.where(active, b_log, float("inf")), mask=m_row)
    else:
        tl.store(p_w + o_row, tl.where(active, 1.0 / tl.where(active, b_sum, 1.0), 0.0), mask=m_row)
    tl.store(p_loss + tl.program_id(0), tl.sum(tl.where(active & m_row, b_log - b_pos, 0.0), 0) * factor)


@triton.jit(do_not_specialize=SIZES)
def row_gradients_end_kernel(
    p_acc,
    p_x,
    sx_r,
    sx_d,
    p_inv,
    p_grad,
    p_out,
    m,
    rows,
    first,
    splits,
    factor,
    D: tl.constexpr,
    DP: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Adds the splits of acc (splits, rows, DP), scaled by SCALE, and applies the gradient of the normalisation.

    acc's row 0 is row `first` of x; out (m, D) is contiguous.
    """
    o_local, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    o_row = first + o_local
    m_row = (o_local < rows) & (o_row < m)
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    b_acc = tl.zeros([BR, BD], tl.float32)
    p_acc += o_local.to(tl.int64)[:, None] * DP + o_d[None, :]
    for _ in range(0, splits):
        b_acc += tl.load(p_acc, mask=m_tile, other=0.0)
        p_acc += rows.to(tl.int64) * DP
    b_acc *= SCALE
    if NORMALIZE:
        b_inv = tl.load(p_inv + o_row, mask=m_row, other=0.0)
        b_u = _load_rows(p_x, sx_r, sx_d, o_row, o_d, m_row, D) * b_inv[:, None]
        b_acc = (b_acc - b_u * tl.sum(b_u * b_acc, 1)[:, None]) * b_inv[:, None]
    b_acc *= factor * tl.load(p_grad).to(tl.float32)
    tl.store(p_out + o_row.to(tl.int64)[:, None] * D + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_tile)
