"""Shapes, dtypes and extremes of gathered_nce for its test and its benchmark."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Impl
from ..testing import similarity_scale
from . import gathered_nce

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    rows: int
    negatives: int
    bank: int
    dim: int
    dtype: torch.dtype = F16
    temperature: float = 0.07
    shared: bool = False
    normalize: bool = True
    precision: str = "highest"
    seeds: int = 3


def make(case: Case, device: torch.device | str, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.rows, case.dim, generator=g)
    if not case.normalize:
        q = 1.5 * torch.nn.functional.normalize(q, dim=1)
    bank = torch.nn.functional.normalize(torch.randn(case.bank, case.dim, generator=g), dim=1)
    shape = (case.negatives,) if case.shared else (case.rows, case.negatives)
    return {
        "q": q.to(case.dtype).to(device),
        "bank": bank.to(case.dtype).to(device),
        "positive": torch.randint(case.bank, (case.rows,), generator=g).to(device),
        "negatives": torch.randint(case.bank, shape, generator=g).to(device),
    }


def leaves(case: Case) -> tuple[str, ...]:
    return ("q",)


def loss(case: Case, x: dict, impl: Impl) -> Tensor:
    return gathered_nce(**x, temperature=case.temperature, normalize=case.normalize, impl=impl)


scale = similarity_scale

SMALL = (
    Case(0, 4, 9, 32),
    Case(1, 3, 5, 32),
    Case(3, 700, 1000, 96),
    Case(5, 129, 300, 128, F16, 0.01),
    Case(4, 127, 300, 128, BF16),
    Case(4, 129, 300, 64, F32),
    Case(2, 33, 40, 768, BF16),
    Case(2, 0, 7, 64),
    Case(4, 60, 70, 64, F16, normalize=False),
    Case(6, 129, 300, 128, shared=True),
    Case(6, 129, 300, 64, F32, shared=True),
)

FULL = tuple(
    Case(rows, negatives, 10_000, dim, dtype, shared=shared)
    for rows in (1, 3, 128)
    for negatives in (1, 129, 4099, 65536)
    for dim in (32, 96, 128, 256)
    for dtype in (F32, F16, BF16)
    for shared in (False, True)
    if shared or rows * negatives * dim <= 2**28
)

BENCH = (
    Case(256, 65536, 1_281_167, 128, F16),
    Case(256, 65536, 1_281_167, 128, F32),
    Case(256, 65536, 1_281_167, 128, F16, shared=True),
    Case(256, 4096, 1_281_167, 128, F16),
)
