"""Parameters of the two passes: the entries of the matrix, the rows, and the tiles."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..collectives import Group, rank_world
from ..tiling import MAX_D_IN_REGISTERS, Tiles, needs_small_tiles

# At this temperature |scale * s| <= 1 / (ln 2 * 0.015) = 96.2, so 2^(scale s) and, for up to 2^30 rows, 1 / r stay
# within float32's range.
LOWEST_TEMPERATURE = 0.015


class LossSpec(NamedTuple):
    """Which entries of the similarity matrix count, and how their exponentials are kept in range."""

    temperature: float
    normalize: bool
    exclude_self: bool = False  # leave out a row's similarity to itself
    decoupled: bool = False  # leave positives out of the sums
    positive_offset: int = 0  # without labels, the positive of row i is row (i + positive_offset) mod M: 0 or M / 2

    @property
    def online(self) -> bool:
        return not self.normalize or self.temperature < LOWEST_TEMPERATURE

    @property
    def scale(self) -> float:
        return 1 / (math.log(2) * self.temperature)


class RankRows(NamedTuple):
    """Which rows of the batch of all ranks are this rank's."""

    m: int  # rows of this rank
    n: int  # rows of all ranks
    offset: int  # number of this rank's first row
    group: Group

    @classmethod
    def of(cls, x: Tensor, group: Group) -> "RankRows":
        rank, world = rank_world(group)
        return cls(len(x), len(x) * world, len(x) * rank, group)

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.m)


class Side(NamedTuple):
    """The rows of all ranks on one side of the loss, and their values for the gradient."""

    v: Tensor  # (N_PADDED, D_PADDED) normalised, cast and padded
    inv_norm: Tensor  # (M,) float32, 1 / |x_i| of this rank's rows
    w: Tensor  # (N_PADDED,) float32: 1 / row sum, or log2 of the row sum if the spec is `online`


def row_sums_tiles(width: int, dtype: torch.dtype, labels: bool, decoupled: bool, device: torch.device) -> Tiles:
    """The largest tiles that spill no registers (tests/kernels/test_builds.py); comparing labels takes many registers.

    On Hopper, up to a width of 128, they leave room for a second program on the multiprocessor, whose products run
    during the first one's exponentials.
    """
    if dtype.itemsize == 4:
        return Tiles(64, 64, 32, 8, 2, programs_per_sm=2)
    small = needs_small_tiles(device)
    if width > MAX_D_IN_REGISTERS:
        return Tiles(128, 32 if labels else 64 if small else 128, 64, 8, 3, programs_per_sm=2)
    if labels or (decoupled and not small and width <= 128):
        block_n, num_stages = 32 if small or width > 128 else 64, 3 if width <= 128 else 2
        return Tiles(128, block_n, width, 8, num_stages, programs_per_sm=2)
    return Tiles(128, 128 if width <= 128 else 64, width, 8, 2, programs_per_sm=2)


def gradient_tiles(width: int, labels: bool, device: torch.device) -> Tiles:
    if needs_small_tiles(device):
        return Tiles(64 if labels and width > 128 else 128, 32, width, 8, 3 if width <= 128 else 2)
    if labels or width > 128:
        return Tiles(128, 64, width, 8, 2)
    return Tiles(128, 64, width, 8, 3, maxnreg=128, programs_per_sm=2)
