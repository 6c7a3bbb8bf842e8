"""Fits of linear SVMs on the CPU by newton.py, from features or from their products."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from fastssl.eval.svm.newton import CG_STEPS, NEWTON_STEPS, TOLERANCE, newton

TOGETHER = 0.1  # costs up to this are solved at once, larger ones each from where the last ended


class Rows:
    """Training rows x (N, D), float32, with a one for the bias, and the products of all rows, computed once."""

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
        """(F, D + 1): weights and bias of fits that each have their costs; e is 2 C_i."""
        return solve(*self.operator, y_FN, e_FN, tolerance) @ self.x_NE


def solve(
    A: np.ndarray, At: np.ndarray, y_FN: np.ndarray, e_FN: np.ndarray, tolerance: float = TOLERANCE
) -> np.ndarray:
    """b (F, N), starting at 0, all fits at once."""
    return fit(A, At, y_FN, e_FN, np.zeros(y_FN.shape), np.zeros(y_FN.shape), tolerance)[0]


def solve_few(
    K: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray, costs: tuple[float, ...], tolerance: float = TOLERANCE
) -> np.ndarray:
    """b (costs, N) of one small problem, by rising cost."""
    none, out = np.zeros((0, 0), K.dtype), []
    y_AN, e_AN = np.repeat(y_N[None], len(costs), 0), 2 * np.asarray(costs)[:, None] * weight_N
    b_AN, f_AN = (np.zeros((sum(cost <= TOGETHER for cost in costs), len(K))) for _ in range(2))
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
    """(b, f), starting at the given ones, in the precision of A; in fp64 where that does not converge for rounding."""
    y, e, b, f = (np.array(part, A.dtype, order="C") for part in (y_FN, e_FN, b_FN, f_FN))
    a = np.maximum(y * b, 0)
    down = np.divide(a * a, e, out=np.zeros_like(a), where=e > 0).sum(1) + (b * f).sum(1)
    scale = np.where(down > 0, a.sum(1) / np.where(down > 0, down, 1), 1)[:, None].astype(A.dtype)
    b *= scale  # by the factor that maximises the dual at these costs
    f *= scale
    gaps = newton(A, At, y, e, b, f, tolerance, NEWTON_STEPS, CG_STEPS)
    if A.dtype == np.float32 and not (gaps <= 10 * tolerance).all():
        wide = A.astype(np.float64), At.astype(np.float64)
        return fit(*wide, y_FN, e_FN, np.zeros(b.shape), np.zeros(b.shape), tolerance)
    check(gaps, tolerance)
    return b, f


def check(gaps: np.ndarray, tolerance: float) -> None:
    if not (gaps <= 100 * tolerance).all():
        raise ValueError(
            f"a fit stopped at a duality gap of {np.max(gaps):.1e} of its size, {tolerance:.0e} is "
            "required: are the costs extreme? --solver sklearn accepts what it reaches"
        )


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def parallel_map(work: Callable, items: Iterable) -> Iterator:
    """work(item) for all items, in order, on as many threads as there are cores; BLAS on one."""
    with threadpool_limits(1), ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(work, items)
