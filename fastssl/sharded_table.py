"""A table with one row per sample of the training set, of which each rank holds a contiguous range of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastssl import dist


class Sliceable(Protocol):
    """A tensor, or one in files of which only the rows [a:b] are read (checkpoint.pieces)."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor: ...


class ShardedTable(nn.Module):
    """(N, ...) rows, zero at first.  This rank has `local_rows`, those of the samples `local_range` (`dist.shard`).

    The rows are neither parameters nor buffers: DeepSpeed does not save them, and `dist.sync_buffers` leaves them as
    they are.  Each rank writes its rows to a checkpoint, under the name of this module, and any number of ranks can
    load the table (`load_`).
    """

    def __init__(self, samples: int, *shape: int):
        super().__init__()
        self.samples, self.local_range = samples, dist.shard(samples)
        # one row more, to which `write_` sends the rows of other ranks: shapes then do not depend on the samples
        self._storage = torch.zeros(self.local_range.stop - self.local_range.start + 1, *shape)

    @property
    def local_rows(self) -> Tensor:
        """(n_r, ...) rows of this rank."""
        return self._storage[:-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedTable:
        self._storage = fn(self._storage)
        return super()._apply(fn, recurse)

    def is_local(self, index: Tensor) -> Tensor:
        """bool (n,): which of the samples `index` (n,) have their rows on this rank."""
        return (index >= self.local_range.start) & (index < self.local_range.stop)

    def lookup(self, index: Tensor) -> Tensor:
        """(n, ...) rows of the samples `index` (n,), equal on all ranks."""
        if dist.world() == 1:
            return self.local_rows[index]
        local = self.is_local(index)
        out = self._storage.new_zeros(len(index), *self._storage.shape[1:])
        out[local] = self.local_rows[index[local] - self.local_range.start]
        return dist.sum_(out)

    @torch.no_grad()
    def write_(self, index: Tensor, rows: Tensor, found_inf: Tensor | None = None) -> None:
        """Set the rows of the samples `index` (n,) to `rows` (n, ...), both equal on all ranks.  Where `found_inf`
        (0-dim) is not zero nothing changes.  The host does not wait for the device."""
        if dist.world() > 1:
            index = torch.where(self.is_local(index), index - self.local_range.start, len(self._storage) - 1)
        if found_inf is not None:
            rows = torch.where(found_inf != 0, self._storage[index], rows)
        self._storage[index] = rows

    @torch.no_grad()
    def fill_(self, rows: Tensor, index: Tensor) -> None:
        """Set all rows: each rank passes rows (n_r, ...) of samples index (n_r,), together every sample once."""
        for rank in range(dist.world()):  # one rank's rows at a time, since the table may not fit on a device
            shard = dist.shard(self.samples, rank)
            inside = (index >= shard.start) & (index < shard.stop)
            part = self._storage.new_zeros(shard.stop - shard.start, *self._storage.shape[1:])
            part[index[inside] - shard.start] = rows[inside]
            dist.sum_(part)
            if rank == dist.rank():
                self.local_rows.copy_(part)

    def full_table(self, everywhere: bool = False) -> Tensor | None:
        """(N, ...) on the CPU of rank 0 (elsewhere None), or of every rank; all ranks must call it."""
        wanted, parts = everywhere or dist.is_main(), []
        for rank in range(dist.world()):
            shard = dist.shard(self.samples, rank)
            shape = shard.stop - shard.start, *self._storage.shape[1:]
            part = self.local_rows.clone() if rank == dist.rank() else self._storage.new_empty(shape)
            part = dist.broadcast_(part, rank)
            if wanted:
                parts.append(part.cpu())
        return torch.cat(parts) if wanted else None

    @torch.no_grad()
    def load_(self, table: Tensor | Sliceable) -> None:
        """Take this rank's rows of `table` (N, ...)."""
        shape, needed = tuple(table.shape), (self.samples, *self._storage.shape[1:])
        if shape != needed:
            raise ValueError(f"a table of shape {shape} was saved, and {needed} is needed")
        self.local_rows.copy_(table[self.local_range])
