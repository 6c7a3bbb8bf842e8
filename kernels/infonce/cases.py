"""Shapes, dtypes and extremes of infonce and its symmetric form for their tests and benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import Impl
from ..testing import similarity_scale
from . import infonce, infonce_symmetric

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    rows: int
    keys: int | str  # size of the queue, "batch": the keys are the batch's own, "both": the symmetric form
    dim: int
    dtype: torch.dtype = F16
    temperature: float = 0.1
    normalize: bool = True
    precision: str = "highest"
    queue_dtype: torch.dtype | None = None
    kind: str = "random"
    seeds: int = 3


def make(case: Case, device: torch.device | str, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        x = torch.randn(n, case.dim, generator=g)
        if case.kind == "zeros":
            x[::3] = 0
        if case.kind == "cone":
            x = x + 3
        return x

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=1)

    q = rows(case.rows)
    k = q + rows(case.rows)  # positives are similar, as in training
    if not case.normalize:
        q, k = 1.5 * unit(q), 1.5 * unit(k)
    queue = None
    if isinstance(case.keys, int):
        queue = unit(rows(case.keys)).to(case.queue_dtype or case.dtype).to(device)
        if case.kind == "strided":  # (D, K) as the original stores it, and every other query
            queue = queue.T.contiguous().T
    if case.kind == "strided":
        q = torch.stack([q, -q], 1).reshape(-1, case.dim)[::2]
    return {"q": q.to(case.dtype).to(device), "k": k.to(case.dtype).to(device), "queue": queue}


def leaves(case: Case) -> tuple[str, ...]:
    return ("q", "k") if case.keys == "both" else ("q",)


def loss(case: Case, x: dict, impl: Impl) -> Tensor:
    if case.keys == "both":
        return infonce_symmetric(x["q"], x["k"], case.temperature, normalize=case.normalize, impl=impl)
    return infonce(**x, temperature=case.temperature, normalize=case.normalize, impl=impl)


scale = similarity_scale

SMALL = (
    Case(0, 10, 32),
    Case(1, 5, 32),
    Case(2, 0, 64),
    Case(3, 1000, 96, F16, 0.07),
    Case(129, 257, 128, F16, 0.2),
    Case(127, 129, 64, BF16),
    Case(5, 300, 256, BF16, 0.07),
    Case(60, 300, 32, F16, 0.01),
    Case(4, 200, 768, F16),
    Case(9, 130, 300, BF16),
    Case(7, 333, 128, F32),
    Case(7, 333, 128, F32, precision="high"),
    Case(6, 300, 128, F16, queue_dtype=F32),
    Case(6, 300, 64, BF16, queue_dtype=F16),
    Case(3, 129, 64, normalize=False),
    Case(3, 129, 64, BF16, normalize=False),
    Case(5, 129, 300, F32, normalize=False),
    Case(6, 140, 96, kind="strided"),
    Case(6, 140, 64, kind="zeros"),
    Case(6, 140, 64, kind="cone"),
    Case(1, "batch", 32),
    Case(129, "batch", 64),
    Case(130, "batch", 96, BF16),
    Case(40, "batch", 64, F32),
    Case(6, "batch", 300),
    Case(0, "both", 32),
    Case(1, "both", 32),
    Case(129, "both", 64),
    Case(130, "both", 128, BF16),
    Case(40, "both", 64, F32),
    Case(6, "both", 300),
    Case(30, "both", 64, F16, 0.01),
    Case(30, "both", 64, BF16, normalize=False),
    Case(30, "both", 64, kind="zeros"),
)

FULL = tuple(
    Case(rows, keys, dim, dtype, temperature)
    for rows in (1, 2, 3, 127, 128, 129, 1000, 4099)
    for keys in (1, 129, 4099, 65536, "batch", "both")
    for dim in (32, 64, 96, 128, 256, 768, 2048)
    for dtype in (F32, F16, BF16)
    for temperature in (0.01, 0.2)
    if not (keys == 65536 and dim > 256)
)

BENCH = (
    Case(256, 65536, 128),
    Case(512, 65536, 128),
    Case(1024, 65536, 128),
    Case(4096, 65536, 128),
    Case(256, 65536, 128, queue_dtype=F32),  # as MoCo keeps it
    Case(256, 65536, 256),
    Case(4096, 65536, 256),
    Case(4096, "batch", 256),
    Case(4096, "both", 256),
    Case(16384, "both", 512),
)
