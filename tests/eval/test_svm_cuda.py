"""The GPU's SVM kernel: compiled for one thread of a CPU and for two architectures, and on a GPU."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch
from test_svm import data, made

from fastssl.eval import svm
from fastssl.eval.svm import cpu, cuda

SHIM = """
#include <math.h>
#define WARP 1
#define __device__
#define __global__
#define __shared__ static
struct Dim { int x; };
static Dim threadIdx = {0}, blockDim = {1}, blockIdx = {0};
static void __syncthreads() {}
static double __shfl_down_sync(unsigned, double, int) { return 0; }
%s
extern "C" void launch(int blocks, const float* K, i64 N, const int* rows, const i64* starts, const float* y,
                       const float* w, const double* costs, int n_costs, float* b, float* f, double* gaps, float* s) {
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        newton(K, N, rows, starts, y, w, costs, n_costs, b, f, gaps, s, 1e-7, 60, 400);
}
"""


def problems():
    """A Gram matrix and problems of some of its rows."""
    x, y = made(160, 170)
    rng, out = np.random.default_rng(0), []
    for n in (160, 90, 20):
        rows = np.sort(rng.permutation(160)[:n])
        weight = np.where(y[rows] > 0, 2.0, 1.0)
        weight[:: 3 if n == 160 else n] = 0
        out.append((rows, y[rows], weight))
    return cpu.Rows(x).operator[0], out


def test_the_cuda_source_finds_the_optimum_on_one_thread_of_a_cpu(tmp_path):
    (tmp_path / "a.cc").write_text(SHIM % cuda.SOURCE)
    library = tmp_path / "a.so"
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", "-o", library, tmp_path / "a.cc"], check=True)
    K, chosen = problems()
    rows, y, weight = (np.concatenate(part) for part in zip(*chosen))
    starts, costs, n = np.cumsum([0, *(len(p[0]) for p in chosen)]), np.array(svm.COSTS), len(rows)
    b, f = np.zeros(19 * n, np.float32), np.zeros(19 * n, np.float32)
    gaps, scratch = np.zeros((3, 19)), np.full(cuda.SCRATCH * n, np.nan, np.float32)
    arrays = [K, rows.astype(np.int32), starts.astype(np.int64), y.astype(np.float32), weight.astype(np.float32), costs]
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, b, f, gaps, scratch)]
    ctypes.CDLL(library).launch(3, pointers[0], ctypes.c_longlong(len(K)), *pointers[1:6], 19, *pointers[6:])
    assert (gaps <= 1e-6).all(), gaps
    for i, (some, label, w) in enumerate(chosen):
        part = slice(19 * starts[i], 19 * starts[i + 1])
        want = cpu.solve_few(K[np.ix_(some, some)], label, w, svm.COSTS, 1e-7) @ K[np.ix_(some, some)]
        mine = f[part].reshape(19, -1)
        np.testing.assert_allclose(mine, want, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(b[part].reshape(19, -1) @ K[np.ix_(some, some)], mine, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_cuda_source_compiles(architecture):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    program = nvrtc.createProgram(cuda.SOURCE, "svm.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{architecture}",))
    except Exception:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_numbers_of_the_cpu():
    for call, options in ((svm.svm, {}), (svm.low_shot, {"draws": svm.Draws((2, 8), 2)})):
        cpu, gpu = (call(*data(), solver=solver, **options)["results"] for solver in ("fast", "cuda"))
        for a, b in zip(cpu, gpu):
            assert a["map"] == pytest.approx(b["map"], abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_cuda_solver_is_refused():
    with pytest.raises(ValueError, match="--solver cuda needs"):
        svm.svm(*data(), solver="cuda")
