"""Tables of the addresses of tensors, so that one launch processes all tensors of a list."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiling import cdiv

CHUNK = 8192  # elements of a tensor that one program processes


class Table(NamedTuple):
    addresses: Tensor  # (lists, n) int64
    sizes: Tensor  # (n,) int64, elements of each tensor
    chunks: Tensor  # (num_chunks, 2) int32: number of the tensor, number of the chunk in it
    begin: Tensor  # (n + 1,) int32: number of each tensor's first chunk
    aligned: bool  # every address is a multiple of 16
    pinned: tuple[Tensor, ...]  # the copies on the host, which a captured graph reads again at every replay


_captured: list[Table] = []  # a captured graph has the addresses of these tables: never freed


def table(*lists: list[Tensor]) -> Table:
    device = lists[0][0].device
    sizes = tuple(t.numel() for t in lists[0])
    for tensors in lists:
        for a, b in zip(lists[0], tensors):
            if not _same_layout(a, b):
                raise ValueError(
                    f"multi_tensor: the elements of tensors with strides {a.stride()} and {b.stride()} are in "
                    "different orders in memory: make both contiguous"
                )
    addresses = tuple(tuple(t.data_ptr() if device.type != "meta" else 0 for t in tensors) for tensors in lists)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(_table.__wrapped__(device, sizes, addresses))
        return _captured[-1]
    return _table(device, sizes, addresses)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether both tensors are dense, with their elements in the same order in memory."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=64)  # the addresses of gradients repeat from step to step
def _table(device: torch.device, sizes: tuple, addresses: tuple) -> Table:
    counts = [cdiv(size, CHUNK) for size in sizes]
    begin = [0]
    for count in counts:
        begin.append(begin[-1] + count)
    chunks = [(i, c) for i, count in enumerate(counts) for c in range(count)]
    columns = (addresses, torch.int64), (sizes, torch.int64), (chunks, torch.int32), (begin, torch.int32)
    pinned = tuple(torch.tensor(x, dtype=dtype, pin_memory=device.type == "cuda") for x, dtype in columns)
    pointers, elements, numbers, starts = (x.to(device, non_blocking=True) for x in pinned)
    aligned = all(a % 16 == 0 for row in addresses for a in row)
    return Table(pointers, elements, numbers, starts, aligned, pinned)
