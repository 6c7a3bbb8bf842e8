"""Sinkhorn assignments and soft cross entropy over prototypes: definitions, and kernels compared with float64."""

import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import sinkhorn, sinkhorn_center
from fastssl.kernels import soft_cross_entropy as soft_cross_entropy


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
