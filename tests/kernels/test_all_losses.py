"""What holds for every loss: kernels are as exact as plain PyTorch, compile with torch.compile, and keep NaN and
infinity, so that training stops; wrong arguments raise."""

from importlib import import_module

import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import gathered_nce, infonce, infonce_symmetric, ntxent, sinkhorn, sinkhorn_center
from fastssl.kernels import soft_cross_entropy as soft_cross_entropy
from fastssl.kernels.testing import check

NAMES = ("ntxent", "infonce", "gathered", "sinkhorn", "soft_cross_entropy")


def every(kind):
    modules = {name: import_module(f"fastssl.kernels.{name}.cases") for name in NAMES}
    return [pytest.param(op, case, id=f"{name}-{case}") for name, op in modules.items() for case in getattr(op, kind)]


@needs_triton
@pytest.mark.parametrize("op, case", every("SMALL"))
def test_kernel_is_as_exact_as_plain_pytorch(op, case):
    check(op, case, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", every("FULL"))
def test_kernel_at_every_size(op, case):
    check(op, case, "cuda")


def good(rows, dim=32):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


KEYS, QUEUE, BANK = good(8), good(16), good(20)
LABELS, INDEX = torch.tensor([0, 1, 0, 1], device=DEVICE), torch.arange(8, device=DEVICE)


def swav(z, impl):
    """With sinkhorn's center, and with its assignments."""
    center = sinkhorn_center(KEYS, 0.5, impl=impl)
    loss = soft_cross_entropy(z, KEYS, 0.1, 0.5, center=center, impl=impl)
    return loss + soft_cross_entropy(z, sinkhorn(KEYS, 0.5, impl=impl), 0.1, None, impl=impl)


LOSSES = {
    "ntxent": lambda z, impl: ntxent(z, 0.1, impl=impl),
    "online": lambda z, impl: ntxent(z, 0.005, impl=impl),
    "lengths": lambda z, impl: ntxent(z, 0.1, normalize=False, impl=impl),
    "labels": lambda z, impl: ntxent(z, 0.1, labels=LABELS, impl=impl),
    "decoupled": lambda z, impl: ntxent(z, 0.1, decoupled=True, impl=impl),
    "labels, decoupled": lambda z, impl: ntxent(z, 0.1, labels=LABELS, decoupled=True, impl=impl),
    "two of a label": lambda z, impl: ntxent(z[2:4], 0.1, labels=LABELS[:1], impl=impl),
    "queue": lambda z, impl: infonce(z, KEYS, QUEUE, 0.1, impl=impl),
    "batch": lambda z, impl: infonce(z, KEYS, None, 0.1, impl=impl),
    "keys": lambda z, impl: infonce(KEYS, z, None, 0.1, impl=impl),
    "both": lambda z, impl: infonce_symmetric(z, KEYS, 0.1, impl=impl),
    "gathered": lambda z, impl: gathered_nce(z, BANK, INDEX, INDEX.repeat(8, 1) + 9, 0.1, impl=impl),
    "shared": lambda z, impl: gathered_nce(z, BANK, INDEX, INDEX + 9, 0.1, impl=impl),
    "student": lambda z, impl: soft_cross_entropy(z, KEYS, 0.1, 0.04, impl=impl),
    "teacher": lambda z, impl: soft_cross_entropy(KEYS, z, 0.1, 0.04, impl=impl),
    "sinkhorn": lambda z, impl: sinkhorn(z, 0.05, impl=impl).sum(),
    "swav": swav,
}


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_and_inf_propagate_to_the_loss(name, value):
    z = good(8)
    assert LOSSES[name](z, "triton").isfinite()
    z[3, 5] = value
    for impl in ("reference", "triton"):
        assert not LOSSES[name](z, impl).isfinite(), impl


@needs_triton
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of inductor, on a GPU
@pytest.mark.parametrize("name", ["ntxent", "queue", "batch", "both", "gathered", "swav"])
def test_kernels_compile_fullgraph(name):
    z, w = good(8), good(32).requires_grad_()

    def step(w):
        return LOSSES[name](torch.tanh(z @ w), "triton")

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    plain, compiled = step(w), torch.compile(step, fullgraph=True, backend=backend)(w)
    assert torch.allclose(plain, compiled, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x, w)[0] for x in (plain, compiled)), rtol=1e-4, atol=1e-7)


@needs_triton
def test_ops_pass_opcheck():
    from fastssl.kernels.gathered import triton as gathered
    from fastssl.kernels.infonce import symmetric
    from fastssl.kernels.infonce import triton as queue
    from fastssl.kernels.ntxent import triton as similarity
    from fastssl.kernels.sinkhorn import triton as assignments
    from fastssl.kernels.soft_cross_entropy import triton as student

    z, k, index = KEYS.half().requires_grad_(), QUEUE[:8].half(), INDEX
    s, t = KEYS.clone().requires_grad_(), QUEUE[:8]
    for op, arguments in (
        (similarity.ntxent_op, (z, None, 0.1, False, True, "")),
        (similarity.ntxent_op, (z, index % 3, 0.1, False, True, "")),
        (queue.infonce_op, (z, k, k, 0.1, True, "")),
        (symmetric.symmetric_op, (z, k.clone().requires_grad_(), 0.1, True, "")),
        (gathered.gathered_op, (z, k, index, index[:, None], 0.1, True)),
        (student.soft_cross_entropy_op, (s, t, 0.1, 0.04, None)),
        (student.soft_cross_entropy_op, (s, t, 0.1, 0.04, t[0])),
        (assignments.center_op, (t, 0.05, 3, "")),
        (assignments.assign_op, (t, t[0], 0.05)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, arguments, test_utils=checks)


Z, X, I = torch.randn(4, 8), torch.randn(10, 8), torch.arange(4)


@pytest.mark.parametrize(
    "message, call",
    [
        ("3 rows", lambda: ntxent(Z[:3], 0.1)),
        (r"shape \(4,\)", lambda: ntxent(Z[:, 0], 0.1)),
        ("int64", lambda: ntxent(Z.long(), 0.1)),
        ("temperature=0.0", lambda: ntxent(Z, 0.0)),
        (r"\(3,\)", lambda: ntxent(Z, 0.1, labels=I[:3])),
        ("float32", lambda: ntxent(Z, 0.1, labels=I.float())),
        ("impl='cuda'", lambda: ntxent(Z, 0.1, impl="cuda")),
        (r"k is \(3, 8\)", lambda: infonce(Z, Z[:3], X, 0.1)),
        ("queue is 7 wide", lambda: infonce(Z, Z, X[:, :7], 0.1)),
        ("temperature=-1", lambda: infonce(Z, Z, X, -1)),
        ("group", lambda: infonce(Z, Z, X, 0.1, group="a group")),
        (r"b is \(2, 8\)", lambda: infonce_symmetric(Z, Z[:2], 0.1)),
        (r"positive is torch.int64 \(3,\)", lambda: gathered_nce(Z, X, I[:3], I, 0.1)),
        ("negatives is torch.float32", lambda: gathered_nce(Z, X, I, I.float(), 0.1)),
        ("teacher is 7 wide", lambda: soft_cross_entropy(Z, Z[:, :7], 0.1, 0.04)),
        (r"teacher \(3, 8\)", lambda: soft_cross_entropy(Z, Z[:3], 0.1, 0.04)),
        ("teacher_temperature=0", lambda: soft_cross_entropy(Z, Z, 0.1, 0)),
        ("logits: pass teacher_temperature", lambda: soft_cross_entropy(Z, Z, 0.1, None, center=Z[0])),
        (r"center is \(4,\)", lambda: soft_cross_entropy(Z, Z, 0.1, 0.04, center=Z[:, 0])),
        ("epsilon=0", lambda: sinkhorn(Z, 0)),
        ("iterations=0", lambda: sinkhorn(Z, 0.05, iterations=0)),
        pytest.param("z is torch.float64", lambda: ntxent(KEYS.double(), 0.1, impl="triton"), marks=needs_triton),
        pytest.param(
            "queue is torch.float64",
            lambda: infonce(KEYS, KEYS, QUEUE.double(), 0.1, impl="triton"),
            marks=needs_triton,
        ),
    ],
)
def test_wrong_arguments_raise(message, call):
    with pytest.raises(ValueError, match=message):
        call()
