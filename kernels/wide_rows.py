"""Reads of rows with thousands of columns (prototypes), 16 bytes at a time, with a running maximum for each group of
neighbouring columns.  Shared by Sinkhorn and the soft cross entropy."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .tiling import next_power_of_2

MAX_BLOCK_K = 2048  # columns that a program reads at a time
GROUP = tl.constexpr(8)  # neighbours with one running maximum: of bfloat16, what a thread loads at once


def alignment(num_columns: int, *tensors: Tensor) -> int:
    """The greatest common divisor of 16, the number of columns and the row strides.

    Without it the mask of the last columns prevents loads of 16 bytes: Triton's specialisation recognises only
    multiples of 16, and SwAV has 3,000 prototypes.
    """
    return math.gcd(16, num_columns, *(x.stride(0) for x in tensors))


def row_block(num_columns: int) -> int:
    return min(MAX_BLOCK_K, next_power_of_2(max(num_columns, GROUP.value)))


@triton.jit
def assume_multiple(x, ALIGN: tl.constexpr):
    """x, which is a multiple of ALIGN, in a form that tells the compiler so."""
    return x // ALIGN * ALIGN


@triton.jit
def grouped_columns(first, BLOCK_K: tl.constexpr):
    """The columns from first to first + BLOCK_K, as (BLOCK_K / GROUP, GROUP)."""
    return first + tl.arange(0, BLOCK_K // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def update_max(running_max, x, scale):
    """For groups x: the new running maxima, finite values to subtract, and the factors of the earlier sums."""
    new_max = tl.maximum(running_max, tl.max(x, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, finite_max[:, None], tl.exp2((running_max - finite_max) * scale)
