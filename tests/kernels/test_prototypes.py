"""Sinkhorn assignments and soft cross entropy over prototypes: definitions, and kernels compared with float64."""

import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import sinkhorn, sinkhorn_center
from fastssl.kernels import soft_cross_entropy as soft_cross_entropy
from fastssl.kernels.sinkhorn import cases as sinkhorn_cases
from fastssl.kernels.soft_cross_entropy import cases
from fastssl.kernels.testing import check


def test_sinkhorn_equals_swav():
    logits = torch.randn(20, 30, dtype=torch.float64).tanh()
    q = (logits / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * 30
        q /= q.sum(0, keepdim=True) * 20
    assert torch.allclose(sinkhorn(logits, 0.05), (q * 20).T, rtol=1e-9)
    balanced = sinkhorn(logits, 0.5, iterations=300)
    assert torch.allclose(balanced.sum(0), torch.full((30,), 20 / 30).double(), rtol=1e-6)


def test_soft_cross_entropy_equals_cross_entropy_with_sinkhorn_center():
    s, t, c = torch.randn(6, 40).double(), torch.randn(6, 40).double().tanh(), torch.randn(40).double()
    p = ((t - c) / 0.04).softmax(1)
    expected = -(p * (s / 0.1).log_softmax(1)).sum(1).mean()
    assert torch.allclose(soft_cross_entropy(s, t, 0.1, 0.04, center=c), expected)
    assert torch.allclose(soft_cross_entropy(s, p, 0.1, None), expected)
    center = sinkhorn_center(t, 0.05)
    assert torch.allclose(
        soft_cross_entropy(s, t, 0.1, 0.05, center=center), soft_cross_entropy(s, sinkhorn(t, 0.05), 0.1, None)
    )


@needs_triton
@pytest.mark.parametrize("case", sinkhorn_cases.SMALL, ids=str)
def test_sinkhorn_kernel_is_as_exact_as_plain_pytorch(case):
    check(sinkhorn_cases, case, DEVICE)


@needs_triton
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_soft_cross_entropy_kernel_is_as_exact_as_plain_pytorch(case):
    check(cases, case, DEVICE)


@needs_triton
def test_soft_cross_entropy_gradient_is_invariant_to_an_offset():
    """With a single prototype the gradient is exactly 0, as every logit is an offset."""
    g = torch.Generator().manual_seed(0)
    s, t = ((torch.randn(2, 5, 300, generator=g) * 64).round() / 64).to(DEVICE)  # sums with 1000 are exact
    grads = []
    for offset in (0, 1000):
        x = (s + offset).requires_grad_()
        grads.append(torch.autograd.grad(soft_cross_entropy(x, t + offset, 0.1, 0.04, impl="triton"), x)[0])
    assert grads[0].any() and torch.equal(*grads)
    one = s[:, :1].clone().requires_grad_()
    loss = soft_cross_entropy(one, t[:, :1], 0.1, 0.04, impl="triton")
    assert loss == 0 and not torch.autograd.grad(loss, one)[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", sinkhorn_cases.FULL, ids=str)
def test_sinkhorn_kernel_at_every_size(case):
    check(sinkhorn_cases, case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_soft_cross_entropy_kernel_at_every_size(case):
    check(cases, case, "cuda")


@needs_triton
def test_kernels_compile_fullgraph():
    t, z = torch.randn(6, 100, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    w = torch.randn(8, 100, device=DEVICE, requires_grad=True)

    def step(w):
        center = sinkhorn_center(t, 0.5, impl="triton")
        with_center = soft_cross_entropy(z @ w, t, 0.1, 0.5, center=center, impl="triton")
        return with_center + soft_cross_entropy(z @ w, sinkhorn(t, 0.5, impl="triton"), 0.1, None, impl="triton")

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    plain, compiled = step(w), torch.compile(step, fullgraph=True, backend=backend)(w)
    assert torch.allclose(plain, compiled, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x, w)[0] for x in (plain, compiled)), rtol=1e-4, atol=1e-6)


@needs_triton
def test_ops_pass_opcheck():
    from fastssl.kernels.sinkhorn import triton as sk
    from fastssl.kernels.soft_cross_entropy import triton as sx

    s, t = torch.randn(5, 40, device=DEVICE, requires_grad=True), torch.randn(5, 40, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (sx.soft_cross_entropy_op, (s, t, None, 0.1, 0.04)),
        (sx.soft_cross_entropy_op, (s, t, t[0], 0.1, 0.04)),
        (sk.center_op, (t, 0.05, 3, "")),
        (sk.assign_op, (t, t[0], 0.05)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


def test_invalid_arguments_raise():
    s, t = torch.randn(4, 8), torch.randn(4, 9)
    for match, call in (
        ("teacher is 9 wide", lambda: soft_cross_entropy(s, t, 0.1, 0.04)),
        (r"teacher \(3, 8\)", lambda: soft_cross_entropy(s, s[:3], 0.1, 0.04)),
        ("teacher_temperature=0", lambda: soft_cross_entropy(s, s, 0.1, 0)),
        (
            "subtracted from teacher logits: pass teacher_temperature",
            lambda: soft_cross_entropy(s, s, 0.1, None, center=s[0]),
        ),
        (r"center is \(4,\)", lambda: soft_cross_entropy(s, s, 0.1, 0.04, center=s[:, 0])),
        ("epsilon=0", lambda: sinkhorn(s, 0)),
        ("iterations=0", lambda: sinkhorn(s, 0.05, iterations=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
