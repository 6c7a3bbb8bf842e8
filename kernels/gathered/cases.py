"""Shapes, dtypes and extremes of gathered_nce for its test and its benchmark."""

from typing import NamedTuple

import torch

from ..common import Impl
from ..testing import leaf
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


def call(case: Case, x: dict, impl: Impl) -> dict:
    q = leaf(x["q"])
    loss = gathered_nce(
        q, x["bank"], x["positive"], x["negatives"], case.temperature, normalize=case.normalize, impl=impl
    )
    return {"loss": loss, "dq": torch.autograd.grad(loss, q)[0]}


def scale(case: Case, name: str) -> float:
    if name == "loss":
        return 1 / case.temperature
    return 2 / (case.temperature * max(case.rows, 1) * (case.dim**0.5 if case.normalize else 1.5))


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
