"""Queue and bank: circular writes, updates with repeated indices, centroids; and the test of assert_as_good_as."""

import numpy as np
import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import enqueue_, update_bank_, update_centroids_
from fastssl.kernels.testing import assert_as_good_as

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
HALF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place, of 1


def rounding(dtype):
    return 2 * HALF[dtype]


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "size, n, dim, dtype",
    [
        (10, 3, 5, torch.float16),
        (10, 23, 96, torch.float32),
        (7, 7, 32, torch.bfloat16),
        (1, 2, 33, torch.float16),
        (1000, 129, 128, torch.float16),
        (4099, 1000, 128, torch.bfloat16),
    ],
)
def test_enqueue_wraps_around(impl, size, n, dim, dtype):
    g = torch.Generator().manual_seed(0)
    queue = torch.full((size, dim), 7.0, dtype=dtype, device=DEVICE)
    pointer = torch.tensor([size - 1], device=DEVICE)
    expected, at = queue.double().cpu(), size - 1
    for _ in range(3):
        rows = torch.randn(n, dim, generator=g)
        rows[0] = 0
        for row in unit(rows):
            expected[at] = row
            at = (at + 1) % size
        assert enqueue_(queue, pointer, rows.to(DEVICE), impl=impl) is queue
        assert pointer.item() == at
    assert (queue.double().cpu() - expected).abs().max() <= rounding(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_enqueue_with_strides_and_without_normalisation(impl):
    queue, pointer = torch.zeros(6, 4, device=DEVICE).T.contiguous().T, torch.tensor([4], device=DEVICE)
    rows = torch.arange(24.0, device=DEVICE).reshape(3, 8)[:, ::2]
    enqueue_(queue, pointer, rows, normalize=False, impl=impl)
    assert torch.equal(queue[[4, 5, 0]], rows) and not queue[1:4].any() and pointer.item() == 1
    enqueue_(queue, pointer, rows[:0], impl=impl)
    assert pointer.item() == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim, dtype", [(96, torch.float32), (128, torch.float16), (2048, torch.bfloat16)])
def test_update_uses_the_last_of_repeated_indices(impl, dim, dtype):
    g = torch.Generator().manual_seed(0)
    bank = unit(torch.randn(50, dim, generator=g)).to(dtype).to(DEVICE)
    index, rows = torch.randint(0, 50, (300,), generator=g), torch.randn(300, dim, generator=g).to(dtype)
    expected = bank.double().cpu()
    for i, row in dict(zip(index.tolist(), rows.double())).items():
        expected[i] = unit(0.7 * expected[i] + 0.3 * row)
    assert update_bank_(bank, index.to(DEVICE), rows.to(DEVICE), 0.3, impl=impl) is bank
    assert (bank.double().cpu() - expected).abs().max() <= rounding(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_update_with_opposite_row_gives_zero(impl):
    bank = torch.eye(4, 8, device=DEVICE)
    update_bank_(bank, torch.tensor([2], device=DEVICE), -bank[2:3].clone(), 0.5, impl=impl)
    expected = torch.eye(4, 8)
    expected[2] = 0
    assert torch.equal(bank.cpu(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "rows, dim, k, dtype",
    [
        (0, 8, 3, torch.float32),
        (1, 32, 2, torch.float32),
        (1000, 96, 9, torch.float16),
        (129, 256, 200, torch.bfloat16),
    ],
)
def test_centroids_are_means_and_empty_ones_do_not_change(impl, rows, dim, k, dtype):
    g = torch.Generator().manual_seed(0)
    bank = unit(torch.randn(rows, dim, generator=g)).to(dtype).to(DEVICE)
    labels = torch.randint(-1, k - 1, (rows,), generator=g)
    truth = torch.full((k, dim), 7.0, dtype=torch.float64)
    for c in set(labels.tolist()) - {-1}:
        truth[c] = bank.double().cpu()[labels == c].mean(0)
    out = torch.full((k, dim), 7.0, device=DEVICE)
    update_centroids_(out, bank, labels.to(DEVICE), impl=impl)
    assert (out.double().cpu() - truth).abs().max() <= 1e-6
    assert torch.equal(out[-1].cpu(), torch.full((dim,), 7.0))


def test_more_than_65536_centroids():
    k = 65536 * 2 + 9
    labels = torch.tensor([5, 65536 + 5, k - 1, 5, 65536 * 2 + 5])
    rows, out = torch.arange(1.0, 6.0)[:, None].repeat(1, 2), torch.zeros(k, 2)
    update_centroids_(out, rows, labels, impl="reference")
    found = {int(c): out[c, 0].item() for c in out[:, 0].nonzero()}
    assert found == {5: 2.5, 65536 + 5: 2.0, k - 1: 3.0, 65536 * 2 + 5: 5.0}


@needs_triton
def test_in_place_kernels_compile_fullgraph():
    start = torch.randn(12, 32, device=DEVICE)
    index = torch.tensor([3, 5, 3], device=DEVICE)

    def step(queue, pointer, bank, rows):
        enqueue_(queue, pointer, rows, impl="triton")
        update_bank_(bank, index, rows, 0.5, impl="triton")
        return queue.sum() + bank.sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = start.clone(), torch.tensor([11], device=DEVICE), start.clone(), start[:3] * 2
        results.append((f(*tensors), *tensors[:3]))
    for plain, compiled in zip(*results):
        assert torch.allclose(plain.double(), compiled.double(), rtol=1e-6)
    assert results[1][2].item() == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_updates_do_not_wait_for_the_device():
    queue, pointer = torch.zeros(4096, 128, device="cuda").half(), torch.zeros(1, dtype=torch.int64, device="cuda")
    rows, index = torch.randn(256, 128, device="cuda"), torch.randint(0, 4096, (256,), device="cuda")
    labels = torch.randint(0, 10, (4096,), device="cuda")
    bank, centers = torch.randn(4096, 128, device="cuda"), torch.zeros(10, 128, device="cuda")
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            enqueue_(queue, pointer, rows)
            update_bank_(bank, index, rows, 0.5)
            update_centroids_(centers, bank, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_invalid_arguments_raise():
    queue, rows, index = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    for match, call in (
        ("pointer is torch.float32", lambda: enqueue_(queue, torch.zeros(1), rows)),
        ("rows is 7 wide", lambda: enqueue_(queue, index[:1], rows[:, :7])),
        ("no rows", lambda: enqueue_(queue[:0], index[:1], rows)),
        ("momentum=2", lambda: update_bank_(queue, index, rows, 2)),
        (r"int64 \(3,\)|torch.int64 \(2,\)", lambda: update_bank_(queue, index, torch.zeros(3, 8), 0.5)),
        ("torch.float32", lambda: update_centroids_(queue, rows, torch.zeros(2))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_assert_as_good_as_detects_errors():
    truth = torch.randn(64, 64, dtype=torch.float64)
    plain = truth.half()
    assert_as_good_as("half", truth.half(), plain, truth)
    off = truth.clone()
    off[:, 3] *= 1.1  # an error of 10 % in one of 64 columns
    for ours in (off, truth.bfloat16(), torch.full_like(truth, torch.nan)):
        with pytest.raises(AssertionError):
            assert_as_good_as("off", ours, plain, truth)


def test_patched_interpreter_rounds_bfloat16_like_torch():
    from fastssl.kernels.interpreter import from_bfloat16, to_bfloat16

    x = torch.cat([torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,)), torch.tensor([1e38, torch.inf, 0])])
    ours = from_bfloat16(to_bfloat16(x.numpy()))
    assert np.array_equal(ours, x.bfloat16().float().numpy())
    assert np.isnan(from_bfloat16(to_bfloat16(np.float32([np.nan])))).all()
