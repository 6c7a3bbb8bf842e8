"""A step of every method in bf16, in one batch and in micro-batches: its loss is close to float32's."""

import method_cases as cases
import pytest

from fastssl import dist
from fastssl.step import step

BATCH = 16


def first_loss(name, precision, micro):
    run = cases.run(name, batch=BATCH, micro=BATCH // micro)
    run.optim.precision = precision
    dist.init("cpu")
    t = cases.build(run)
    if hasattr(t.method, "before_epoch"):
        pytest.skip("its labels come from a clustering of all images")
    source = t.loader.epoch(0)
    out = step(t, [next(source) for _ in range(micro)])
    assert t.scalars["applied"] and all(v.dtype in (v.float().dtype, v.long().dtype) for v in out.values())
    return float(t.scalars["loss"])


@pytest.mark.parametrize("name", cases.CASES)
def test_bf16_loss_is_close_to_float32(name):
    want = first_loss(name, "fp32", 1)
    for micro in (1, 4):
        assert first_loss(name, "bf16", micro) == pytest.approx(want, rel=0.05, abs=0.05)
