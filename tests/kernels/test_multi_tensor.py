"""Optimizer arithmetic on lists: compared with float64, with values on the device, and with an overflow flag."""

import itertools

import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels import multi_tensor
from fastssl.kernels.multi_tensor import LarsOptions
from fastssl.kernels.testing import assert_as_good_as, nan_memory

# an empty tensor, a scalar, exactly a chunk, one more, a tensor of three chunks, a 4-d one
SHAPES = [(0,), (1,), (8192,), (8193,), (3, 7000), (64, 3, 3, 3), (5,)]
FORMS = {
    "openselfsup": {"momentum": 0.9, "lr_in_momentum": True},
    "nesterov": {"momentum": 0.9, "dampening": 0.25, "nesterov": True},
    "first": {"momentum": 0.9, "dampening": 0.25, "first": True},
    "solo": {"momentum": 0.9, "clip_lr": True, "lr_in_momentum": False, "eta": 0.02},
    "norm of the sum": {"momentum": 0.9, "norm_of_sum": True, "eps": 1e-8},
    "no momentum": {"momentum": 0.0},
}


def lists(seed, count=3):
    g = torch.Generator().manual_seed(seed)
    made = [[torch.randn(s, generator=g).to(DEVICE) for s in SHAPES] for _ in range(count)]
    made[0][-1].zero_()  # weights of zero: ratio 1
    return made


def run(op, impl, values, dtype=torch.float32):
    copies = [[x.to(dtype, copy=True) for x in v] for v in values]
    with nan_memory():
        op(*copies, impl)
    return copies


def hold(name, op, values):
    ours, plain = run(op, "triton", values), run(op, "reference", values)
    truth = run(op, "reference", values, torch.float64)
    for i, j in itertools.product(range(len(values)), range(len(SHAPES))):
        assert_as_good_as(f"{name} {i} {SHAPES[j]}", ours[i][j], plain[i][j], truth[i][j], atol=1e-7)


@needs_triton
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_lars_equals_float64(form, ratio, on_device):
    number = (lambda x: torch.tensor(x, device=DEVICE)) if on_device else float

    def step(w, g, b, impl):
        lr, decay = number(0.3), number(0.01)
        squares = multi_tensor.square_sums(w, g, decay, impl=impl) if ratio else None
        multi_tensor.lars_(w, g, b, squares, LarsOptions(lr, decay, **FORMS[form]), impl=impl)

    hold(form, step, lists(1))


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_norm_of_sum_with_zero_gradient_is_that_of_the_decay(impl):
    """For a residual branch whose last norm is initialised with 0, |g| is 0, but the authors' |g + wd w| is not."""
    for norm_of_sum, want in ((True, 1 - 0.5 * 1e-3), (False, 1 - 0.5 * 1e-2)):
        w, g = [torch.ones(7, device=DEVICE)], [torch.zeros(7, device=DEVICE)]
        squares = multi_tensor.square_sums(w, g, 1e-2, impl=impl)
        multi_tensor.lars_(w, g, None, squares, LarsOptions(0.5, 1e-2, norm_of_sum=norm_of_sum), impl=impl)
        torch.testing.assert_close(w[0], torch.full_like(w[0], want))


@needs_triton
def test_square_sums_equal_float64():
    w, g, _ = lists(2)
    ours, plain, truth = (
        multi_tensor.square_sums([x.to(t) for x in w], [x.to(t) for x in g], 0.1, impl=impl)
        for impl, t in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    assert ours.shape == (3, len(SHAPES))
    assert_as_good_as("squares", ours, plain, truth)
    assert torch.equal(ours, multi_tensor.square_sums(w, g, 0.1, impl="triton"))  # deterministic


@needs_triton
@pytest.mark.parametrize("weight", [0.004, 0.7, 1.0])
def test_lerp_equals_float64(weight):
    for value in (weight, torch.tensor(weight, device=DEVICE)):
        hold("lerp", lambda t, s, impl, value=value: multi_tensor.lerp_(t, s, value, impl=impl), lists(3, 2))
    t, s = lists(3, 2)
    multi_tensor.lerp_(t, s, torch.tensor(weight, device=DEVICE), impl="triton")
    assert weight < 1 or all(map(torch.equal, t, s))


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nonzero_found_inf_changes_nothing(impl):
    w, g, b = lists(4)
    g[3][0] = torch.inf
    before = [[x.clone() for x in v] for v in (w, b)]
    flag = torch.ones(1, device=DEVICE)
    for squares in (None, multi_tensor.square_sums(w, g, 0.1, impl=impl)):
        multi_tensor.lars_(w, g, b, squares, LarsOptions(0.1, 0.1, momentum=0.9), found_inf=flag, impl=impl)
    multi_tensor.lerp_(w, g, 0.5, found_inf=flag, impl=impl)
    assert all(torch.equal(x, y) for v, u in zip((w, b), before) for x, y in zip(v, u))
    multi_tensor.lerp_(w, b, 0.5, found_inf=torch.zeros(1, device=DEVICE), impl=impl)
    assert not torch.equal(w[2], before[0][2])


@needs_triton
def test_tensors_at_unaligned_addresses():
    """ZeRO gives LARS fragments of a flat tensor, at any address."""
    flat = [torch.randn(20_000, device=DEVICE) for _ in range(3)]
    pieces = [[f[1:9000], f[9001:9001], f[9001:]] for f in flat]
    plain = [[x.clone() for x in v] for v in pieces]
    for (w, g, b), impl in ((pieces, "triton"), (plain, "reference")):
        squares = multi_tensor.square_sums(w, g, 0.0, impl=impl)
        multi_tensor.lars_(w, g, b, squares, LarsOptions(0.1, 0.0, momentum=0.9), impl=impl)
    for x, y in zip(pieces[0] + pieces[2], plain[0] + plain[2]):
        torch.testing.assert_close(x, y)


def test_mismatched_tensors_raise():
    a = [torch.zeros(3)]
    with pytest.raises(ValueError, match="the lists have 1 and 2 tensors, but must have equal length"):
        multi_tensor.lerp_(a, a * 2, 0.5)
    with pytest.raises(ValueError, match="sizes, dtypes and devices must agree"):
        multi_tensor.lerp_(a, [torch.zeros(4)], 0.5)
    if DEVICE == "cuda" or __import__("triton").knobs.runtime.interpret:
        double = [torch.zeros(3, dtype=torch.float64, device=DEVICE)]
        with pytest.raises(ValueError, match="take float32"):
            multi_tensor.lerp_(double, double, 0.5, impl="triton")
        turned = [torch.zeros(4, 5, device=DEVICE).T], [torch.zeros(5, 4, device=DEVICE)]
        with pytest.raises(ValueError, match="are in different orders in memory: make both contiguous"):
            multi_tensor.lerp_(*turned, 0.5, impl="triton")
