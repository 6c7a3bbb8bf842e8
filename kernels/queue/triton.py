"""The circular write in one launch: rows are normalised, cast and stored, and the last program to finish moves the
pointer, whose upper 32 bits count finished programs meanwhile.  No host synchronisation.  Not measured yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import inverse_norm
from ..tiling import cdiv, next_power_of_2


@triton.jit(do_not_specialize=("K", "N"))
def enqueue_kernel(
    queue_ptr,  # (K, D), any float, in place
    stride_qk,
    stride_qd,
    pointer_ptr,  # () int64, in place
    rows_ptr,  # (N, D), any float
    stride_rn,
    stride_rd,
    found_inf_ptr,  # () float32, if CHECK_INF
    K,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHECK_INF: tl.constexpr,
):
    if CHECK_INF and tl.load(found_inf_ptr) != 0.0:
        return
    pointer = tl.load(pointer_ptr) & 0xFFFFFFFF
    offs_n, offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask = ((offs_n < N) & (offs_n >= N - K))[:, None] & (offs_d < D)[None, :]  # of more than K rows, the last K
    offs_n, offs_d = offs_n.to(tl.int64), offs_d.to(tl.int64)
    row_ptrs = rows_ptr + offs_n[:, None] * stride_rn + offs_d[None, :] * stride_rd
    x = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
    x *= inverse_norm(x, NORMALIZE)[:, None]
    slots = (pointer + offs_n) % K
    queue_ptrs = queue_ptr + slots[:, None] * stride_qk + offs_d[None, :] * stride_qd
    tl.store(queue_ptrs, x.to(queue_ptr.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # every thread has read the pointer before this program counts as finished
    num_finished = tl.atomic_add(pointer_ptr, 1 << 32) >> 32
    if num_finished == tl.num_programs(0) - 1:
        tl.store(pointer_ptr, (pointer + N) % K)


def enqueue(queue: Tensor, pointer: Tensor, rows: Tensor, normalize: bool, found_inf: Tensor | None = None) -> None:
    n, d = rows.shape
    block_d = next_power_of_2(d)
    block_n = max(1, 1024 // block_d)
    enqueue_kernel[(cdiv(n, block_n),)](
        queue,
        *queue.stride(),
        pointer,
        rows,
        *rows.stride(),
        found_inf,
        queue.shape[0],
        n,
        D=d,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        NORMALIZE=normalize,
        CHECK_INF=found_inf is not None,
    )


enqueue_ = torch.library.custom_op("fastssl::enqueue", enqueue, mutates_args=("queue", "pointer"))
