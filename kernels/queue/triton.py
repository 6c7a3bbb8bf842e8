"""The circular write in one launch: rows are normalised, cast and stored, and the last program to finish moves the
pointer, counting arrivals in its upper 32 bits meanwhile.  No host synchronisation.  Not measured yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, pow2
from ..ntxent.rows import inverse_norm


@triton.jit(do_not_specialize=("size", "n"))
def push_kernel(
    p_queue,
    sq_r,
    sq_d,
    p_pointer,
    p_rows,
    sr_r,
    sr_d,
    p_found_inf,
    size,
    n,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FLAG: tl.constexpr,
):
    if FLAG and tl.load(p_found_inf) != 0.0:
        return
    pointer = tl.load(p_pointer) & 0xFFFFFFFF
    o_row, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    mask = ((o_row < n) & (o_row >= n - size))[:, None] & (o_d < D)[None, :]  # of more rows than slots, the last stay
    o_row, o_d = o_row.to(tl.int64), o_d.to(tl.int64)
    b_x = tl.load(p_rows + o_row[:, None] * sr_r + o_d[None, :] * sr_d, mask=mask, other=0.0).to(tl.float32)
    b_x *= inverse_norm(b_x, NORMALIZE)[:, None]
    o_slot = (pointer + o_row) % size
    tl.store(p_queue + o_slot[:, None] * sq_r + o_d[None, :] * sq_d, b_x.to(p_queue.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # every thread has read the pointer before this program counts as arrived
    arrived = tl.atomic_add(p_pointer, 1 << 32) >> 32
    if arrived == tl.num_programs(0) - 1:
        tl.store(p_pointer, (pointer + n) % size)


def push(queue, pointer, rows, normalize, found_inf=None):
    n, d = rows.shape
    block_d = pow2(d)
    block_r = max(1, 1024 // block_d)
    push_kernel[(cdiv(n, block_r),)](
        queue,
        *queue.stride(),
        pointer,
        rows,
        *rows.stride(),
        found_inf,
        queue.shape[0],
        n,
        D=d,
        BD=block_d,
        BR=block_r,
        NORMALIZE=normalize,
        FLAG=found_inf is not None,
    )


@torch.library.custom_op("fastssl::enqueue", mutates_args=("queue", "pointer"))
def enqueue_(queue: Tensor, pointer: Tensor, rows: Tensor, normalize: bool, found_inf: Tensor | None) -> None:
    push(queue, pointer, rows, normalize, found_inf)


@enqueue_.register_fake
def _(queue, pointer, rows, normalize, found_inf):
    return None
