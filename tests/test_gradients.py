"""Gradients of all parameters together: their average over ranks, their norm, and the loss scale."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "methods"))
import method_cases as cases

from fastssl import amp, dist, engine, gradients, step
from fastssl.amp import LossScaler


def make(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("max_norm", [0.5, 100.0])  # smaller and larger than the norm
def test_clipping_is_torchs(max_norm):
    ours = make((3, 4), (5,), ())
    params = [torch.zeros_like(g, requires_grad=True) for g in ours]
    for p, g in zip(params, ours):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    gradients.clip_(ours, max_norm)
    for p, g in zip(params, ours):
        torch.testing.assert_close(g, p.grad)


def test_gradients_are_averaged_in_buckets(monkeypatch):
    """The second of two ranks, which is simulated, has gradients three times as large."""
    reduced = []
    monkeypatch.setattr(gradients, "ALL_REDUCE_ELEMENTS", 10)
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "sum_", lambda x: reduced.append(x.numel()) or x.mul_(4))
    grads = make((2, 3), (5,), (), (2, 4), (4,), (3,))
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params[:-1], grads):
        p.grad = g.clone()
    found = gradients.average_gradients(params)
    assert reduced == [11, 13, 3]  # more than ten elements each, but for the last
    assert all(f is p.grad for f, p in zip(found, params)) and not found[-1].any()
    for f, g in zip(found[:-1], grads):
        torch.testing.assert_close(f, 2 * g)


@pytest.mark.parametrize("clip, each, called", [(0.0, False, 0), (0.5, False, 1), (0.5, True, 0)])
def test_a_step_clips_unscaled_gradients_once(clip, each, called, monkeypatch):
    norms = []
    monkeypatch.setattr(
        step, "clip_", lambda grads, most: norms.append((most, float(torch.stack([g.norm() for g in grads]).norm())))
    )
    dist.init("cpu")
    for scale in (4.0, 64.0):
        run = cases.run("supervised")
        run.optim.precision, run.optim.clip, run.optim.clip_each = "fp16", clip, each
        t = cases.build(run)
        t.loss_scaler.value = scale
        _, micro_batches = next(engine.batches(t))
        step.step(t, micro_batches)
        assert t.scalars["applied"]
    assert len(norms) == 2 * called
    if called:
        assert norms[0] == (0.5, pytest.approx(norms[1][1], rel=1e-2)) and norms[0][1] > 0


NAN, GOOD = [torch.tensor([1.0, float("nan")])], [torch.ones(3)]


def flags(scaler, *grads) -> list[bool]:
    return [bool(scaler.unscale_([x.clone() for x in g])) for g in grads]


def test_too_many_steps_in_a_row_that_are_not_finite_end_all_updates():
    scaler = LossScaler("fp32", skip_nonfinite=2)
    assert flags(scaler, NAN, NAN, GOOD, NAN, NAN, GOOD) == [True, True, False] * 2
    assert flags(scaler, NAN, NAN, NAN, GOOD, GOOD) == [True] * 5
    scaler = LossScaler("fp16", skip_nonfinite=2)
    scaler.value = 4.0  # which can still be lowered
    assert flags(scaler, NAN, NAN, NAN, GOOD) == [True, True, True, False]
    assert LossScaler("fp32").unscale_(NAN) is None


def test_the_scale_and_the_good_steps_are_in_a_checkpoint():
    scaler, other = LossScaler("fp16"), LossScaler("fp16")
    assert scaler.value == 2.0**16 and LossScaler("bf16").value == 1.0
    scaler.value = 8.0
    for _ in range(3):
        scaler.unscale_([torch.ones(3)])
        scaler.update_()
    other.load_state_dict(scaler.state_dict())
    assert (other.value, int(other.good_steps)) == (8.0, 3)


@pytest.mark.parametrize(
    "text, bf16, fp16",
    [
        ("processor : 0\nflags : fpu avx512_bf16\n", False, True),
        ("Features : fp asimdhp\n", True, False),
        ("flags : fpu avx2\n", True, True),
        ("processor : 0\n", False, False),  # unknown
    ],
)
def test_precisions_that_a_processor_emulates(text, bf16, fp16, monkeypatch):
    monkeypatch.setattr(amp.Path, "read_text", lambda path: text)
    cpu = torch.device("cpu")
    assert [amp.emulated(p, cpu) for p in ("bf16", "fp16", "fp32")] == [bf16, fp16, False]
    assert not amp.emulated("bf16", torch.device("cuda"))
