"""newton.py on the GPU: all fits of a batch in one launch of a CuPy kernel, with a thread block for each problem.

A block solves its problem for all costs, the smallest first, each from the solution of the one before, by the same
Newton steps and conjugate gradients.  In a product K p a warp computes one row.  Products are fp32, sums fp64.
Tests compile the source for sm_80 and sm_90, and for one thread of a CPU, where it must find the optimum.  It has not
been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastssl.eval.svm.cpu import check
from fastssl.eval.svm.newton import CG_STEPS, NEWTON_STEPS, TOLERANCE
from fastssl.eval.svm.solvers import POSITIVE_WEIGHT, Costs, Problem, Scores, average_precision

if TYPE_CHECKING:
    import cupy

THREADS = 512
SCRATCH = 10  # vectors of a problem's rows
SOURCE = r"""
#ifndef WARP
#define WARP 32  // 1 where a test compiles this for one thread of a CPU
#endif
typedef long long i64;
#define EACH(j) for (int j = threadIdx.x; j < n; j += blockDim.x)

__device__ double block_sum(double v, double* shared) {
    for (int o = WARP / 2; o; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = v;
    __syncthreads();
    if (threadIdx.x < WARP) {
        v = threadIdx.x < blockDim.x / WARP ? shared[threadIdx.x] : 0.0;
        for (int o = WARP / 2; o; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
        if (threadIdx.x == 0) shared[0] = v;
    }
    __syncthreads();
    return shared[0];
}

__device__ void times(const float* K, const int* rows, i64 N, int n, const float* p, float* out) {  // out = K p
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < n; i += blockDim.x / WARP) {
        const float* row = K + rows[i] * N;
        float sum = 0.f;
        for (int j = threadIdx.x % WARP; j < n; j += WARP) if (p[j] != 0.f) sum += row[rows[j]] * p[j];
        for (int o = WARP / 2; o; o >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, o);
        if (threadIdx.x % WARP == 0) out[i] = sum;
    }
    __syncthreads();
}

__device__ double line_search(int n, const float* y, const float* e, const float* b, const float* f, const float* d,
                              const float* fd, double* shared) {
    double linear = 0, square = 0, low = 0, high = 1, t = 1;
    EACH(j) { linear += (double)b[j] * fd[j]; square += (double)d[j] * fd[j]; }
    linear = block_sum(linear, shared);
    square = block_sum(square, shared);
    for (int k = 0; k < 40; k++) {
        double slope = 0, curve = 0;
        EACH(j) {
            double u = 1 - y[j] * (f[j] + t * fd[j]);
            if (u > 0) { slope -= e[j] * u * y[j] * fd[j]; curve += (double)e[j] * fd[j] * fd[j]; }
        }
        slope = linear + t * square + block_sum(slope, shared);
        curve = square + block_sum(curve, shared);
        if (slope <= 0) { if (t == 1) return 1; low = t; } else high = t;
        double next = curve > 0 ? t - slope / curve : low;
        if (!(low < next && next < high)) next = 0.5 * (low + high);
        if (fabs(next - t) < 1e-4 * t) return next;
        t = next;
    }
    return low;
}

extern "C" __global__ void newton(
    const float* K, i64 N,                       // products of all rows and the ones of the bias
    const int* all_rows, const i64* starts,      // rows of problem i: starts[i] to starts[i + 1]
    const float* all_y, const float* all_w,      // -1 or 1; weight of the class, 0: left out
    const double* costs, int n_costs,            // rising
    float* all_b, float* all_f, double* gaps,    // out: at n_costs * starts[i], (costs, n); (problems, costs)
    float* scratch, double tolerance, int newtons, int gradients
) {
    __shared__ double shared[32];
    const i64 start = starts[blockIdx.x];
    const int n = starts[blockIdx.x + 1] - start;
    const int* rows = all_rows + start;
    const float *y = all_y + start, *w = all_w + start;
    float* s = scratch + SCRATCH * start;
    float *e = s, *b = s + n, *f = b + n, *g = f + n, *kg = g + n, *end = kg + n, *fend = end + n, *r = fend + n,
          *p = r + n, *q = p + n;
    EACH(j) b[j] = f[j] = 0.f;
    for (int c = 0; c < n_costs; c++) {
        double up = 0, down = 0;
        EACH(j) {  // the multiple that maximises the dual
            e[j] = 2 * costs[c] * w[j];
            double a = fmax(y[j] * b[j], 0.f);
            up += a;
            down += (double)b[j] * f[j] + (e[j] > 0 ? a * a / e[j] : 0);
        }
        up = block_sum(up, shared);
        down = block_sum(down, shared);
        if (down > 0) EACH(j) { b[j] *= up / down; f[j] *= up / down; }
        double relative = 0;
        for (int it = 0; it <= newtons; it++) {
            EACH(j) g[j] = b[j] - e[j] * y[j] * fmaxf(0.f, 1 - y[j] * f[j]);
            times(K, rows, N, n, g, kg);
            double gap = 0, norm = 0, objective = 0;
            EACH(j) {
                double u = fmaxf(0.f, 1 - y[j] * f[j]);
                gap += 0.5 * g[j] * kg[j];
                norm += 0.5 * b[j] * f[j];
                objective += 0.5 * e[j] * u * u;
            }
            gap = block_sum(gap, shared);
            norm = block_sum(norm, shared);
            objective = norm + block_sum(objective, shared);
            relative = gap / fmax(norm, 1e-30);
            if (gap <= tolerance * norm || it == newtons) break;
            double target = fmax(0.3 * tolerance * norm, 0.02 * fmin(gap, 0.1 * objective));
            EACH(j) end[j] = e[j] > 0 && 1 - y[j] * f[j] > 0 ? b[j] : 0.f;
            times(K, rows, N, n, end, fend);
            double rz = 0, ratio = 0, before = 0;
            EACH(j) {
                bool inside = e[j] > 0 && 1 - y[j] * f[j] > 0;
                r[j] = inside ? y[j] - fend[j] - end[j] / e[j] : 0.f;
                p[j] = r[j] * e[j];
                rz += (double)r[j] * p[j];
            }
            rz = block_sum(rz, shared);
            for (int k = 0; k < gradients && rz > 0; k++) {
                times(K, rows, N, n, p, q);
                double pap = 0, next = 0;
                EACH(j) if (p[j] != 0.f) pap += (double)p[j] * (q[j] + p[j] / e[j]);
                pap = block_sum(pap, shared);
                if (!(pap > 0)) break;
                double model = 0.5 * (pap + ratio * ratio * before - rz);
                float step = rz / pap;
                EACH(j) {
                    fend[j] += step * q[j];
                    if (p[j] != 0.f) {
                        end[j] += step * p[j];
                        r[j] -= step * (q[j] + p[j] / e[j]);
                        next += (double)r[j] * r[j] * e[j];
                    }
                }
                next = block_sum(next, shared);
                ratio = next / rz; before = pap; rz = next;
                if (model <= target) break;
                EACH(j) if (p[j] != 0.f) p[j] = r[j] * e[j] + (float)ratio * p[j];
            }
            EACH(j) { end[j] -= b[j]; fend[j] -= f[j]; }
            float t = line_search(n, y, e, b, f, end, fend, shared);
            if (t == 0.f) {  // the system was solved too loosely: the gradient always descends
                EACH(j) { end[j] = -g[j]; fend[j] = -kg[j]; }
                t = line_search(n, y, e, b, f, end, fend, shared);
            }
            EACH(j) { b[j] += t * end[j]; f[j] += t * fend[j]; }
        }
        EACH(j) {
            all_b[n_costs * start + (i64)c * n + j] = b[j];
            all_f[n_costs * start + (i64)c * n + j] = f[j];
        }
        if (threadIdx.x == 0) gaps[(i64)blockIdx.x * n_costs + c] = relative;
    }
}
""".replace("SCRATCH *", f"{SCRATCH} *")


def solve(K: cupy.ndarray, problems: list[tuple], costs: Costs, tolerance: float = TOLERANCE) -> list[tuple]:
    """[(b, f)] of (costs, n) CuPy arrays for problems (rows (n,) of K, y, weight), in one launch."""
    import cupy

    rows, y, weight = (np.concatenate(part) for part in zip(*problems))
    starts = np.cumsum([0, *(len(problem[0]) for problem in problems)])
    A = len(costs)
    b, f = (cupy.empty(A * len(rows), cupy.float32) for _ in range(2))
    gaps = cupy.empty((len(problems), A))
    kernel = cupy.RawKernel(SOURCE, "newton")
    kernel(
        (len(problems),),
        (THREADS,),
        (
            K,
            np.int64(len(K)),
            cupy.asarray(rows, np.int32),
            cupy.asarray(starts, np.int64),
            cupy.asarray(y, np.float32),
            cupy.asarray(weight, np.float32),
            cupy.asarray(sorted(costs), np.float64),
            np.int32(A),
            b,
            f,
            gaps,
            cupy.empty(SCRATCH * len(rows), cupy.float32),
            np.float64(tolerance),
            np.int32(NEWTON_STEPS),
            np.int32(CG_STEPS),
        ),
    )
    check(gaps.get(), tolerance)
    return [tuple(part[A * i : A * j].reshape(A, j - i) for part in (b, f)) for i, j in pairwise(starts)]


class Cuda:
    """The solver on the GPU, whose memory must hold N^2 floats."""

    def __init__(self, x: np.ndarray, x_test: np.ndarray) -> None:
        try:
            import cupy
        except ImportError:
            raise ValueError("--solver cuda needs CuPy: pip install 'fastssl[gpu]', or give --solver fast") from None
        if not cupy.cuda.is_available():
            raise ValueError("--solver cuda needs an NVIDIA GPU: give --solver fast")
        ones = [np.ones((len(part), 1), np.float32) for part in (x, x_test)]
        self.x, self.x_test = (cupy.asarray(np.concatenate(pair, 1)) for pair in zip((x, x_test), ones))
        self.K = self.x @ self.x.T

    def cross_validate(self, positive_NC: np.ndarray, held_out_CFN: np.ndarray, costs: Costs) -> np.ndarray:
        C, folds, N = held_out_CFN.shape
        all_rows, problems = np.arange(N), []
        for c in range(C):
            y = np.where(positive_NC[:, c], 1, -1)
            problems += [
                (all_rows, y, np.where(test, 0, np.where(y > 0, POSITIVE_WEIGHT, 1))) for test in held_out_CFN[c]
            ]
        fits = solve(self.K, problems, costs)
        ap = [
            average_precision(f.get(), np.broadcast_to(np.where(weight > 0, -1, y > 0), f.shape), False)
            for (_, f), (_, y, weight) in zip(fits, problems)
        ]
        return np.reshape(ap, (C, folds, len(costs))).mean(1).T

    def refit(self, positive_NC: np.ndarray, cost_C: np.ndarray) -> np.ndarray:
        out: list[tuple[Any, Any]] = []
        for c, cost in enumerate(cost_C):
            out += self.scores([(np.arange(len(positive_NC)), positive_NC[:, c])], (cost,))
        return np.stack([on_test[0].get() for on_test, _ in out])

    def few(self, problems: list[Problem], costs: Costs) -> Iterator[Scores]:
        for on_test, on_train in self.scores(problems, costs):
            yield on_test.get(), on_train.get()

    def scores(self, problems: list[Problem], costs: Costs) -> Iterator[tuple[Any, Any]]:
        """As `few`, on the GPU."""
        chosen = [
            (rows, np.where(positive, 1, -1), np.where(positive, POSITIVE_WEIGHT, 1)) for rows, positive in problems
        ]
        for (rows, _), (b, _) in zip(problems, solve(self.K, chosen, costs)):
            w = b @ self.x[rows]
            yield w @ self.x_test.T, w @ self.x.T
