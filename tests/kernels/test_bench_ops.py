"""Parts of bench/ops.py and bench/tiles.py that need no GPU; chunked matmuls are bench/ops.py's truth at large
sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE, needs_triton

from fastssl.kernels.ntxent import cases
from fastssl.kernels.testing import call

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))


def test_chunked_matmuls_equal_the_definition():
    from ops_compared import chunked_ntxent

    case = cases.Case(90, 24)
    z = cases.make(case, "cpu", 0)["z"].double()
    truth = call(cases, case, {"z": z, "labels": None}, "reference")
    for name, ours in chunked_ntxent(z, case.temperature, torch.float64, rows=32).items():
        assert torch.allclose(ours, truth[name], rtol=1e-9, atol=1e-12)


@needs_triton
def test_large_ntxent_cases_are_checked_with_a_loss_scale(monkeypatch):
    """At temperature 100 the gradients of 256 rows are as small as those of 65,536 rows at usual temperatures."""
    import ops_compared

    monkeypatch.setattr(ops_compared, "TRUTH_ROWS", 0)
    errors = ops_compared.ntxent_check(cases.Case(256, 64, temperature=100.0), DEVICE)
    assert errors["dz"] < 2**-26  # half a step of float16 is 2^-25


def test_cases_have_work_and_targets_have_cases():
    from ops_compared import OPS

    for op in OPS.values():
        assert set(op.targets) <= set(op.cases)
        for case in op.cases:
            operations, nbytes = op.work(case)
            assert nbytes > 0 and (operations is None or operations > 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time on")
def test_without_a_gpu_ops_exits_with_a_message():
    run = subprocess.run([sys.executable, BENCH / "ops.py"], capture_output=True, text=True)
    assert run.returncode == 2 and "nothing was measured" in run.stdout


def test_tiles_prints_builds_without_a_gpu():
    run = subprocess.run(
        [sys.executable, BENCH / "tiles.py", "one_pass", "--dims", "128", "--shipped"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith(" *"))
    assert " 64 x 128, 4 warps" in line and "   0 B spilled" in line and " 2 at a time" in line
