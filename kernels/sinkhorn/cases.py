"""Shapes, dtypes and extremes of sinkhorn for its test and its benchmark."""

from typing import NamedTuple

import torch

from ..common import Impl
from . import sinkhorn, sinkhorn_center

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    rows: int
    prototypes: int
    dtype: torch.dtype = BF16
    epsilon: float = 0.05
    iterations: int = 3
    spread: float = 1.0  # 1: cosines, as in SwAV
    strided: bool = False
    precision: str = "highest"
    seeds: int = 2


def make(case: Case, device: torch.device | str, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    z, c = unit(torch.randn(case.rows, 32, generator=g)), unit(torch.randn(case.prototypes, 32, generator=g))
    logits = (case.spread * z @ c.T).to(case.dtype).to(device)
    return {"logits": logits.T.contiguous().T if case.strided else logits}


def outputs(case: Case, x: dict, impl: Impl) -> dict:
    center = sinkhorn_center(x["logits"], case.epsilon, iterations=case.iterations, impl=impl)
    # a constant added to the center changes no assignment
    assignments = sinkhorn(x["logits"], case.epsilon, iterations=case.iterations, impl=impl)
    return {"assignments": assignments, "center": center - center.mean()}


def scale(case: Case, name: str) -> float:
    return case.spread if name == "center" else 0.0


SMALL = (
    Case(1, 1),
    Case(2, 3, F32),
    Case(7, 130),
    Case(40, 1500, seeds=1),
    Case(129, 130, F16, seeds=1),
    Case(33, 129, F32, 0.1, 3, 200.0),
    Case(40, 100, F32, iterations=1),
    Case(20, 64, F16, iterations=10),
    Case(30, 70, strided=True),
)

FULL = tuple(
    Case(rows, prototypes, dtype)
    for rows in (1, 3, 127, 129, 1000)
    for prototypes in (1, 3, 129, 3000, 65536)
    for dtype in (F32, F16, BF16)
)

BENCH = (Case(512, 65536), Case(512, 65536, F16), Case(512, 3000), Case(3840, 3000))
