"""Rows of samples that are distributed over the ranks in any order: `index` (n_r,) holds the numbers of this rank's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import dist

CHUNK = 1 << 25  # entries of the largest temporary matrix (128 MiB in float32)


def scatter(values: Tensor, index: Tensor, samples: int) -> Tensor:
    """(n_r, ...) rows of this rank -> (N, ...) rows of all ranks in the order of samples, on every rank."""
    out = values.new_zeros(samples, *values.shape[1:])
    out[index] = values
    return dist.sum_(out)


def blocks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """`x` in blocks of rows, of which a temporary matrix with `width` columns has at most CHUNK entries."""
    return x.split(max(1, CHUNK // width))


def find_rows(x: Tensor, index: Tensor, wanted: Tensor, samples: int) -> Tensor:
    """(len(wanted), D) rows of the samples `wanted`, from whichever ranks have them, on every rank."""
    position = torch.full((samples,), -1, device=x.device)
    position[wanted] = torch.arange(len(wanted), device=x.device)
    position = position[index]
    out = x.new_zeros(len(wanted), x.shape[1])
    out[position[position >= 0]] = x[position >= 0]
    return dist.sum_(out)
