"""Shapes, dtypes and extremes of ntxent for its test and its benchmark."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Impl
from ..testing import similarity_scale
from . import ntxent

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    rows: int
    dim: int
    dtype: torch.dtype = F16
    temperature: float = 0.1
    labels: bool = False
    decoupled: bool = False
    normalize: bool = True
    kind: str = "random"
    precision: str = "highest"
    strided: bool = False
    seeds: int = 3


def make(case: Case, device: torch.device | str, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    m, d = case.rows, case.dim
    z = torch.randn(m, d, generator=g)
    if case.kind == "identical":
        z = z[:1].expand(m, d)
    elif case.kind == "antipodal":  # every second row is the opposite of the first
        z = z[:1] * torch.where(torch.arange(m) % 2 == 0, 1.0, -1.0)[:, None]
    elif case.kind == "opposed":  # one row against all others: the smallest possible sum
        z = z[:1] * torch.where(torch.arange(m) == 0, 1.0, -1.0)[:, None]
    if case.kind in ("antipodal", "opposed") and case.dtype != F32:
        # half-precision logits of exact opposites round to exactly -1 and 1, so plain PyTorch would have no error
        z = z + 0.05 * torch.randn(m, d, generator=g)
    if case.kind == "zeros":
        z[::3] = 0
    elif case.kind == "aligned":  # similar views, as after training: the softmax is concentrated on the positive
        z = z[: m // 2].repeat(2, 1) + 0.3 * z
    elif case.kind == "cone":  # a large common mean, as at the start of training
        z = z + 3
    if not case.normalize:
        z = torch.nn.functional.normalize(z, dim=1) * 1.5
    if case.strided:
        z = torch.stack([z, -z], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 0]
    labels = torch.randint(-1, max(m // 8, 2), (m,), generator=g).to(device) if case.labels else None
    return {"z": z.to(case.dtype).to(device), "labels": labels}


def leaves(case: Case) -> tuple[str, ...]:
    return ("z",)


def loss(case: Case, x: dict, impl: Impl) -> Tensor:
    return ntxent(**x, temperature=case.temperature, decoupled=case.decoupled, normalize=case.normalize, impl=impl)


scale = similarity_scale

SMALL = (
    Case(0, 32),
    Case(2, 32),
    Case(2, 128, F32),
    Case(6, 2048, BF16, seeds=1),
    Case(6, 768, F16, 0.2, seeds=2),
    Case(128, 64, BF16),
    Case(130, 96, F16, 0.5),
    Case(258, 128),
    Case(254, 256, BF16, 0.07, seeds=2),
    Case(130, 32, F32),
    Case(66, 300, F32),
    Case(130, 64, F32, precision="high"),
    Case(1000, 32, seeds=1),
    Case(1, 32, labels=True),
    Case(3, 64, BF16, labels=True),
    Case(127, 32, labels=True),
    Case(129, 96, F32, labels=True, seeds=2),
    Case(129, 64, labels=True, decoupled=True),
    Case(66, 300, BF16, labels=True),
    Case(2, 64, decoupled=True),
    Case(130, 64, BF16, decoupled=True),
    Case(130, 32, F16, 0.01),
    Case(6, 64, BF16, 0.0149),
    Case(130, 64, F16, 0.015),
    Case(129, 32, F16, 0.005, labels=True),
    Case(130, 64, F16, 5.0),
    Case(130, 64, F16, normalize=False),
    Case(130, 64, BF16, normalize=False),
    Case(34, 64, F32, normalize=False),
    Case(34, 300, F16, normalize=False, labels=True),
    Case(130, 64, kind="identical"),
    Case(130, 64, kind="antipodal"),
    Case(130, 64, kind="zeros"),
    Case(130, 64, kind="cone"),
    Case(258, 64, kind="aligned"),
    Case(70, 300, kind="aligned"),
    Case(130, 64, F32, kind="aligned", precision="high"),
    Case(2, 32, F16, 0.015, kind="antipodal"),
    Case(6, 32, F16, 0.015, kind="opposed"),
    Case(6, 32, F16, 0.005, kind="opposed"),
    Case(6, 32, F32, 0.015, kind="opposed"),
    Case(6, 32, F32, 0.015, kind="antipodal"),
    Case(5, 32, F32, 0.01, labels=True, kind="identical"),
    Case(64, 32, F32, kind="zeros", labels=True),
    Case(70, 96, strided=True),
    Case(70, 96, F32, strided=True),
)

FULL = (
    *(
        Case(rows + rows % 2, dim, dtype, temperature)
        for rows in (1, 2, 3, 127, 128, 129, 1000, 4099)
        for dim in (32, 64, 96, 128, 256, 768, 2048)
        for dtype in (F32, F16, BF16)
        for temperature in (0.1, 0.5)
    ),
    *(
        Case(rows, dim, dtype, temperature, labels=True, decoupled=decoupled)
        for rows in (1, 2, 3, 127, 128, 129, 1000, 4099)
        for dim in (64, 128, 768)
        for dtype in (F32, F16, BF16)
        for temperature in (0.01, 0.1)
        for decoupled in (False, True)
    ),
)

BENCH = (
    Case(1024, 128),
    Case(4096, 128),
    Case(8192, 128),
    Case(16384, 128),
    Case(65536, 128),
    Case(8192, 256),
    Case(8192, 768),
    Case(8192, 2048),
    Case(8192, 128, BF16),
    Case(8192, 128, F32, precision="high"),
    Case(8192, 128, F16, 0.01),
    Case(8192, 128, labels=True),
    Case(8192, 128, decoupled=True),
)
