"""Shapes, dtypes and extremes of soft_cross_entropy for its test and its benchmark."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Impl
from . import soft_cross_entropy

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    rows: int
    prototypes: int
    dtype: torch.dtype = F16
    student: float = 0.1
    teacher: float | None = 0.04
    center: bool = True
    strided: bool = False
    precision: str = "highest"
    seeds: int = 3


def make(case: Case, device: torch.device | str, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, case.rows, case.prototypes, generator=g)
    if case.teacher is None:
        t = t.softmax(1)
    if case.strided:
        s, t = s.T.contiguous().T, torch.stack([t, t], 1)[:, 1]
    center = torch.randn(case.prototypes, generator=g).to(device) if case.center and case.teacher else None
    return {"student": s.to(case.dtype).to(device), "teacher": t.to(case.dtype).to(device), "center": center}


def leaves(case: Case) -> tuple[str, ...]:
    return ("student",)


def loss(case: Case, x: dict, impl: Impl) -> Tensor:
    return soft_cross_entropy(**x, student_temperature=case.student, teacher_temperature=case.teacher, impl=impl)


def scale(case: Case, name: str) -> float:
    return 1 / case.student if name == "loss" else 1 / (case.student * max(case.rows, 1))


SMALL = (
    Case(0, 10),
    Case(1, 1),
    Case(2, 3, BF16),
    Case(3, 5000, F32),
    Case(3, 5000),
    Case(127, 1000, BF16, center=False, seeds=1),
    Case(129, 257, F16, 0.1, 0.07, seeds=1),
    Case(5, 4099, F32, 0.1, None),
    Case(5, 4099, BF16, 0.1, None),
    Case(5, 4099, F16, 0.1, None),
    Case(2, 5000, F16, 0.002, 0.001),
    Case(9, 300, F16, 5.0, 3.0),
    Case(7, 300, F16, strided=True),
    Case(7, 300, F32, strided=True),
    Case(1, 20000, BF16),
)

FULL = tuple(
    Case(rows, prototypes, dtype, 0.1, teacher)
    for rows in (1, 2, 3, 127, 128, 129, 1000)
    for prototypes in (1, 3, 127, 129, 1000, 4099, 65536)
    for dtype in (F32, F16, BF16)
    for teacher in (0.04, None)
)

BENCH = (Case(64, 65536), Case(512, 65536), Case(512, 65536, BF16), Case(4096, 65536), Case(4096, 3000, F16, 0.1, None))
