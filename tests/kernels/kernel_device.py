"""Where the kernel tests run: on a GPU if there is one, else in the interpreter that tests/conftest.py turns on."""

import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before triton is imported"
)
