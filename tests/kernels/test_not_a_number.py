"""NaN or infinity in one row makes the loss of every op NaN or infinite, so that training stops."""

import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels.gathered import gathered_nce
from fastssl.kernels.infonce import infonce, infonce_symmetric
from fastssl.kernels.ntxent import ntxent
from fastssl.kernels.sinkhorn import sinkhorn
from fastssl.kernels.soft_cross_entropy import soft_cross_entropy


def good(rows, dim=32):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


LABELS = torch.tensor([0, 1, 0, 1], device=DEVICE)
INDEX = torch.arange(8, device=DEVICE)
OPS = {
    "ntxent": lambda z, impl: ntxent(z, 0.1, impl=impl),
    "online": lambda z, impl: ntxent(z, 0.005, impl=impl),
    "lengths": lambda z, impl: ntxent(z, 0.1, normalize=False, impl=impl),
    "labels": lambda z, impl: ntxent(z, 0.1, labels=LABELS, impl=impl),
    "decoupled": lambda z, impl: ntxent(z, 0.1, decoupled=True, impl=impl),
    "labels, decoupled": lambda z, impl: ntxent(z, 0.1, labels=LABELS, decoupled=True, impl=impl),
    "two of a label": lambda z, impl: ntxent(z[2:4], 0.1, labels=LABELS[:1], impl=impl),
    "queue": lambda z, impl: infonce(z, good(8), good(16), 0.1, impl=impl),
    "batch": lambda z, impl: infonce(z, good(8), None, 0.1, impl=impl),
    "keys": lambda z, impl: infonce(good(8), z, None, 0.1, impl=impl),
    "both": lambda z, impl: infonce_symmetric(z, good(8), 0.1, impl=impl),
    "gathered": lambda z, impl: gathered_nce(z, good(20), INDEX, INDEX.repeat(8, 1) + 9, 0.1, impl=impl),
    "shared": lambda z, impl: gathered_nce(z, good(20), INDEX, INDEX + 9, 0.1, impl=impl),
    "student": lambda z, impl: soft_cross_entropy(z, good(8), 0.1, 0.04, impl=impl),
    "teacher": lambda z, impl: soft_cross_entropy(good(8), z, 0.1, 0.04, impl=impl),
    "sinkhorn": lambda z, impl: sinkhorn(z, 0.05, impl=impl).sum(),
}


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPS)
def test_nan_and_inf_propagate_to_the_loss(name, value):
    z = good(8)
    assert OPS[name](z, "triton").isfinite()
    z[3, 5] = value
    for impl in ("reference", "triton"):
        assert not OPS[name](z, impl).isfinite(), impl
