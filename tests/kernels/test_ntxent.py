"""NT-Xent, SupCon and DCL: the definition compared with formulas, the kernel with float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import ntxent
from fastssl.kernels.ntxent import cases
from fastssl.kernels.testing import call, nan_memory


def test_definition_is_cross_entropy_without_self():
    z = torch.randn(14, 9, dtype=torch.float64, requires_grad=True)
    u = F.normalize(z, dim=1)
    s = (u @ u.T / 0.3).fill_diagonal_(-torch.inf)
    theirs = F.cross_entropy(s, (torch.arange(14) + 7) % 14)
    ours = ntxent(z, 0.3)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, z)[0] for x in (ours, theirs)), rtol=1e-10)


def test_definition_of_supcon_and_of_the_decoupled_form():
    z, y = torch.randn(12, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0, 4, 4, 1])
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.2
    for decoupled in (False, True):
        rows = []
        for i in range(12):
            others = [j for j in range(12) if j != i]
            positives = [j for j in others if y[j] == y[i]]
            summed = [j for j in others if not (decoupled and j in positives)]
            rows.append(s[i, summed].logsumexp(0) - s[i, positives].mean() if positives else torch.zeros(()).double())
        assert torch.allclose(ntxent(z, 0.2, labels=y, decoupled=decoupled), torch.stack(rows).mean(), rtol=1e-12)


def test_labels_of_samples_apply_to_both_views():
    z = torch.randn(8, 5, dtype=torch.float64)
    y = torch.tensor([3, -1, 3, -1])
    assert torch.equal(ntxent(z, 0.2, labels=y), ntxent(z, 0.2, labels=torch.tensor([3, 8, 3, 9] * 2)))
    assert torch.allclose(ntxent(z, 0.2, labels=-torch.ones(4, dtype=torch.int64)), ntxent(z, 0.2), rtol=1e-12)


def test_an_odd_number_of_rows_has_no_labels_of_samples():
    with pytest.raises(ValueError, match=r"expected integers \(3,\) on cpu"):
        ntxent(torch.randn(3, 5), 0.2, labels=torch.tensor([1]))


def test_splits_cover_all_columns_and_fill_the_gpu():
    from fastssl.kernels.tiling import _split_tiles

    for programs, tiles, places in ((2, 1024, 264), (32, 1024, 264), (79, 157, 132), (132, 40, 132), (1, 1, 8)):
        splits, each = _split_tiles(programs, tiles, places)
        assert (splits - 1) * each < tiles <= splits * each
    assert _split_tiles(32, 1024, 264) == (8, 128)  # 256 programs for 264 slots
    assert _split_tiles(79, 156, 132) == (3, 52)  # 237 programs for 264 slots, not 158, which would take as long
    assert _split_tiles(264, 100, 264) == (1, 100)


def test_zero_rows_have_zero_gradient():
    z = torch.randn(6, 4)
    z[2] = 0
    z.requires_grad_()
    ntxent(z, 0.1).backward()
    assert z.grad.isfinite().all() and not z.grad[2].any() and z.grad[1].any()


@needs_triton
def test_classes_are_equal_where_labels_are():
    from fastssl.kernels.similarity import classes_of

    g = torch.Generator().manual_seed(0)
    # 1 and 2^32 fold to the same 32 bits; and one label alone, many equal ones, all different ones
    mixed = torch.tensor([1, 1 << 32, 1, 1 << 32, -7, 1 << 62, -7, 0, -(1 << 62), 0] * 30)
    for labels in (mixed, mixed[:1], mixed[:1].expand(200).contiguous(), torch.randperm(300, generator=g) << 25):
        padded = -(-len(labels) // 128) * 128
        classes, count = (x.cpu() for x in classes_of(labels.to(DEVICE), padded))
        own = classes[: len(labels)].long()
        equal = labels[:, None] == labels
        assert torch.equal(own[:, None] == own, equal) and torch.equal(count[own], equal.sum(1).int())
        assert (own >= 0).all() and (classes[len(labels) :] == -1).all()


@needs_triton
@pytest.mark.parametrize("kind", ["identical", "antipodal", "opposed"])
@pytest.mark.parametrize("temperature", [0.005, 0.015, 0.1])
def test_float16_extremes_are_within_the_rounding_of_the_rows(kind, temperature):
    case = cases.Case(6, 32, torch.float16, temperature, kind=kind)
    x = cases.make(case._replace(dtype=torch.float32), DEVICE, 0)
    x["z"] = x["z"].half()
    ours, truth = call(cases, case, x, "triton"), call(cases, case, {**x, "z": x["z"].double()}, "reference")
    assert ours["dz"].isfinite().all()
    assert abs(ours["loss"] - truth["loss"]) <= 2**-11 * 2 / temperature
    # a gradient through unit rows whose logits are off by 2^-11 / temperature, at |z| = sqrt(32)
    assert (ours["dz"] - truth["dz"]).abs().max() <= 2**-11 * 2 / temperature * cases.scale(case, "dz")


@needs_triton
def test_kernel_is_deterministic_and_scales_with_the_incoming_gradient():
    z = torch.randn(300, 64, device=DEVICE, dtype=torch.float16)
    once, again, scaled = (z.clone().requires_grad_() for _ in range(3))
    with nan_memory():
        ntxent(once, 0.1, impl="triton").backward()
        ntxent(again, 0.1, impl="triton").backward()
        (ntxent(scaled, 0.1, impl="triton") * 1024).backward()
    assert torch.equal(once.grad, again.grad)
    exact = ntxent(z64 := z.double().requires_grad_(), 0.1, impl="reference")
    exact.backward()
    # with a loss scale, gradients do not underflow in float16
    assert (scaled.grad.double() / 1024 - z64.grad).abs().max() <= (once.grad.double() - z64.grad).abs().max()


@pytest.mark.gpu
def test_kernel_is_captured_in_a_cuda_graph():
    z = torch.randn(512, 128, device="cuda", dtype=torch.float16, requires_grad=True)

    def step():
        return torch.autograd.grad(ntxent(z, 0.1, impl="triton"), z)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    assert torch.equal(captured, step())
