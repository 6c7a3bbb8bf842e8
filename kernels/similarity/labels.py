"""Mapping of 64-bit labels to 32-bit classes, which need half as many registers in the tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import ROW_PADDING, next_power_of_2


@triton.jit(do_not_specialize=("N", "num_slots"))
def classes_kernel(
    label_ptr,  # (N,) int64
    keys_ptr,  # (num_slots,) int64, zeroed: the hash table's keys
    count_ptr,  # (num_slots,) int32, zeroed: rows of each class
    class_ptr,  # (multiple of BLOCK_M,) int32 out: each label's slot in the hash table, -1 past row N
    N,
    num_slots,
    BLOCK_M: tl.constexpr,
):
    """The class of a label, a slot of the hash table, can differ between runs; which classes are equal, and counts, do
    not."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    label = tl.load(label_ptr + tl.where(mask_m, offs_m, 0))
    key = label ^ -9223372036854775808  # 0 marks a free slot, and no label is the lowest integer
    hashed = (label ^ (label >> 32)).to(tl.uint32) * 2654435769
    slot = (hashed ^ (hashed >> 15)).to(tl.int32) & (num_slots - 1)
    pending = 1
    while pending > 0:
        found = tl.atomic_cas(keys_ptr + slot, tl.zeros([BLOCK_M], tl.int64), key)
        taken = ((found != 0) & (found != key)).to(tl.int32)
        slot = (slot + taken) & (num_slots - 1)
        pending = tl.max(taken, 0)
    tl.atomic_add(count_ptr + slot, 1, mask=mask_m)
    tl.store(class_ptr + offs_m, tl.where(mask_m, slot, -1))


def classes_of(labels: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Classes, int32 (padded,), equal where the labels (N,) are and -1 past row N; and the rows of each class."""
    n, num_slots = len(labels), next_power_of_2(2 * len(labels))  # at most half full
    table = torch.zeros(num_slots + num_slots // 2, dtype=torch.int64, device=labels.device)
    keys, count = table[:num_slots], table[num_slots:].view(torch.int32)
    classes = torch.empty(padded, dtype=torch.int32, device=labels.device)
    classes_kernel[(padded // ROW_PADDING,)](
        labels, keys, count, classes, n, num_slots, BLOCK_M=ROW_PADDING, num_warps=4
    )
    return classes, count
