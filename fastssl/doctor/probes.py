"""Checks that import packages which may be broken, each in its own process: `python -m fastssl.doctor.probes NAME`.

The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastssl.kernels import Impl


def gpu(args: argparse.Namespace) -> dict:
    import torch

    devices, reason = [], ""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    return {"devices": devices, "cuda": torch.version.cuda or "none", "reason": reason}


def kernel(args: argparse.Namespace) -> dict:
    """One kernel, forward and backward, against its reference; without a GPU the reference alone."""
    import torch

    from fastssl.kernels.ntxent import ntxent

    cuda = torch.cuda.is_available()
    z = torch.randn(64, 32, device="cuda" if cuda else "cpu")
    grads, seconds = {}, 0.0
    implementations: tuple[Impl, ...] = ("reference", "triton") if cuda else ("reference",)
    for impl in implementations:
        leaf = z.clone().requires_grad_()
        start = time.perf_counter()
        ntxent(leaf, 0.5, impl=impl).backward()
        grads[impl], seconds = leaf.grad.cpu(), time.perf_counter() - start
    if not cuda:
        return {"detail": "the PyTorch references run; Triton's kernels need a GPU"}
    torch.testing.assert_close(grads["triton"], grads["reference"], rtol=1e-3, atol=1e-5)
    return {"detail": f"compiled and equal to its reference, {seconds:.1f} s with compilation"}


def loader(args: argparse.Namespace) -> dict:
    from fastssl.loader import Loader
    from fastssl.sampler import Sampler

    with tempfile.TemporaryDirectory() as folder:
        path, what = args.data, args.data
        if not path:
            path, what = f"{folder}/digits.beton", "scikit-learn's digits, 8 x 8; --data measures yours"
            command = [sys.executable, "-m", "fastssl", "convert", "digits", "test", path]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            if done.returncode:
                raise RuntimeError(f"fastssl convert failed: {done.stderr.strip()[-200:]}")
        batches = Loader(path, 64, Sampler.sequential(), device="cpu")
        next(iter(batches.epoch(0)))  # compiles the pipeline
        count, start = 0, time.perf_counter()
        for batch in batches.epoch(1):
            count += len(batch.index)
            if time.perf_counter() - start > 20:
                break
        rate = count / (time.perf_counter() - start)
    return {"detail": f"{rate:,.0f} images/s ({what})"}


PROBES = {"gpu": gpu, "kernel": kernel, "loader": loader}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=tuple(PROBES))
    parser.add_argument("--data")
    args = parser.parse_args()
    print("\n" + json.dumps(PROBES[args.name](args)))
