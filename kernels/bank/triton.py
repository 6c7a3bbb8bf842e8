"""Bank update in one launch (gather, mix, normalise, scatter; the last of equal indices wins), and centroids as a
segmented reduction over rows sorted by label: no atomics, no host synchronisation.  Not measured yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import pow2
from ..ntxent.rows import inverse_norm


@triton.jit(do_not_specialize=("size", "n"))
def update_kernel(
    p_bank,
    sb_r,
    sb_d,
    p_index,
    si,
    p_rows,
    sr_r,
    sr_d,
    p_found_inf,
    momentum,
    size,
    n,
    D: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    FLAG: tl.constexpr,
):
    """One program a row.  It looks for its index among the rows after it; only the last to have it writes."""
    if FLAG and tl.load(p_found_inf) != 0.0:
        return
    i = tl.program_id(0)
    own = tl.load(p_index + i * si)
    n_later = 0
    for first in range((i + 1) // BI * BI, n, BI):
        o = first + tl.arange(0, BI)
        b_index = tl.load(p_index + o * si, mask=(o > i) & (o < n), other=-1)
        n_later += tl.sum((b_index == own).to(tl.int32), 0)
    o_d = tl.arange(0, BD)
    mask = (o_d < D) & (own >= 0) & (own < size) & (n_later == 0)
    p = p_bank + own * sb_r + o_d.to(tl.int64) * sb_d
    b_old = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    p_rows += i.to(tl.int64) * sr_r
    b_new = tl.load(p_rows + o_d.to(tl.int64) * sr_d, mask=mask, other=0.0).to(tl.float32)
    b = ((1.0 - momentum) * b_old + momentum * b_new)[None, :]
    b *= inverse_norm(b, True)[:, None]
    tl.store(p, tl.reshape(b, [BD]).to(p_bank.dtype.element_ty), mask=mask)


@triton.jit
def centroids_kernel(
    p_out, so_r, so_d, p_bank, sb_r, sb_d, p_order, p_start, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):
    """One program a centroid: adds the rows order[start[k]:start[k + 1]] of the bank."""
    k = tl.program_id(0)
    start, stop = tl.load(p_start + k), tl.load(p_start + k + 1)
    o_r, o_d = tl.arange(0, BR), tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    for first in range(start, stop, BR):
        m_r = first + o_r < stop
        o_row = tl.load(p_order + first + o_r, mask=m_r, other=0)
        p = p_bank + o_row[:, None] * sb_r + o_d.to(tl.int64)[None, :] * sb_d
        b_sum += tl.sum(tl.load(p, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32), 0)
    p_out += k.to(tl.int64) * so_r
    b_mean = b_sum / tl.maximum(stop - start, 1).to(tl.float32)
    tl.store(p_out + o_d.to(tl.int64) * so_d, b_mean.to(p_out.dtype.element_ty), mask=(o_d < D) & (stop > start))


def update(bank, index, rows, momentum, found_inf=None):
    n, d = rows.shape
    update_kernel[(n,)](
        bank,
        *bank.stride(),
        index,
        index.stride(0),
        rows,
        *rows.stride(),
        found_inf,
        momentum,
        bank.shape[0],
        n,
        D=d,
        BD=pow2(d),
        BI=256,
        FLAG=found_inf is not None,
        num_warps=1 if d <= 256 else 4,
    )


def centroids(out, bank, labels):
    ordered, order = torch.sort(labels, stable=True)
    start = torch.searchsorted(ordered, torch.arange(out.shape[0] + 1, device=labels.device))
    block_d = pow2(bank.shape[1])
    centroids_kernel[(out.shape[0],)](
        out, *out.stride(), bank, *bank.stride(), order, start, D=bank.shape[1], BD=block_d, BR=max(1, 4096 // block_d)
    )


@torch.library.custom_op("fastssl::update_bank", mutates_args=("bank",))
def update_bank_(bank: Tensor, index: Tensor, rows: Tensor, momentum: float, found_inf: Tensor | None) -> None:
    update(bank, index, rows, momentum, found_inf)


@torch.library.custom_op("fastssl::update_centroids", mutates_args=("out",))
def update_centroids_(out: Tensor, bank: Tensor, labels: Tensor) -> None:
    centroids(out, bank, labels)


@update_bank_.register_fake
def _(bank, index, rows, momentum, found_inf):
    return None


@update_centroids_.register_fake
def _(out, bank, labels):
    return None
