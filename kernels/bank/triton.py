"""Bank update in one launch (gather, mix, normalise, scatter; the last of equal indices wins), and centroids as a
segmented reduction over rows sorted by label: no atomics, no host synchronisation.  Not measured yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import inverse_norm
from ..tiling import next_power_of_2


@triton.jit(do_not_specialize=("S", "N"))
def update_bank_kernel(
    bank_ptr,  # (S, D), any float, in place
    stride_bs,
    stride_bd,
    index_ptr,  # (N,) int64, rows of the bank
    stride_in,
    rows_ptr,  # (N, D), any float
    stride_rn,
    stride_rd,
    found_inf_ptr,  # () float32, if CHECK_INF
    momentum,
    S,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK_INF: tl.constexpr,
):
    """One program a row.  It looks for its index among the rows after it; only the last one with that index writes."""
    if CHECK_INF and tl.load(found_inf_ptr) != 0.0:
        return
    i = tl.program_id(0)
    own = tl.load(index_ptr + i * stride_in)
    num_later = 0
    for first in range((i + 1) // BLOCK_N * BLOCK_N, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        index = tl.load(index_ptr + offs_n * stride_in, mask=(offs_n > i) & (offs_n < N), other=-1)
        num_later += tl.sum((index == own).to(tl.int32), 0)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_d < D) & (own >= 0) & (own < S) & (num_later == 0)
    bank_ptrs = bank_ptr + own * stride_bs + offs_d.to(tl.int64) * stride_bd
    old = tl.load(bank_ptrs, mask=mask, other=0.0).to(tl.float32)
    rows_ptr += i.to(tl.int64) * stride_rn
    new = tl.load(rows_ptr + offs_d.to(tl.int64) * stride_rd, mask=mask, other=0.0).to(tl.float32)
    mix = ((1.0 - momentum) * old + momentum * new)[None, :]
    mix *= inverse_norm(mix, True)[:, None]
    tl.store(bank_ptrs, tl.reshape(mix, [BLOCK_D]).to(bank_ptr.dtype.element_ty), mask=mask)


@triton.jit
def update_centroids_kernel(
    out_ptr,  # (K, D), any float, in place
    stride_ok,
    stride_od,
    bank_ptr,  # (S, D), any float
    stride_bs,
    stride_bd,
    order_ptr,  # (S,) int64: rows of the bank sorted by label
    start_ptr,  # (K + 1,) int64: where a label's rows begin in order
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program a centroid: the mean of the rows order[start[k]:start[k + 1]] of the bank."""
    k = tl.program_id(0)
    start, stop = tl.load(start_ptr + k), tl.load(start_ptr + k + 1)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_S):
        mask_s = first + offs_s < stop
        rows = tl.load(order_ptr + first + offs_s, mask=mask_s, other=0)
        ptrs = bank_ptr + rows[:, None] * stride_bs + offs_d.to(tl.int64)[None, :] * stride_bd
        total += tl.sum(tl.load(ptrs, mask=mask_s[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32), 0)
    out_ptr += k.to(tl.int64) * stride_ok
    mean = total / tl.maximum(stop - start, 1).to(tl.float32)
    out_ptrs = out_ptr + offs_d.to(tl.int64) * stride_od
    tl.store(out_ptrs, mean.to(out_ptr.dtype.element_ty), mask=(offs_d < D) & (stop > start))


def update_bank(bank: Tensor, index: Tensor, rows: Tensor, momentum: float, found_inf: Tensor | None = None) -> None:
    n, d = rows.shape
    update_bank_kernel[(n,)](
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
        BLOCK_D=next_power_of_2(d),
        BLOCK_N=256,
        CHECK_INF=found_inf is not None,
        num_warps=1 if d <= 256 else 4,
    )


def update_centroids(out: Tensor, bank: Tensor, labels: Tensor) -> None:
    ordered, order = torch.sort(labels, stable=True)
    start = torch.searchsorted(ordered, torch.arange(out.shape[0] + 1, device=labels.device))
    block_d = next_power_of_2(bank.shape[1])
    update_centroids_kernel[(out.shape[0],)](
        out,
        *out.stride(),
        bank,
        *bank.stride(),
        order,
        start,
        D=bank.shape[1],
        BLOCK_D=block_d,
        BLOCK_S=max(1, 4096 // block_d),
    )


update_bank_ = torch.library.custom_op("fastssl::update_bank", update_bank, mutates_args=("bank",))
update_centroids_ = torch.library.custom_op("fastssl::update_centroids", update_centroids, mutates_args=("out",))
