"""The device of the kernel tests: a GPU if there is one, else the CPU with Triton's interpreter (tests/conftest.py)."""

import numpy as np
import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before triton is imported"
)


@pytest.fixture
def truncated_sums(monkeypatch):
    """Make half-precision products in the interpreter like those of tensor cores: 16 terms at a time, with partial sums
    truncated to float32 instead of rounded.  For d terms the relative error is up to d / 16 x 2^-23, always towards
    zero.  (On an H200 it was two to three times as large.)
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from fastssl.kernels.interpreter import from_bfloat16, patch_bfloat16

    patch_bfloat16()
    exact = InterpreterBuilder.create_dot

    def wide(x):
        return (from_bfloat16(x.data) if x.dtype.scalar == triton.language.bfloat16 else x.data).astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar.primitive_bitwidth != 16:
            return exact(self, a, b, d, *rest)
        a, b, total = wide(a), wide(b), d.data
        for k in range(0, a.shape[1], 16):
            full = total.astype(np.float64) + a[:, k : k + 16] @ b[k : k + 16]
            total = full.astype(np.float32)
            total = np.where(np.abs(total) > np.abs(full), np.nextafter(total, np.float32(0)), total)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
