"""Linear SVMs on products of rows, many at once: scikit-learn's LinearSVC (squared hinge, penalised bias).

min over w: 1/2 |w|^2 + sum_i C_i max(0, 1 - y_i f_i)^2, f = K b, w = sum_i b_i (x_i, 1), K = x x^T + 1.  C_i = 0 leaves
row i out, so that classes, costs and folds share K.  Newton's method on the rows inside the margin (Chapelle 2007,
https://doi.org/10.1162/neco.2007.19.5.1155) with conjugate gradients, whose products K p of all fits are one matrix
product.  A fit ends by its duality gap, which for the dual point a_i = 2 C_i max(0, 1 - y_i f_i) is
1/2 |w - sum_i a_i y_i (x_i, 1)|^2: nothing cancels in it, so fp32 is enough.  It bounds 1/2 |w - optimum|^2.

Shapes: F fits, N rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from threadpoolctl import threadpool_limits

TOLERANCE = 1e-5  # duality gap over 1/2 |w|^2: w is off by 0.3 % at most; over the objective it would say
# little at small costs, where the objective is nearly all loss
NEWTONS, GRADIENTS = 60, 400  # at most so many steps, and conjugate gradients in each
DIRECT = 0.8  # share of the rows inside the margin below which a system may be factored
PRODUCTS = 8  # conjugate gradients that a system takes, per square root of its largest e: if more work, it is factored
BATCH = 0.1  # costs up to this are solved at once, larger ones each from where the last ended


@njit(nogil=True, cache=True)
def _times(p_LN, A, At):
    """p K, where A is K, or the rows (x, 1) and At their transpose: whichever takes fewer products."""
    return np.dot(p_LN, A) if At.shape[0] == 0 else np.dot(np.dot(p_LN, A), At)


@njit(nogil=True, fastmath=True, cache=True)
def newton(A, At, y_FN, e_FN, b_FN, f_FN, tolerance, newtons, gradients):
    """Move b_FN and f_FN = b K to the optimum; each fit's duality gap over 1/2 |w|^2.  y: -1 or 1, e: 2 C_i."""
    F, N = y_FN.shape
    gap_F = np.zeros(F)
    live = np.arange(F)
    for _ in range(newtons):
        g_LN = np.empty((len(live), N), y_FN.dtype)
        for i, c in enumerate(live):
            y, e, b, f = y_FN[c], e_FN[c], b_FN[c], f_FN[c]
            for j in range(N):
                g_LN[i, j] = b[j] - e[j] * y[j] * max(0.0, 1 - y[j] * f[j])
        kg_LN = _times(g_LN, A, At)
        kept, target = np.zeros(len(live), np.bool_), np.zeros(len(live))
        for i, c in enumerate(live):
            gap, norm, objective = _gap(y_FN[c], e_FN[c], b_FN[c], f_FN[c], g_LN[i], kg_LN[i])
            gap_F[c] = gap / max(norm, 1e-30)  # 0 where every row is left out
            kept[i] = gap > tolerance * norm
            target[i] = max(0.3 * tolerance * norm, 0.02 * min(gap, 0.1 * objective))
        if not kept.any():
            break
        live, target, g_LN, kg_LN = live[kept], target[kept], g_LN[kept], kg_LN[kept]
        end_LN, fend_LN = _start(A, At, y_FN, e_FN, b_FN, f_FN, live)
        done = _direct(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, live)
        _conjugate_gradients(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, live, done, target, gradients)
        for i, c in enumerate(live):
            d, fd = end_LN[i] - b_FN[c], fend_LN[i] - f_FN[c]
            t = _line_search(y_FN[c], e_FN[c], b_FN[c], f_FN[c], d, fd)
            if t == 0:  # the system was solved too loosely: the gradient always descends
                d, fd = -g_LN[i], -kg_LN[i]
                t = _line_search(y_FN[c], e_FN[c], b_FN[c], f_FN[c], d, fd)
            for j in range(N):
                b_FN[c, j] += t * d[j]
                f_FN[c, j] += t * fd[j]
    return gap_F


@njit(nogil=True, fastmath=True, cache=True)
def _gap(y, e, b, f, g, kg):
    """The duality gap, 1/2 |w|^2 and the objective."""
    gap, norm, loss = 0.0, 0.0, 0.0
    for j in range(len(y)):
        u = max(0.0, 1 - y[j] * f[j])
        gap += 0.5 * g[j] * kg[j]
        norm += 0.5 * b[j] * f[j]
        loss += 0.5 * e[j] * u * u
    return gap, norm, norm + loss


@njit(nogil=True, fastmath=True, cache=True)
def _start(A, At, y_FN, e_FN, b_FN, f_FN, live):
    """The coefficients of the rows inside the margin alone, and their f."""
    L, N = len(live), y_FN.shape[1]
    out_LN, moved = np.zeros((L, N), y_FN.dtype), np.zeros(L, np.bool_)
    end_LN, fend_LN = b_FN[live], f_FN[live]
    for i, c in enumerate(live):
        for j in range(N):
            if end_LN[i, j] != 0 and not 1 - y_FN[c, j] * f_FN[c, j] > 0:
                out_LN[i, j], end_LN[i, j], moved[i] = end_LN[i, j], 0, True
    rows = np.nonzero(moved)[0]
    if len(rows):
        change = _times(out_LN[rows], A, At)
        for i, row in enumerate(rows):
            for j in range(N):
                fend_LN[row, j] -= change[i, j]
    return end_LN, fend_LN


@njit(nogil=True, fastmath=True, cache=True)
def _direct(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, live):
    """Solve by Cholesky's factors where few rows are inside the margin, and 1 / e keeps them well conditioned; which
    fits it did.  At large costs conjugate gradients would need more operations."""
    L, N = end_LN.shape
    done, step_LN = np.zeros(L, np.bool_), np.zeros((L, N), y_FN.dtype)
    for i, c in enumerate(live if At.shape[0] == 0 else live[:0]):
        y, e = y_FN[c], e_FN[c]
        inside = np.nonzero((e > 0) & (1 - y * f_FN[c] > 0))[0]
        n = len(inside)
        if n == 0 or n > DIRECT * (e > 0).sum() or n**3 > 6 * PRODUCTS * np.sqrt(e.max()) * N**2 or e.max() > 500:
            continue
        system = np.empty((n, n), y_FN.dtype)
        x = y[inside] - fend_LN[i][inside] - end_LN[i][inside] / e[inside]  # what is left: rounding, where no row moved
        for j in range(n):
            row = A[inside[j]]
            for k in range(n):
                system[j, k] = row[inside[k]]
            system[j, j] += 1 / e[inside[j]]
        U = np.ascontiguousarray(np.linalg.cholesky(system).T)
        for j in range(n):
            x[j] /= U[j, j]
            x[j + 1 :] -= x[j] * U[j, j + 1 :]
        for j in range(n - 1, -1, -1):
            x[j] = (x[j] - (U[j, j + 1 :] * x[j + 1 :]).sum()) / U[j, j]
        step_LN[i][inside] = x
        done[i] = True
    rows = np.nonzero(done)[0]
    if len(rows):
        change = _times(step_LN[rows], A, At)
        for k, i in enumerate(rows):
            end_LN[i] += step_LN[i]
            fend_LN[i] += change[k]
    return done


@njit(nogil=True, fastmath=True, cache=True)
def _conjugate_gradients(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, live, done, target, gradients):
    """Solve (K + 1 / e) b = y on the rows inside the margin, preconditioned by e; a fit stops when the duality gap that
    its solution would have, were the rows to stay, is below its target."""
    L, N = end_LN.shape
    r_LN, p_LN = np.zeros((L, N), y_FN.dtype), np.zeros((L, N), y_FN.dtype)
    rz, ratio, before = np.zeros(L), np.zeros(L), np.zeros(L)
    for i, c in enumerate(live):
        for j in range(N):
            if e_FN[c, j] > 0 and 1 - y_FN[c, j] * f_FN[c, j] > 0:
                r_LN[i, j] = y_FN[c, j] - fend_LN[i, j] - end_LN[i, j] / e_FN[c, j]
                p_LN[i, j] = r_LN[i, j] * e_FN[c, j]
                rz[i] += r_LN[i, j] * p_LN[i, j]
    open_ = np.nonzero((rz > 0) & ~done)[0]
    for _ in range(gradients):
        if not len(open_):
            return
        q_LN = _times(p_LN[open_], A, At)
        going = np.zeros(len(open_), np.bool_)
        for k, i in enumerate(open_):
            e, p, r, q = e_FN[live[i]], p_LN[i], r_LN[i], q_LN[k]
            pap = 0.0
            for j in range(N):
                if p[j] != 0:
                    pap += p[j] * (q[j] + p[j] / e[j])
            if not pap > 0:  # rounding is all that is left
                continue
            gap = 0.5 * (pap + ratio[i] ** 2 * before[i] - rz[i])  # 1/2 z K z: z = p - ratio * the last p, conjugate
            step, new = y_FN.dtype.type(rz[i] / pap), 0.0
            for j in range(N):
                fend_LN[i, j] += step * q[j]
                if p[j] != 0:
                    end_LN[i, j] += step * p[j]
                    r[j] -= step * (q[j] + p[j] / e[j])
                    new += r[j] * r[j] * e[j]
            ratio[i], before[i], rz[i] = new / rz[i], pap, new
            going[k] = gap > target[i] and new > 0
            for j in range(N):
                if p[j] != 0:
                    p[j] = r[j] * e[j] + y_FN.dtype.type(ratio[i]) * p[j]
        open_ = open_[going]


@njit(nogil=True, fastmath=True, cache=True)
def _line_search(y, e, b, f, d, fd):
    """The step in [0, 1] with the smallest objective: its derivative is piecewise linear and rises."""
    linear, square = 0.0, 0.0
    for j in range(len(y)):
        linear += b[j] * fd[j]
        square += d[j] * fd[j]
    low, high, t = 0.0, 1.0, 1.0
    for _ in range(40):
        slope, curve = linear + t * square, square
        for j in range(len(y)):
            u = 1 - y[j] * (f[j] + t * fd[j])
            if u > 0:
                slope -= e[j] * u * y[j] * fd[j]
                curve += e[j] * fd[j] * fd[j]
        if slope <= 0:
            if t == 1:
                return b.dtype.type(1)
            low = t
        else:
            high = t
        t_new = t - slope / curve if curve > 0 else low
        if not low < t_new < high:
            t_new = 0.5 * (low + high)
        if abs(t_new - t) < 1e-4 * t:
            return b.dtype.type(t_new)
        t = t_new
    return b.dtype.type(low)


class Rows:
    """Training rows x (N, D), float32, with a one for the bias, and their products with the others, once."""

    def __init__(self, x_ND: np.ndarray) -> None:
        self.x_NE = np.concatenate([x_ND, np.ones((len(x_ND), 1), x_ND.dtype)], 1).astype(np.float32, copy=False)
        if len(x_ND) <= 2 * self.x_NE.shape[1]:
            self.operator = self.x_NE @ self.x_NE.T, np.zeros((0, 0), np.float32)
        else:  # many rows of few dimensions: large coefficients nearly cancel at large costs
            wide = self.x_NE.astype(np.float64)
            self.operator = wide, np.ascontiguousarray(wide.T)

    def path(
        self, y_FN: np.ndarray, weight_FN: np.ndarray, costs: Iterable[float], tolerance: float = TOLERANCE
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """(cost, b (F, N), f (F, N)) by rising cost, each from where the last ended.  `weight`: of the row's class, 0
        for rows left out, whose f is that of the fit on the others."""
        b_FN, f_FN = np.zeros(np.shape(y_FN)), np.zeros(np.shape(y_FN))
        for cost in sorted(costs):
            b_FN, f_FN = fit(*self.operator, y_FN, 2 * cost * weight_FN, b_FN, f_FN, tolerance)
            yield cost, b_FN, f_FN

    def fit(self, y_FN: np.ndarray, e_FN: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
        """(F, D + 1): weights and bias of fits with costs of their own; e is 2 C_i."""
        return solve(*self.operator, y_FN, e_FN, tolerance) @ self.x_NE


def solve(
    A: np.ndarray, At: np.ndarray, y_FN: np.ndarray, e_FN: np.ndarray, tolerance: float = TOLERANCE
) -> np.ndarray:
    """b (F, N) from nothing, all fits at once."""
    return fit(A, At, y_FN, e_FN, np.zeros(y_FN.shape), np.zeros(y_FN.shape), tolerance)[0]


def solve_few(
    K: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray, costs: tuple[float, ...], tolerance: float = TOLERANCE
) -> np.ndarray:
    """b (costs, N) of one small problem, its costs rising."""
    none, out = np.zeros((0, 0), K.dtype), []
    y_AN, e_AN = np.repeat(y_N[None], len(costs), 0), 2 * np.asarray(costs)[:, None] * weight_N
    b_AN, f_AN = (np.zeros((sum(cost <= BATCH for cost in costs), len(K))) for _ in range(2))
    if len(b_AN):
        b_AN, f_AN = fit(K, none, y_AN[: len(b_AN)], e_AN[: len(b_AN)], b_AN, f_AN, tolerance)
        out.append(b_AN)
    for i in range(len(b_AN), len(costs)):
        start = (b_AN[-1:], f_AN[-1:]) if i else (np.zeros((1, len(K))),) * 2
        b_AN, f_AN = fit(K, none, y_AN[i : i + 1], e_AN[i : i + 1], *start, tolerance)
        out.append(b_AN)
    return np.concatenate(out)


def fit(
    A: np.ndarray,
    At: np.ndarray,
    y_FN: np.ndarray,
    e_FN: np.ndarray,
    b_FN: np.ndarray,
    f_FN: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(b, f) from the given ones; in the precision of A, and where rounding is in the way in fp64."""
    y, e, b, f = (np.array(part, A.dtype, order="C") for part in (y_FN, e_FN, b_FN, f_FN))
    a = np.maximum(y * b, 0)
    down = np.divide(a * a, e, out=np.zeros_like(a), where=e > 0).sum(1) + (b * f).sum(1)
    scale = np.where(down > 0, a.sum(1) / np.where(down > 0, down, 1), 1)[:, None].astype(A.dtype)
    b *= scale  # by what maximises the dual at these costs
    f *= scale
    gaps = newton(A, At, y, e, b, f, tolerance, NEWTONS, GRADIENTS)
    if A.dtype == np.float32 and not (gaps <= 10 * tolerance).all():
        wide = A.astype(np.float64), At.astype(np.float64)
        return fit(*wide, y_FN, e_FN, np.zeros(b.shape), np.zeros(b.shape), tolerance)
    check(gaps, tolerance)
    return b, f


def check(gaps: np.ndarray, tolerance: float) -> None:
    if not (gaps <= 100 * tolerance).all():
        raise ValueError(
            f"a fit stopped at a duality gap of {np.max(gaps):.1e} of its size, {tolerance:.0e} was "
            "asked for: are the costs extreme? --solver sklearn accepts what it reaches"
        )


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def each(work: Callable, items: Iterable) -> Iterator:
    """work(item) of all items in order, on as many threads as there are cores, BLAS on one."""
    with threadpool_limits(1), ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(work, items)
