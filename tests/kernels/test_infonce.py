"""InfoNCE with a queue, with a batch, symmetric, and over gathered rows: definitions, and kernels compared with
float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, needs_triton, truncated_sums  # noqa: F401 - a fixture

from fastssl.kernels import gathered_nce, infonce, infonce_symmetric
from fastssl.kernels.infonce import cases
from fastssl.kernels.testing import check


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


def test_definitions_are_cross_entropies():
    q, k, queue, bank = unit(5, 8), unit(5, 8), unit(20, 8), unit(30, 8)
    zero, own = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    positive, negatives = torch.randint(30, (5,)), torch.randint(30, (5, 12))
    y = (q * k).sum(1, keepdim=True)
    with_queue = F.cross_entropy(torch.cat([y, q @ queue.T], 1) / 0.2, zero)
    assert torch.allclose(infonce(3 * q, 2 * k, queue, 0.2), with_queue)
    in_batch = F.cross_entropy(q @ k.T / 0.2, own)
    assert torch.allclose(infonce(q, k, None, 0.2), in_batch)
    both = (in_batch + F.cross_entropy(k @ q.T / 0.2, own)) / 2
    assert torch.allclose(infonce_symmetric(q, 4 * k, 0.2), both)
    rows = bank[torch.cat([positive[:, None], negatives], 1)]
    gathered = F.cross_entropy(torch.einsum("nd,nkd->nk", q, rows) / 0.2, zero)
    assert torch.allclose(gathered_nce(5 * q, bank, positive, negatives, 0.2), gathered)
    shared = gathered_nce(q, bank, positive, negatives[0], 0.2)
    assert torch.allclose(shared, gathered_nce(q, bank, positive, negatives[:1].expand(5, 12), 0.2))


def test_keys_get_no_gradient():
    q, k, queue = (unit(4, 8).requires_grad_() for _ in range(3))
    infonce(q, k, queue, 0.2).backward()
    assert q.grad.any() and k.grad is None and queue.grad is None


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="imitates what a GPU does by itself")
@pytest.mark.parametrize("rows, dtype", [(1, torch.float16), (33, torch.bfloat16)], ids=str)
@pytest.mark.usefixtures("truncated_sums")
def test_truncation_cancels_between_sum_and_positive(rows, dtype):
    """At temperature 0.01 the sum is almost only the positive, and the loss is 0 if both come from one product."""
    check(cases, cases.Case(rows, "both", 2048, dtype, 0.01, seeds=1), DEVICE)


@needs_triton
def test_many_splits_are_combined_in_several_rounds(monkeypatch):
    from fastssl.kernels import tiling

    monkeypatch.setattr(tiling, "num_multiprocessors", lambda device: 132)  # 2500 keys in 40 parts, 16 a round
    check(cases, cases.Case(2, 2500, 256, seeds=1), DEVICE)


@needs_triton
def test_kernels_are_deterministic_and_keep_small_gradients_for_a_loss_scale():
    q, k, queue = (torch.randn(n, 64, device=DEVICE).half() for n in (130, 130, 700))
    grads = []
    for scale in (1, 1, 2.0**12):
        x = q.clone().requires_grad_()
        (infonce(x, k, queue / 8, 0.2, impl="triton") * scale).backward()
        grads.append(x.grad.double() / scale)
    truth = q.double().requires_grad_()
    infonce(truth, k.double(), queue.double() / 8, 0.2, impl="reference").backward()
    assert torch.equal(grads[0], grads[1])
    error = [(g - truth.grad).norm() / truth.grad.norm() for g in grads]
    assert error[2] < 1e-3 and error[2] <= error[0]
