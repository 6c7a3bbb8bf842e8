"""MoCo's queue of keys: normalise, cast and write rows into a circular buffer, whose pointer stays on the device."""

import torch
from torch import Tensor

from ..common import Impl, check_rows, check_triton_dtype, choose
from . import reference


def enqueue_(
    queue: Tensor,
    pointer: Tensor,
    rows: Tensor,
    *,
    normalize: bool = True,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Write rows (n, D) into queue (K, D) at pointer, pointer + 1, ... mod K, in place; returns queue.

    pointer: one int64 in [0, K) on the queue's device, advanced by n mod K.  Of more than K rows the last K are kept.
    normalize: scale rows to unit length first (a zero row stays zero).  No gradient.
    found_inf: None, or a 0-dim float32 tensor on the device; if it is not zero, nothing changes.
    """
    check_rows("enqueue_", queue=queue, rows=rows)
    if pointer.dtype != torch.int64 or pointer.numel() != 1 or pointer.device != queue.device:
        raise ValueError(
            f"enqueue_: pointer is {pointer.dtype} {tuple(pointer.shape)} on {pointer.device}: "
            f"expected one int64 on {queue.device}"
        )
    if queue.shape[0] == 0:
        raise ValueError("enqueue_: the queue has no rows")
    if rows.shape[0] == 0:
        return queue
    with torch.no_grad():
        if choose(impl, queue) == "reference":
            reference.enqueue_(queue, pointer, rows, normalize, found_inf)
        else:
            check_triton_dtype("enqueue_", queue=queue, rows=rows)
            from . import triton

            triton.enqueue_(queue, pointer, rows, normalize, found_inf)
    return queue
