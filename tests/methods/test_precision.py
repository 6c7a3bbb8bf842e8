"""Every method makes a step in bf16, whole and in micro-batches, with the loss of float32 within its rounding."""

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
        pytest.skip("its labels come from a clustering of the whole file")
    source = t.loader.epoch(0)
    out = step(t, [next(source) for _ in range(micro)])
    assert t.scalars["applied"] and all(v.dtype in (v.float().dtype, v.long().dtype) for v in out.values())
    return float(t.scalars["loss"])


@pytest.mark.parametrize("name", cases.CASES)
def test_bf16_is_float32_within_its_rounding(name):
    want = first_loss(name, "fp32", 1)
    for micro in (1, 4):
        assert first_loss(name, "bf16", micro) == pytest.approx(want, rel=0.05, abs=0.05)
