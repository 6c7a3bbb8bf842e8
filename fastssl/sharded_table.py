"""A table with one row per sample of the training set, of which each rank holds a contiguous block."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from fastssl import dist


class Whole(Protocol):
    """A tensor of which parts are read where they are needed (checkpoint.pieces)."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor: ...


class ShardedTable(nn.Module):
    """(N, ...) rows, zero at first; this rank's are `block`, those of the samples `shard` (`dist.shard`).

    The rows are neither parameters nor buffers: DeepSpeed does not save them, and `dist.sync_buffers` leaves them as
    they are.  Each rank writes its block to a checkpoint, under the name of this module, and any number of ranks can
    load the table (`load_`).
    """

    def __init__(self, samples: int, *shape: int):
        super().__init__()
        self.samples, self.shard = samples, dist.shard(samples)
        # one row more, to which `write_` sends the rows of other ranks: shapes then do not depend on the samples
        self._rows = torch.zeros(self.shard.stop - self.shard.start + 1, *shape)

    @property
    def block(self) -> Tensor:
        """(n_r, ...) rows of this rank."""
        return self._rows[:-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedTable:
        self._rows = fn(self._rows)
        return super()._apply(fn, recurse)

    def is_local(self, index: Tensor) -> Tensor:
        """bool (n,): which of the samples `index` (n,) have their rows on this rank."""
        return (index >= self.shard.start) & (index < self.shard.stop)

    def rows(self, index: Tensor) -> Tensor:
        """(n, ...) rows of the samples `index` (n,), equal on all ranks."""
        if dist.world() == 1:
            return self.block[index]
        local = self.is_local(index)
        out = self._rows.new_zeros(len(index), *self._rows.shape[1:])
        out[local] = self.block[index[local] - self.shard.start]
        return dist.sum_(out)

    @torch.no_grad()
    def write_(self, index: Tensor, rows: Tensor, found_inf: Tensor | None = None) -> None:
        """Set the rows of the samples `index` (n,) to `rows` (n, ...), both equal on all ranks.  Where `found_inf`
        (0-dim) is not zero nothing changes.  The host does not wait for the device."""
        if dist.world() > 1:
            index = torch.where(self.is_local(index), index - self.shard.start, len(self._rows) - 1)
        if found_inf is not None:
            rows = torch.where(found_inf != 0, self._rows[index], rows)
        self._rows[index] = rows

    @torch.no_grad()
    def fill_(self, rows: Tensor, index: Tensor) -> None:
        """Set all rows: each rank passes rows (n_r, ...) of samples index (n_r,), together every sample once."""
        for rank in range(dist.world()):  # one block at a time, since the whole may not fit on a device
            shard = dist.shard(self.samples, rank)
            inside = (index >= shard.start) & (index < shard.stop)
            block = self._rows.new_zeros(shard.stop - shard.start, *self._rows.shape[1:])
            block[index[inside] - shard.start] = rows[inside]
            dist.sum_(block)
            if rank == dist.rank():
                self.block.copy_(block)

    def full(self, everywhere: bool = False) -> Tensor | None:
        """(N, ...) on the CPU of rank 0 (elsewhere None), or of every rank; all ranks must call it."""
        blocks = self._blocks()
        if everywhere or dist.is_main():
            return torch.cat([block.cpu() for block in blocks])
        deque(blocks, maxlen=0)
        return None

    def _blocks(self) -> Iterator[Tensor]:
        """The blocks of all ranks, one at a time."""
        for rank in range(dist.world()):
            shard = dist.shard(self.samples, rank)
            size = shard.stop - shard.start
            block = self.block.clone() if rank == dist.rank() else self._rows.new_empty(size, *self._rows.shape[1:])
            yield dist.broadcast_(block, rank)

    @torch.no_grad()
    def load_(self, table: Tensor | Whole) -> None:
        """Take this rank's rows of `table` (N, ...)."""
        shape, needed = tuple(table.shape), (self.samples, *self._rows.shape[1:])
        if shape != needed:
            raise ValueError(f"a table of shape {shape} was saved, and {needed} is needed")
        self.block.copy_(table[self.shard])
