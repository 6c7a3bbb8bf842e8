"""Checks for kernels: compare errors with float64, fill new memory with NaN, and record and compile launches ahead of
time for an architecture (which needs neither a GPU nor the interpreter).
"""

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import Impl

# without it torch refuses matmuls inside nan_memory on CUDA
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory for one program, by compute capability


def assert_as_good_as(
    name: str,
    ours: Tensor | float,
    plain: Tensor | float,
    truth: Tensor | float,
    factor: float = 2.0,
    atol: float = 1e-6,
    scale: float | None = None,
) -> None:
    """AssertionError unless the error of `ours` against `truth` (float64) is at most `factor` times that of `plain`
    PyTorch in the same dtype, plus atol * scale.

    Applies to both the largest and the root-mean-square error.  scale: the largest |truth| by default.  Stack scalars
    over several seeds: one of them can be exact by chance.
    """
    x, p, t = (torch.as_tensor(value).detach().double().cpu() for value in (ours, plain, truth))
    assert x.shape == p.shape == t.shape, f"{name}: {x.shape}, {p.shape}, {t.shape}"
    assert t.isfinite().all(), f"{name}: the truth is not finite"
    assert x.isfinite().all(), f"{name}: {int((~x.isfinite()).sum())} of {x.numel()} values are not finite"
    if t.numel() == 0:
        return
    scale = float(t.abs().max()) if scale is None else scale
    for kind, measure in (("largest", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error, allowed = float(measure(x - t)), factor * float(measure(p - t)) + atol * scale
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3g}, allowed {allowed:.3g} = {factor:g} x plain's "
            f"{float(measure(p - t)):.3g} + {atol:g} x {scale:.3g}"
        )


@contextmanager
def nan_memory() -> Iterator[None]:
    """Context manager: torch.empty is filled with NaN (integers: their largest value), so that a read of uninitialised
    memory changes results."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def call(op: ModuleType, case: Any, x: dict, impl: Impl) -> dict[str, Tensor]:
    """The results for one case of an op's cases.py: those of its `outputs`; or {"loss": ..., "dz": ...}, its
    `loss` with the gradients of the entries of x that its `leaves` names."""
    if not hasattr(op, "loss"):
        return op.outputs(case, x, impl)
    leaves = {name: leaf(x[name]) for name in op.leaves(case)}
    loss = op.loss(case, {**x, **leaves}, impl)
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return {"loss": loss, **{f"d{name}": gradient for name, gradient in zip(leaves, gradients)}}


def similarity_scale(case: Any, name: str) -> float:
    """For a loss over similarities: what a rounding error is relative to if the true value is close to zero by
    cancellation."""
    if name == "loss":
        return 1 / case.temperature  # the largest logit
    return 2 / (case.temperature * max(case.rows, 1) * (case.dim**0.5 if case.normalize else 1.5))


def check(op: ModuleType, case: Any, device: str = "cpu", impl: Impl = "triton") -> dict[str, float]:
    """assert_as_good_as for every output and gradient of one case; returns their largest errors.

    op: an op's cases.py.  Plain PyTorch is the reference in the case's dtype: under autocast for half precision, as
    users run it.  A CPU has no TF32 for cases with precision "high": float16 operands, with as many bits, replace it.
    """
    before = torch.get_float32_matmul_precision()
    results: dict[str, list[dict[str, Tensor]]] = {"ours": [], "plain": [], "truth": []}
    try:
        for seed in range(case.seeds):
            x = op.make(case, device, seed)
            torch.set_float32_matmul_precision(case.precision)
            with nan_memory():
                results["ours"].append(call(op, case, x, impl))
            half = torch.float16 if case.precision == "high" and device == "cpu" else case.dtype
            with torch.autocast(torch.device(device).type, dtype=half, enabled=half != torch.float32):
                results["plain"].append(call(op, case, x, "reference"))
            torch.set_float32_matmul_precision("highest")
            double = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in x.items()}
            results["truth"].append(call(op, case, double, "reference"))
    finally:
        torch.set_float32_matmul_precision(before)
    errors = {}
    for name in results["ours"][0]:
        ours, plain, truth = (torch.stack([r[name].detach().double().cpu() for r in results[k]]) for k in results)
        scale = max(float(truth.abs().max()), op.scale(case, name)) if truth.numel() else None
        assert_as_good_as(f"{case}: {name}", ours, plain, truth, scale=scale)
        errors[name] = float((ours - truth).abs().max()) if truth.numel() else 0.0
    return errors


def leaf(x: Tensor) -> Tensor:
    """x as a leaf that requires a gradient, without a copy."""
    return x.detach().requires_grad_()


class Launch(NamedTuple):
    kernel: Any
    grid: Any
    args: tuple
    kwargs: dict


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Context manager: kernels are not run; yields a list that receives every launch that needs another compilation.

    Arguments may be meta tensors.  Launches that need no new compilation are not recorded.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    seen = set()

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in args)
        key = (kernel.__name__, types, tuple(sorted(kwargs.items())))
        if key not in seen:
            seen.add(key)
            launches.append(Launch(kernel, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Build:
    """The compiled code of a launch."""

    kernel: str
    arch: int
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes of shared memory
    fits: bool  # the architecture has that much shared memory
    programs_per_sm: int  # that fit on a multiprocessor at a time
    narrow_loads: int  # instructions that load one value of 8 or 16 bits, where a thread could load 16 bytes at once
    loop: int  # instructions that a warp issues in the shortest pass of the longest loop
    tensor_core: str  # "HGMMA", "HMMA" or ""


def compile_launch(launch: Launch, arch: int) -> Build:
    """Compile for compute capability `arch` (80, 90) with the signature and specialisation of the launch itself."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kwargs = dict(launch.kwargs, debug=False, instrumentation_mode="")
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *launch.args, **kwargs
    )
    options, signature, constants, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    built = triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options.__dict__)
    usage, sass = _cuobjdump(built.asm["cubin"])
    used = dict(re.findall(r"(\w+):(\d+)", usage))
    registers, stack, local = (int(used[k]) for k in ("REG", "STACK", "LOCAL"))
    core = next((name for name in ("HGMMA", "HMMA") if name in sass), "")
    shared, threads = built.metadata.shared, 32 * built.metadata.num_warps
    programs_per_sm = min(
        65536 // (threads * (-(-registers // 8) * 8)), (MAX_SHARED[arch] + 1024) // (shared + 1024), 2048 // threads
    )
    narrow = len(re.findall(r"\bLDG\.E\.(?:[US]8|U16)\b", sass))
    fits = shared <= MAX_SHARED[arch]
    return Build(
        kernel.__name__, arch, registers, stack + local, shared, fits, programs_per_sm, narrow, _loop_length(sass), core
    )


def _loop_length(sass: str) -> int:
    """Instructions of the longest loop, along its shortest path."""
    code = [
        (int(m[1], 16), bool(m[2]), m[3], int(m[4] or "0", 16))
        for m in re.finditer(
            r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)(?:[^;\n]*?0x([0-9a-f]+))?[^;\n]*;", sass
        )
    ]
    back = [(to, at) for at, _, name, to in code if name.startswith("BRA") and to < at]
    first, last = max(back, key=lambda ends: ends[1] - ends[0], default=(0, -1))
    shortest: dict[int, float] = {first: 0}  # address: instructions before it on the shortest path
    body = [c for c in code if first <= c[0] <= last]
    for (at, predicated, name, to), after in zip(body, [*(c[0] for c in body[1:]), last + 1]):
        if at not in shortest:
            continue
        jumps = name.startswith("BRA") and at < to <= last
        for successor in [to] * jumps + [after] * (not jumps or predicated):
            shortest[successor] = min(shortest.get(successor, math.inf), shortest[at] + 1)
    return int(shortest.get(last + 1, 0))


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, sass = (
            subprocess.run([tool, flag, f.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
        return usage, sass
