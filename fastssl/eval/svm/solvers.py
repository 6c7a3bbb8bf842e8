"""The solvers of the SVM protocols on the CPU, ours and scikit-learn's LinearSVC, and the average precision.

Shapes: N training rows, M test rows, D dimensions, C classes, F folds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numba import njit

from fastssl.eval.svm import cpu

if TYPE_CHECKING:
    from sklearn.svm import LinearSVC

POSITIVE_WEIGHT = 2.0  # of the cost of positives, as published
Costs = tuple[float, ...]
Problem = tuple[np.ndarray, np.ndarray]  # some training rows (n,), and which of them are positive (n,)
Scores = tuple[np.ndarray, np.ndarray]  # of the test rows (costs, M) and the training rows (costs, N)


class Solver(Protocol):
    """Fits of one class against all others on features x (N, D), float32, scored on x_test (M, D)."""

    def __init__(self, x: np.ndarray, x_test: np.ndarray) -> None: ...

    def cross_validate(self, positive_NC: np.ndarray, held_out_CFN: np.ndarray, costs: Costs) -> np.ndarray:
        """Average precision on the held-out rows (costs, C), the mean over folds."""

    def refit(self, positive_NC: np.ndarray, cost_C: np.ndarray) -> np.ndarray:
        """Scores of the test rows (C, M), after fits on all rows."""

    def few(self, problems: list[Problem], costs: Costs) -> Iterator[Scores]:
        """Scores for each problem, which has few rows."""


def average_precision(scores_RM: np.ndarray, truth_RM: np.ndarray, interpolated: bool = True) -> np.ndarray:
    """(R,): the area under precision over recall, each precision raised to the best at any higher recall (VOC 2010);
    not interpolated: scikit-learn's.  Truth 1, 0, or -1: left out.  Equal scores are one threshold."""
    bits = np.ascontiguousarray(scores_RM, np.float32).view(np.int32).astype(np.int64)
    keys = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) * 2 + (truth_RM > 0)  # rise with the score
    keys[truth_RM < 0] = np.iinfo(np.int64).min
    keys.sort(1)
    return _average_precision(keys, interpolated)


@njit(cache=True)
def _average_precision(keys_RM: np.ndarray, interpolated: bool) -> np.ndarray:
    R, M = keys_RM.shape
    out = np.zeros(R)
    precision, hits = np.zeros(M), np.zeros(M, np.int64)
    for r in range(R):
        keys, n, right = keys_RM[r], 0, 0
        for j in range(M - 1, -1, -1):
            if keys[j] == np.iinfo(np.int64).min:
                break
            right += keys[j] & 1
            if j == 0 or keys[j - 1] >> 1 != keys[j] >> 1:  # the last of equal scores
                precision[n], hits[n] = right / (M - j), right
                n += 1
        best = 0.0
        for j in range(n - 1, -1, -1):
            best = max(best, precision[j]) if interpolated else precision[j]
            out[r] += best * (hits[j] - (hits[j - 1] if j else 0)) / right
    return out


class Fast:
    """All classes, folds and costs share the products of the features; see newton.py."""

    def __init__(self, x: np.ndarray, x_test: np.ndarray) -> None:
        self.rows = cpu.Rows(x)
        self.x_test = np.concatenate([x_test, np.ones((len(x_test), 1), np.float32)], 1)
        self._test: np.ndarray | None = None

    def cross_validate(self, positive_NC: np.ndarray, held_out_CFN: np.ndarray, costs: Costs) -> np.ndarray:
        C, folds, N = held_out_CFN.shape
        y_FN = np.repeat(np.where(positive_NC.T, 1, -1), folds, 0).astype(np.float32)
        held_out_FN = held_out_CFN.reshape(C * folds, N)
        weight_FN = np.where(held_out_FN, 0, np.where(y_FN > 0, POSITIVE_WEIGHT, 1))
        truth_FN = np.where(held_out_FN, y_FN > 0, -1)
        return np.stack(
            [
                average_precision(f_FN, truth_FN, interpolated=False).reshape(C, folds).mean(1)
                for _, _, f_FN in self.rows.path(y_FN, weight_FN, costs)
            ]
        )

    def refit(self, positive_NC: np.ndarray, cost_C: np.ndarray) -> np.ndarray:
        y_CN = np.where(positive_NC.T, 1, -1)
        return self.rows.fit(y_CN, 2 * cost_C[:, None] * np.where(y_CN > 0, POSITIVE_WEIGHT, 1)) @ self.x_test.T

    def few(self, problems: list[Problem], costs: Costs) -> Iterator[Scores]:
        A, At = self.rows.operator
        if not len(At) and self._test is None:
            self._test = self.rows.x_NE @ self.x_test.T
        test = self._test

        def work(problem: Problem) -> Scores:
            rows, positive = problem
            y, weight = np.where(positive, 1, -1), np.where(positive, POSITIVE_WEIGHT, 1)
            own_rows = self.rows.x_NE[rows] if len(At) else A[rows]
            b = cpu.solve_few(own_rows @ own_rows.T if len(At) else own_rows.take(rows, 1), y, weight, costs)
            if test is None:
                w = b @ own_rows
                return w @ self.x_test.T, w @ self.rows.x_NE.T
            return b @ test[rows], b @ own_rows

        return cpu.parallel_map(work, problems)


class Sklearn:
    """LinearSVC, a fit at a time, by joblib on all cores."""

    def __init__(self, x: np.ndarray, x_test: np.ndarray) -> None:
        self.x, self.x_test = x.astype(np.float64), x_test.astype(np.float64)

    def cross_validate(self, positive_NC: np.ndarray, held_out_CFN: np.ndarray, costs: Costs) -> np.ndarray:
        def work(x: np.ndarray, positive: np.ndarray, cost: float, test: np.ndarray) -> float:
            scores = fit(x[~test], positive[~test], cost).decision_function(x[test])
            return average_precision(scores[None], positive[None, test].astype(np.int8), interpolated=False)[0]

        C, folds, _ = held_out_CFN.shape
        jobs = [
            (self.x, positive_NC[:, c], cost, held_out_CFN[c, k])
            for cost in costs
            for c in range(C)
            for k in range(folds)
        ]
        return np.reshape(list(parallel(work, jobs)), (len(costs), C, folds)).mean(2)

    def refit(self, positive_NC: np.ndarray, cost_C: np.ndarray) -> np.ndarray:
        def work(x: np.ndarray, x_test: np.ndarray, positive: np.ndarray, cost: float) -> np.ndarray:
            return fit(x, positive, cost).decision_function(x_test)

        return np.stack(
            list(parallel(work, [(self.x, self.x_test, positive_NC[:, c], cost) for c, cost in enumerate(cost_C)]))
        )

    def few(self, problems: list[Problem], costs: Costs) -> Iterator[Scores]:
        def work(x: np.ndarray, x_test: np.ndarray, rows: np.ndarray, positive: np.ndarray) -> Scores:
            fits = [fit(x[rows], positive, cost) for cost in costs]
            on_test, on_train = (np.stack([f.decision_function(part) for f in fits]) for part in (x_test, x))
            return on_test, on_train

        return parallel(work, [(self.x, self.x_test, *problem) for problem in problems])


def fit(x: np.ndarray, positive: np.ndarray, cost: float) -> LinearSVC:
    """A fit as published."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol has 2000 passes in any case
        return LinearSVC(
            C=cost,
            class_weight={1: POSITIVE_WEIGHT, -1: 1.0},
            intercept_scaling=1.0,
            penalty="l2",
            loss="squared_hinge",
            tol=1e-4,
            dual=True,
            max_iter=2000,
            random_state=0,
        ).fit(x, np.where(positive, 1, -1))


def parallel(work: Callable, jobs: Iterable[tuple]) -> Iterator[Any]:
    from joblib import Parallel, delayed

    return Parallel(cpu.threads(), return_as="generator")(delayed(work)(*job) for job in jobs)
