"""The ops of bench/ops.py: cases, checks, implementations to compare, numbers of operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import ops_augment
import torch
from torch import Tensor

from fastssl.kernels import enqueue_, update_bank_
from fastssl.kernels import ntxent as ntxent_loss
from fastssl.kernels.common import Impl, l2_normalize
from fastssl.kernels.gathered import cases as gathered
from fastssl.kernels.infonce import cases as infonce
from fastssl.kernels.ntxent import cases as ntxent
from fastssl.kernels.precision import matmul_float32
from fastssl.kernels.sinkhorn import cases as sinkhorn
from fastssl.kernels.soft_cross_entropy import cases as soft_cross_entropy
from fastssl.kernels.testing import assert_as_good_as, call, check, leaf

Case = Any  # of an op: each has its own class
Inputs = dict[str, Any]
Call = Callable[[], Any]

TRUTH_ROWS = 16384  # above it, the float64 result is computed chunk by chunk


@dataclass
class Op:
    cases: Sequence[Case]
    check: Callable[[Case], dict[str, float]]  # largest absolute errors by name; raises AssertionError
    implementations: Callable[[Case], dict[str, Call]]  # "ours" first
    work: Callable[[Case], tuple[int | None, int]]  # numbers of operations (None: not counted) and bytes
    targets: Mapping[Case, float]  # microseconds on an H200


def under_autocast(case: Case, f: Call) -> Call:
    def run() -> Any:
        with torch.autocast("cuda", dtype=case.dtype, enabled=case.dtype != torch.float32):
            return f()

    return run


def loss_implementations(
    module: ModuleType, case: Case, extra: Callable[[Case, Inputs], dict[str, Call]] | None = None
) -> dict[str, Call]:
    torch.set_float32_matmul_precision(case.precision)
    x = module.make(case, "cuda", 0)
    return {
        "ours": partial(call, module, case, x, "triton"),
        "eager": under_autocast(case, partial(call, module, case, x, "reference")),
        "compile": compiled(module, case, x),
        **(extra(case, x) if extra else {}),
    }


def compiled(module: ModuleType, case: Case, x: Inputs) -> Call:
    """torch.compile of the definition; the gradient is outside, because Dynamo does not trace torch.autograd.grad."""
    if not hasattr(module, "loss"):
        return under_autocast(case, torch.compile(partial(module.outputs, case, x, "reference"), dynamic=False))
    leaves = {name: leaf(x[name]) for name in module.leaves(case)}
    loss = torch.compile(lambda given: module.loss(case, {**x, **given}, "reference"), dynamic=False)
    return under_autocast(case, lambda: torch.autograd.grad(loss(leaves), tuple(leaves.values())))


def chunked_ntxent(z: Tensor, temperature: float, dtype: torch.dtype, rows: int = 2048) -> dict[str, Tensor]:
    """Loss and dz by matrix products over blocks of rows, without a kernel of our own; exact in float64."""
    z = z.to(torch.promote_types(dtype, torch.float32))
    m = z.shape[0]
    v = l2_normalize(z).to(dtype)
    partner = (torch.arange(m, device=z.device) + m // 2) % m

    def logits(first: int) -> Tensor:
        block = v[first : first + rows]
        s = matmul_float32(block, v.T) if dtype.itemsize == 2 else block @ v.T
        s /= temperature
        s.diagonal(first).fill_(-torch.inf)
        return s

    lse, loss = torch.empty(m, dtype=z.dtype, device=z.device), 0
    for first in range(0, m, rows):
        s = logits(first)
        lse[first : first + rows] = s.logsumexp(1)
        loss = loss - s.gather(1, partner[first : first + rows, None]).sum()
    g = torch.empty_like(z)
    for first in range(0, m, rows):
        s = logits(first)
        p = (s - lse[first : first + rows, None]).exp_() + (s - lse).exp_()
        p.scatter_add_(1, partner[first : first + rows, None], p.new_full((1, 1), -2.0).expand(p.shape[0], 1))
        scale = 2.0**13 if dtype == torch.float16 else 1.0
        g[first : first + rows] = ((p * scale).to(dtype) @ v).to(z.dtype) / scale
    norm = z.norm(dim=1, keepdim=True)
    u = z / norm
    return {"loss": (loss + lse.sum()) / m, "dz": (g - u * (u * g).sum(1, keepdim=True)) / norm / (m * temperature)}


def ntxent_extra(case: Case, x: Inputs) -> dict[str, Call]:
    if case.labels or case.decoupled:
        return {}
    return {"chunked matmul": lambda: chunked_ntxent(x["z"], case.temperature, case.dtype)}


def ntxent_check(case: Case, device: str = "cuda") -> dict[str, float]:
    """Errors of a case.  Above TRUTH_ROWS, gradients are compared in the type of z with a loss scale.

    Without it, an entry of dz is about 2 / (temperature rows dim), 2.4e-6 for 65,536 rows, where float16 has a
    resolution of 2^-24 = 6e-8.  Rounding would add an error of 3e-8, four times that of plain PyTorch's sums before
    rounding.
    """
    if case.rows <= TRUTH_ROWS:
        return check(ntxent, case, device)
    x = ntxent.make(case, device, 0)
    z, loss_scale = leaf(x["z"]), 2.0 ** math.floor(math.log2(case.rows * case.temperature * case.dim))
    loss = ntxent_loss(z, case.temperature, impl="triton")
    ours = {"loss": loss, "dz": torch.autograd.grad(loss, z, torch.full_like(loss, loss_scale))[0]}
    plain, truth = (chunked_ntxent(x["z"], case.temperature, dtype) for dtype in (case.dtype, torch.float64))
    plain["dz"] = (plain["dz"] * loss_scale).to(case.dtype)
    ours["dz"], plain["dz"] = ours["dz"].double() / loss_scale, plain["dz"].double() / loss_scale
    for name in ours:
        scale = max(ntxent.scale(case, name), float(truth[name].abs().max()))
        assert_as_good_as(f"{case}: {name}", ours[name], plain[name], truth[name], scale=scale)
    return {name: float((ours[name].detach().double() - truth[name]).abs().max()) for name in ours}


def infonce_extra(case: Case, x: Inputs) -> dict[str, Call]:
    implementations = {}
    if case.keys in ("batch", "both"):
        unit = torch.nn.functional.normalize
        try:
            from cut_cross_entropy import linear_cross_entropy

            target = torch.arange(case.rows, device="cuda")

            def cce(a: Tensor, b: Tensor) -> Tensor:
                return linear_cross_entropy(unit(a, dim=1) / case.temperature, unit(b, dim=1), target, impl="cce_exact")

            implementations["cut_cross_entropy"] = grad_of(case, x, cce)
        except ImportError:
            pass
        try:
            from inf_cl import cal_flash_loss

            implementations["inf_cl"] = grad_of(
                case, x, lambda a, b: cal_flash_loss(unit(a, dim=1), unit(b, dim=1), scale=1 / case.temperature)
            )
        except ImportError:
            pass
    return implementations


def grad_of(case: Case, x: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    def run() -> Any:
        a, b = leaf(x["q"]), leaf(x["k"])
        if case.keys == "batch":
            return torch.autograd.grad(loss(a, b.detach()), a)
        return torch.autograd.grad((loss(a, b) + loss(b, a)) / 2, (a, b))

    return run


def infonce_work(case: Case) -> tuple[int, int]:
    keys = case.keys if isinstance(case.keys, int) else case.rows
    factor = 10 if case.keys == "both" else 4  # both sums at once, then two gradients; else one pass for both
    return factor * case.rows * keys * case.dim, keys * case.dim * case.dtype.itemsize


@dataclass(frozen=True)
class Update:
    kind: str
    rows: int
    size: int
    dim: int
    dtype: torch.dtype


UPDATES = [
    Update("queue", 256, 65536, 128, torch.float16),
    Update("bank", 256, 1_281_167, 128, torch.float32),
    Update("bank", 256, 1_281_167, 128, torch.float16),
]


def update_state(case: Update) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(case.size, case.dim, generator=g), dim=1).to(case.dtype).cuda()
    rows = torch.randn(case.rows, case.dim, generator=g).cuda()
    return table, torch.zeros(1, dtype=torch.int64, device="cuda"), rows, torch.randint(case.size, (case.rows,)).cuda()


def update_step(case: Update, state: Sequence[Tensor], impl: Impl) -> Tensor:
    table, pointer, rows, index = state
    if case.kind == "queue":
        return enqueue_(table, pointer, rows, impl=impl)
    return update_bank_(table, index, rows, 0.5, impl=impl)


def update_check(case: Update) -> dict[str, float]:
    state = update_state(case)
    tables: dict[str, Tensor] = {}
    kinds: tuple[tuple[str, Impl, torch.dtype | None], ...]
    kinds = ("ours", "triton", None), ("plain", "reference", None), ("truth", "reference", torch.float64)
    for name, impl, dtype in kinds:
        copy = tuple(x.clone().to(dtype) if dtype and x.is_floating_point() else x.clone() for x in state)
        tables[name] = update_step(case, copy, impl)
    assert_as_good_as(str(case), **tables)
    return {"table": float((tables["ours"].double() - tables["truth"]).abs().max())}


def update_implementations(case: Update) -> dict[str, Call]:
    state = update_state(case)
    impls: dict[str, Impl] = {"ours": "triton", "eager": "reference"}
    return {name: partial(update_step, case, state, impl) for name, impl in impls.items()}


OPS = {
    "ntxent": Op(
        ntxent.BENCH,
        ntxent_check,
        lambda c: loss_implementations(ntxent, c, ntxent_extra),
        lambda c: (6 * c.rows**2 * c.dim, c.rows * c.dim * 6),
        {ntxent.Case(8192, 128): 105, ntxent.Case(16384, 128): 400, ntxent.Case(65536, 128): 6200},
    ),
    "infonce": Op(
        infonce.BENCH,
        lambda c: check(infonce, c, "cuda"),
        lambda c: loss_implementations(infonce, c, infonce_extra),
        infonce_work,
        {infonce.Case(256, 65536, 128): 25, infonce.Case(4096, 65536, 128): 290},
    ),
    "gathered": Op(
        gathered.BENCH,
        lambda c: check(gathered, c._replace(rows=16), "cuda"),
        lambda c: loss_implementations(gathered, c),
        lambda c: (None, (1 if c.shared else c.rows) * c.negatives * (c.dim * c.dtype.itemsize + 8)),
        {},
    ),
    "sinkhorn": Op(
        sinkhorn.BENCH,
        lambda c: check(sinkhorn, c, "cuda"),
        lambda c: loss_implementations(sinkhorn, c),
        lambda c: (None, c.rows * c.prototypes * (2 * c.iterations * c.dtype.itemsize + 4)),
        {sinkhorn.Case(512, 65536): 150},
    ),
    "soft_cross_entropy": Op(
        soft_cross_entropy.BENCH,
        lambda c: check(soft_cross_entropy, c, "cuda"),
        lambda c: loss_implementations(soft_cross_entropy, c),
        lambda c: (None, 5 * c.rows * c.prototypes * c.dtype.itemsize),
        {},
    ),
    "augment": Op(
        ops_augment.CASES, ops_augment.check, ops_augment.implementations, ops_augment.work, ops_augment.TARGETS
    ),
    "queue_bank": Op(
        UPDATES,
        update_check,
        update_implementations,
        lambda c: (None, 2 * c.rows * c.dim * (c.dtype.itemsize + 4)),
        dict.fromkeys(UPDATES, 5),
    ),
}
