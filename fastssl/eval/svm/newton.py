"""Linear SVMs on products of rows, many at once: scikit-learn's LinearSVC (squared hinge, penalised bias).

min over w: 1/2 |w|^2 + sum_i C_i max(0, 1 - y_i f_i)^2, f = K b, w = sum_i b_i (x_i, 1), K = x x^T + 1.  C_i = 0 leaves
row i out, so that classes, costs and folds share K.  Newton's method on the rows inside the margin (Chapelle 2007,
https://doi.org/10.1162/neco.2007.19.5.1155) with conjugate gradients, whose products K p of all fits are one matrix
product.  A fit ends when its duality gap is small, which for the dual point a_i = 2 C_i max(0, 1 - y_i f_i) is
1/2 |w - sum_i a_i y_i (x_i, 1)|^2.  Nothing cancels in it, so fp32 is precise enough.  It bounds 1/2 |w - optimum|^2.

Shapes: F fits, N rows, L fits that have not converged; `fits` holds their numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

Array = np.ndarray

# Of the duality gap over 1/2 |w|^2: the error of w is at most 0.3 %.  Relative to the objective a tolerance would mean
# little at small costs, where the objective is nearly all loss.
TOLERANCE = 1e-5
NEWTON_STEPS, CG_STEPS = 60, 400  # at most; conjugate gradient steps in each Newton step
DIRECT = 0.8  # a system may be factored if a smaller fraction of the rows is inside the margin
PRODUCTS = 8  # conjugate gradient steps of a system, per square root of its largest e; factored where that is more work


@njit(nogil=True, cache=True)
def _times(p_LN: Array, A: Array, At: Array) -> Array:
    """p K, where A is K, or the rows (x, 1) and At their transpose: whichever takes fewer products."""
    return np.dot(p_LN, A) if At.shape[0] == 0 else np.dot(np.dot(p_LN, A), At)


@njit(nogil=True, fastmath=True, cache=True)
def newton(
    A: Array,
    At: Array,
    y_FN: Array,
    e_FN: Array,
    b_FN: Array,
    f_FN: Array,
    tolerance: float,
    newton_steps: int,
    cg_steps: int,
) -> Array:
    """Move b_FN and f_FN = b K to the optimum; returns each fit's duality gap over 1/2 |w|^2.  y: -1 or 1, e: 2 C_i."""
    F, N = y_FN.shape
    gap_F = np.zeros(F)
    fits = np.arange(F)
    for _ in range(newton_steps):
        g_LN = np.empty((len(fits), N), y_FN.dtype)
        for i, c in enumerate(fits):
            y, e, b, f = y_FN[c], e_FN[c], b_FN[c], f_FN[c]
            for j in range(N):
                g_LN[i, j] = b[j] - e[j] * y[j] * max(0.0, 1 - y[j] * f[j])
        kg_LN = _times(g_LN, A, At)
        active, target = np.zeros(len(fits), np.bool_), np.zeros(len(fits))
        for i, c in enumerate(fits):
            gap, norm, objective = _gap(y_FN[c], e_FN[c], b_FN[c], f_FN[c], g_LN[i], kg_LN[i])
            gap_F[c] = gap / max(norm, 1e-30)  # 0 where every row is left out
            active[i] = gap > tolerance * norm
            target[i] = max(0.3 * tolerance * norm, 0.02 * min(gap, 0.1 * objective))
        if not active.any():
            break
        fits, target, g_LN, kg_LN = fits[active], target[active], g_LN[active], kg_LN[active]
        end_LN, fend_LN = _start(A, At, y_FN, e_FN, b_FN, f_FN, fits)
        done = _direct(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, fits)
        _conjugate_gradients(A, At, y_FN, e_FN, f_FN, end_LN, fend_LN, fits, done, target, cg_steps)
        for i, c in enumerate(fits):
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
def _gap(y: Array, e: Array, b: Array, f: Array, g: Array, kg: Array) -> tuple[float, float, float]:
    """The duality gap, 1/2 |w|^2 and the objective."""
    gap, norm, loss = 0.0, 0.0, 0.0
    for j in range(len(y)):
        u = max(0.0, 1 - y[j] * f[j])
        gap += 0.5 * g[j] * kg[j]
        norm += 0.5 * b[j] * f[j]
        loss += 0.5 * e[j] * u * u
    return gap, norm, norm + loss


@njit(nogil=True, fastmath=True, cache=True)
def _start(A: Array, At: Array, y_FN: Array, e_FN: Array, b_FN: Array, f_FN: Array, fits: Array) -> tuple[Array, Array]:
    """The coefficients of the rows inside the margin alone, and their f."""
    L, N = len(fits), y_FN.shape[1]
    out_LN, moved = np.zeros((L, N), y_FN.dtype), np.zeros(L, np.bool_)
    end_LN, fend_LN = b_FN[fits], f_FN[fits]
    for i, c in enumerate(fits):
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
def _direct(
    A: Array, At: Array, y_FN: Array, e_FN: Array, f_FN: Array, end_LN: Array, fend_LN: Array, fits: Array
) -> Array:
    """Solve by Cholesky's factors where few rows are inside the margin, and 1 / e keeps them well conditioned; which
    fits it did.  At large costs conjugate gradients would need more operations."""
    L, N = end_LN.shape
    done, step_LN = np.zeros(L, np.bool_), np.zeros((L, N), y_FN.dtype)
    for i, c in enumerate(fits if At.shape[0] == 0 else fits[:0]):
        y, e = y_FN[c], e_FN[c]
        inside = np.nonzero((e > 0) & (1 - y * f_FN[c] > 0))[0]
        n = len(inside)
        if n == 0 or n > DIRECT * (e > 0).sum() or n**3 > 6 * PRODUCTS * np.sqrt(e.max()) * N**2 or e.max() > 500:
            continue
        system = np.empty((n, n), y_FN.dtype)
        x = y[inside] - fend_LN[i][inside] - end_LN[i][inside] / e[inside]  # the residual
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
def _conjugate_gradients(
    A: Array,
    At: Array,
    y_FN: Array,
    e_FN: Array,
    f_FN: Array,
    end_LN: Array,
    fend_LN: Array,
    fits: Array,
    done: Array,
    target: Array,
    cg_steps: int,
) -> None:
    """Solve (K + 1 / e) b = y on the rows inside the margin, preconditioned by e; a fit stops when the duality gap that
    its solution would have, were the rows to stay, is below its target."""
    L, N = end_LN.shape
    r_LN, p_LN = np.zeros((L, N), y_FN.dtype), np.zeros((L, N), y_FN.dtype)
    rz, ratio, before = np.zeros(L), np.zeros(L), np.zeros(L)
    for i, c in enumerate(fits):
        for j in range(N):
            if e_FN[c, j] > 0 and 1 - y_FN[c, j] * f_FN[c, j] > 0:
                r_LN[i, j] = y_FN[c, j] - fend_LN[i, j] - end_LN[i, j] / e_FN[c, j]
                p_LN[i, j] = r_LN[i, j] * e_FN[c, j]
                rz[i] += r_LN[i, j] * p_LN[i, j]
    open_ = np.nonzero((rz > 0) & ~done)[0]
    for _ in range(cg_steps):
        if not len(open_):
            return
        q_LN = _times(p_LN[open_], A, At)
        going = np.zeros(len(open_), np.bool_)
        for k, i in enumerate(open_):
            e, p, r, q = e_FN[fits[i]], p_LN[i], r_LN[i], q_LN[k]
            pap = 0.0
            for j in range(N):
                if p[j] != 0:
                    pap += p[j] * (q[j] + p[j] / e[j])
            if not pap > 0:  # only rounding errors are left
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
def _line_search(y: Array, e: Array, b: Array, f: Array, d: Array, fd: Array) -> float:
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
