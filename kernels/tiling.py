"""Tile sizes, and over how many programs a dimension is split: shared by the kernels' launches."""

import functools
from typing import NamedTuple

import torch

MAX_D_IN_REGISTERS = 256  # widest row whose block of gradients is kept in registers; wider ones go through a matmul
ROW_PADDING = 128  # matrices of rows are padded to a multiple of it, so that no tile's load needs a mask
FAKE_CAPABILITY = {"capability": 90}  # compute capability that meta tensors are compiled for, set by the build tests


class Tiles(NamedTuple):
    block_m: int  # rows
    block_n: int  # columns
    block_k: int  # features read at a time
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread may use; 128 lets two programs of 8 warps run on a multiprocessor
    programs_per_sm: int = 1  # that run at the same time on a multiprocessor: columns are split for that many


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def num_multiprocessors(device: torch.device) -> int:
    """4 on a CPU, so that small tests split their work too; meta tensors count as an H200's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def compute_capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100 or H200."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return FAKE_CAPABILITY["capability"]


def needs_small_tiles(device: torch.device) -> bool:
    """Whether to use Ampere's tiles: those of Hopper and data-centre Blackwell need up to 115 KB of shared memory, and
    sm_120 has 99."""
    return compute_capability(device) // 10 not in (9, 10)


def padded_width(d: int, dtype: torch.dtype) -> int:
    """Columns of a padded matrix of rows with d features."""
    if dtype.itemsize == 2 and d <= MAX_D_IN_REGISTERS:
        return next_power_of_2(max(d, 16))
    return cdiv(d, 64) * 64


def split_tiles(programs: int, tiles: int, device: torch.device, programs_per_sm: int) -> tuple[int, int]:
    """(num_splits, tiles per split) for a launch of `programs` programs, each of which would go through `tiles` tiles:
    how many programs share the tiles of one, and how many each of them gets.  `programs_per_sm`: how many run at the
    same time on a multiprocessor."""
    return _split_tiles(programs, tiles, programs_per_sm * num_multiprocessors(device))


@functools.lru_cache(maxsize=1024)
def _split_tiles(programs: int, tiles: int, slots: int) -> tuple[int, int]:
    """`slots` programs run at a time.  The fewest splits within 5 % of the shortest time, of those that fill the slots
    at most twice."""

    def steps(num_splits: int) -> int:  # of the slot that is busy longest
        return cdiv(programs * num_splits, slots) * cdiv(tiles, num_splits)

    candidates = range(1, max(1, min(2 * slots // programs, tiles)) + 1)
    limit = 1.05 * min(map(steps, candidates))
    tiles_per_split = cdiv(tiles, next(s for s in candidates if steps(s) <= limit))
    return cdiv(tiles, tiles_per_split), tiles_per_split
