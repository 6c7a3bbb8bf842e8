"""Compare our solver with scikit-learn's for VOC07's linear SVMs, full and low-shot, in one run:  python bench/svm.py

Features are synthetic, with the sizes of VOC07: 5,011 + 4,952 rows of 8,192 dimensions, rectified, correlated, of unit
norm, and 20 classes with its frequencies.  Our solver runs the whole protocol, low-shot with the held-out selection,
which also scores the training images.  scikit-learn does single fits (joblib, the same cores) and scores the test set,
for random classes, each cost and number of shots in turn, until --budget seconds have passed.  Its time for the
protocol is extrapolated: the sum over all fits of the mean time at their cost.  Our solver repeats those fits; the mean
difference of average precision is the difference of mAP.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from common import append, environment, parser_with_dry

from fastssl.eval import svm
from fastssl.eval.svm import cpu, solvers
from fastssl.eval.svm.solvers import average_precision

VOC07 = (240, 255, 333, 188, 262, 197, 761, 344, 572, 146, 263, 430, 294, 249, 2095, 273, 97, 372, 263, 279)


def features(rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32 unit rows (N, D) with correlated entries of at least 0, and labels (N, 20) of 1 and 0."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((rows, len(VOC07))) < np.array(VOC07) / 5011).astype(np.float32)
    concepts, shared = rng.standard_normal((len(VOC07), dim)), rng.standard_normal((256, dim))
    shared *= (np.arange(1, 257) ** -0.5)[:, None]
    strength = labels * rng.gamma(1.0, 0.7, labels.shape)  # objects differ in size and visibility
    x = (strength @ concepts + rng.standard_normal((rows, 256)) @ shared).astype(np.float32)
    x += 1.5 * rng.standard_normal((rows, dim), dtype=np.float32) - 0.5
    np.maximum(x, 0, out=x)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def main() -> None:
    parser = parser_with_dry(__doc__)
    parser.add_argument("--train", type=int, default=5011)
    parser.add_argument("--test", type=int, default=4952)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--budget", type=float, default=240, help="seconds for scikit-learn, half for each protocol")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    env = environment("numpy", "numba", "scikit-learn")
    x, labels = features(args.train + args.test, args.dim)
    parts = slice(None, args.train), slice(args.train, None)
    data = [torch.from_numpy(array[part]) for part in parts for array in (x, labels)]
    solver: svm.SolverName = "cuda" if args.device == "cuda" else "fast"
    small = [part[:200, :64] if part.shape[1] > 20 else part[:200] for part in data]
    svm.low_shot(*small, draws=svm.Draws((1,), 1), solver=solver)  # compiles
    result = {
        "train": args.train,
        "test": args.test,
        "dim": args.dim,
        "threads": cpu.threads(),
        "solver": solver,
        "joblib_jobs": cpu.threads(),
    }
    for name, call, sample in (("full", svm.svm, full_sample), ("low_shot", svm.low_shot, low_shot_sample)):
        start = time.perf_counter()
        ours = call(*data, solver=solver)
        seconds = time.perf_counter() - start
        print(f"{name}: ours {seconds:.1f} s", *ours["results"], sep="\n  ", flush=True)
        theirs = sample(data, args.budget / 2, solver)
        times = theirs["extrapolated_s"] / seconds
        result[name] = {
            "ours_s": round(seconds, 1),
            "sklearn": theirs,
            "times_faster": round(times, 1),
            "map": round(ours["results"][-1]["map"], 2),
        }
        print(
            f"{name}: scikit-learn {theirs['extrapolated_s']:.0f} s extrapolated from {theirs['fits']} of "
            f"{theirs['of']} fits: {times:.1f} times as long; mAP differs by {theirs['map_difference']:.3f} points, "
            f"an AP by up to {theirs['largest_ap_difference']:.3f}",
            flush=True,
        )
    if not args.dry:
        print(f"appended to {append('svm', env, **result)}")


def full_sample(data: list[torch.Tensor], budget: float, solver: svm.SolverName) -> dict:
    """scikit-learn on two of three folds; the 20 final fits, on all rows, are counted with the same time."""
    rows, classes = data[1].shape
    rng = np.random.default_rng(1)

    def problem(_: int) -> tuple[int, np.ndarray]:
        return int(rng.integers(classes)), np.flatnonzero(rng.random(rows) < 2 / 3)

    result = compare(data, budget, solver, {"full": problem}, 3 * classes)
    per_fold = result["of"] / (3 * classes)  # fits of a class on a fold
    return {
        **result,
        "extrapolated_s": round(result["extrapolated_s"] * (1 + 1 / (3 * per_fold)), 1),
        "of": result["of"] + classes,
    }


def low_shot_sample(data: list[torch.Tensor], budget: float, solver: svm.SolverName) -> dict:
    labels, classes = data[1].numpy(), data[1].shape[1]
    rng = np.random.default_rng(2)

    def problem(k: int) -> tuple[int, np.ndarray]:
        c = int(rng.integers(classes))
        return c, svm.draw(labels[:, c], k, classes, rng)

    return compare(data, budget, solver, dict.fromkeys(svm.SHOTS, problem), 5 * classes)


def compare(data: list[torch.Tensor], budget: float, solver: svm.SolverName, kinds: dict, count: int) -> dict:
    """scikit-learn on `threads` problems of each kind and cost at a time; `count`: their number in the protocol."""
    x, labels, x_test, y_test = (part.numpy() for part in data)
    threads = cpu.threads()
    theirs, fast = solvers.Sklearn(x, x_test), svm.SOLVERS[solver](x, x_test)
    seconds: dict[tuple[Any, float], list[float]] = {(kind, cost): [] for kind in kinds for cost in svm.COSTS}
    differences, order, timed = [], np.random.default_rng(3), 0.0
    while timed < budget:
        for i in order.permutation(len(seconds)):
            kind, cost = list(seconds)[i]
            if timed > budget and seconds[kind, cost]:
                continue  # every cost is measured at least once
            drawn = [kinds[kind](kind) for _ in range(threads)]
            work = [(rows, labels[rows, c] > 0) for c, rows in drawn]
            start = time.perf_counter()
            scores = list(solvers.parallel(fit_and_score, [(theirs.x, theirs.x_test, *part, cost) for part in work]))
            seconds[kind, cost].append((time.perf_counter() - start) / threads)
            timed += time.perf_counter() - start
            for (c, _), score, (ours, _) in zip(drawn, scores, fast.few(work, (cost,))):
                a, b = average_precision(np.stack([score, ours[0]]), np.stack([y_test[:, c]] * 2))
                differences.append(100 * (b - a))
    mean = {key: float(np.mean(values)) for key, values in seconds.items()}
    return {
        "extrapolated_s": round(count * sum(mean.values()), 1),
        "fits": len(differences),
        "of": count * len(seconds),
        "map_difference": round(float(np.mean(differences)), 4),
        "largest_ap_difference": round(float(np.abs(differences).max()), 3),
        "ms_per_fit": {
            f"{kind} at {cost:.2g}": round(1e3 * value, 1)
            for (kind, cost), value in mean.items()
            if kind in ("full", 1, 96) and cost in (svm.COSTS[0], 1.0, 100.0)
        },
    }


def fit_and_score(x: np.ndarray, x_test: np.ndarray, rows: np.ndarray, positive: np.ndarray, cost: float) -> np.ndarray:
    return solvers.fit(x[rows], positive, cost).decision_function(x_test)


if __name__ == "__main__":
    main()
