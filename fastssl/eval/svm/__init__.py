"""VOC07 classification by linear SVMs on frozen features, as in OpenSelfSup's benchmarks/svm_tools (whose source is
https://arxiv.org/abs/1905.01235, section 3.2): one against all, the cost of each class chosen by cross-validation.

Labels are 1 present, 0 absent, -1 difficult: difficult images are negatives in training and left out of the test, as
published.  With one label an image, each class is trained against all others.  With --low-shot few images are drawn for
each class and nothing is cross-validated: the published cost is the best on the test set ("selected_on=test"), the
other row's is the best on the training images that were not drawn ("held-out").
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from fastssl import dist
from fastssl.eval.common.features import check_finite
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.options import SVM_COSTS
from fastssl.eval.svm.cuda import Cuda
from fastssl.eval.svm.solvers import POSITIVE_WEIGHT, Fast, Sklearn, Solver, average_precision

NEEDS = ("train", "test")
COSTS = SVM_COSTS
SolverName = Literal["fast", "cuda", "sklearn"]
SOLVERS: dict[SolverName, type[Solver]] = {"fast": Fast, "cuda": Cuda, "sklearn": Sklearn}
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    names = ("folds",) if args.low_shot else ("shots", "samples")
    unused = [name for name in names if getattr(args, name) is not None]
    if unused:
        raise ValueError(f"--{unused[0]} is for the protocol {'without' if args.low_shot else 'with'} --low-shot")
    if args.crop == "squash":
        if args.resize is not None:
            raise ValueError(f"--resize {args.resize} is for --crop center: squash shows the whole image at --size")
        target = dataclasses.replace(target, view=dataclasses.replace(target.view, crop="squash", resize=None))
    *train, labels = target.features(target.train, args.layers)
    *test, test_labels = target.features(target.test, args.layers)
    result = dist.on_main(_layers, dict(zip(args.layers, zip(train, test))), labels, test_labels, args)
    result["options"] |= {"crop": args.crop, "layers": list(args.layers)}
    return result


def _layers(
    features: dict[str, tuple[Tensor, Tensor]], labels: Tensor, test_labels: Tensor, args: argparse.Namespace
) -> dict:
    options: dict[str, Any] = {"costs": args.costs, "solver": args.solver}
    given = {key: getattr(args, key) for key in ("shots", "samples", "folds") if getattr(args, key) is not None}
    call: Callable[..., dict] = low_shot if args.low_shot else svm
    options |= {"draws": Draws(seed=args.seed, **given)} if args.low_shot else given
    results = {name: call(train, labels, test, test_labels, **options) for name, (train, test) in features.items()}
    rows = [{"layer": name, **row} for name, result in results.items() for row in result["results"]]
    if len(results) > 1 and not args.low_shot:  # the published number is that of the best layer
        for chosen, key in (("test", "map"), ("held-out", "cv_map")):
            rows.append({"selected_on": chosen, **max(rows[: len(results)], key=lambda row: row[key])})
    return {
        **next(iter(results.values())),
        "results": rows,
        "classes": {name: result["classes"] for name, result in results.items()},
    }


def svm(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    costs: tuple[float, ...] = COSTS,
    folds: int = 3,
    solver: SolverName = "fast",
) -> dict:
    """mAP in percent.  Features (N, D), (M, D); labels (N,), (M,) or (N, C), (M, C) of 1, 0, -1."""
    x, y, x_test, y_test, costs = _checked(train, labels, test, test_labels, costs, solver)
    if folds < 2:
        raise ValueError(f"folds={folds}: cross-validation needs 2 or more")
    positive_NC = y > 0
    few = min(int(positive_NC.sum(0).min()), int((~positive_NC).sum(0).min()))
    if few < folds:
        worst = int(np.minimum(positive_NC.sum(0), (~positive_NC).sum(0)).argmin())
        raise ValueError(f"class {worst} has {few} positive or negative training images: {folds} folds need as many")
    held_out_CFN = np.zeros((y.shape[1], folds, len(x)), bool)
    for c in range(y.shape[1]):  # the folds of sklearn's cross_val_score
        for k, (_, rows) in enumerate(StratifiedKFold(folds).split(x, positive_NC[:, c])):
            held_out_CFN[c, k, rows] = True
    fits = SOLVERS[solver](x, x_test)
    cv_AC = fits.cross_validate(positive_NC, held_out_CFN, costs)
    best_C = cv_AC.argmax(0)  # the smallest of equals
    scores_CM = fits.refit(positive_NC, np.asarray(costs)[best_C])
    ap_C = 100 * average_precision(scores_CM, y_test.T)
    cv_C = 100 * cv_AC.max(0)
    row = {"map": float(ap_C.mean()), "cv_map": float(cv_C.mean())}
    classes = [
        {"class": c, "ap": float(ap), "cv_ap": float(cv), "cost": costs[i]}
        for c, (ap, cv, i) in enumerate(zip(ap_C, cv_C, best_C))
    ]
    options = {"folds": folds, **_options(costs, solver, x, x_test)}
    return {"protocol": "svm", "options": options, "results": [row], "classes": classes}


@dataclasses.dataclass(frozen=True)
class Draws:
    """Which images `low_shot` trains on."""

    shots: tuple[int, ...] = SHOTS  # positives a class
    samples: int = 5  # independent draws of each number of shots
    seed: int = 0


def low_shot(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    draws: Draws = Draws(),
    costs: tuple[float, ...] = COSTS,
    solver: SolverName = "fast",
) -> dict:
    """mAP in percent for each number of shots: mean, standard deviation, minimum and maximum of the samples at the cost
    whose mean is best on the test set (published), and on the training images not drawn."""
    x, y, x_test, y_test, costs = _checked(train, labels, test, test_labels, costs, solver)
    shots, samples, classes = tuple(sorted(set(draws.shots))), draws.samples, y.shape[1]
    if not shots or shots[0] < 1 or samples < 1:
        raise ValueError(f"shots={shots}, samples={samples}: give positive numbers")
    short = next((c for c in range(classes) if not (y[:, c] > 0).any() or not (y[:, c] == 0).any()), None)
    if short is not None:
        raise ValueError(f"class {short} has no positive or no negative training image to draw")
    problems = [(k, s, c) for k in shots for s in range(samples) for c in range(classes)]
    drawn = [draw(y[:, c], k, classes, np.random.default_rng((draws.seed, k, s, c))) for k, s, c in problems]
    fits = SOLVERS[solver](x, x_test)
    ap_test = np.zeros((len(shots), samples, classes, len(costs)))
    ap_held_out = np.full_like(ap_test, np.nan)
    scored = fits.few([(rows, y[rows, c] > 0) for rows, (_, _, c) in zip(drawn, problems)], costs)
    for (k, s, c), rows, (on_test, on_train) in zip(problems, drawn, scored):
        rest = y[:, c].copy()
        rest[rows] = -1
        at = shots.index(k), s, c
        ap_test[at] = 100 * average_precision(on_test, np.broadcast_to(y_test[:, c], on_test.shape))
        if (rest > 0).any():  # else all images of the class are drawn
            ap_held_out[at] = 100 * average_precision(on_train, np.broadcast_to(rest, on_train.shape))
    results = [row for i, k in enumerate(shots) for row in _choose(k, ap_test[i], ap_held_out[i], costs)]
    options = {
        "shots": list(shots),
        "samples": samples,
        **_options(costs, solver, x, x_test),
        "seed": draws.seed,
        "fits": len(problems) * len(costs),
    }
    return {"protocol": "svm", "options": options, "results": results, "classes": []}


def draw(labels: np.ndarray, k: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of k positives and (C - 1) k negatives of one class, or as many as there are; never difficult ones."""
    parts = []
    for value, n in ((1, k), (0, (classes - 1) * k)):
        known = np.flatnonzero(labels == value)
        parts.append(rng.choice(known, min(n, len(known)), replace=False))
    return np.sort(np.concatenate(parts))


def _options(costs: tuple[float, ...], solver: SolverName, x: np.ndarray, x_test: np.ndarray) -> dict:
    """Options that the results of both protocols record."""
    return {
        "costs": list(costs),
        "positive_weight": POSITIVE_WEIGHT,
        "solver": solver,
        "train": len(x),
        "test": len(x_test),
        "dim": x.shape[1],
    }


def _choose(k: int, ap_SCA: np.ndarray, held_out_SCA: np.ndarray, costs: tuple[float, ...]) -> list[dict]:
    """Rows for k shots, by the average precision (S samples, C classes, A costs) on the test set and held-out rows."""
    rows = []
    for chosen, table in (("test", ap_SCA), ("held-out", held_out_SCA)):
        known = ~np.isnan(table).any((0, 2))
        if not known.any():
            continue  # all images of every class are drawn: none is left to choose on
        best = int(table[:, known].mean((0, 1)).argmax())
        map_S = ap_SCA[:, :, best].mean(1)
        spread = {f"map_{name}": float(getattr(map_S, name)()) for name in ("std", "min", "max")}
        row = {"shots": k, "selected_on": chosen, "cost": costs[best], "map": float(map_S.mean())}
        rows.append({**row, **spread})
    return rows


def _checked(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, costs: tuple[float, ...], solver: SolverName
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[float, ...]]:
    """Features of unit norm and label tables of both sets, and the costs in ascending order."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    if not costs or not min(costs) > 0 or not np.isfinite(costs).all():
        raise ValueError(f"costs={costs}: give positive numbers")
    classes = labels.shape[1] if labels.ndim == 2 else int(max(labels.max(), test_labels.max())) + 1
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"the training set has {train.shape[1]} dimensions, the test set {test.shape[1]}")
    out = []
    for name, features, given in (("training set", train, labels), ("test set", test, test_labels)):
        table = _table(name, given, classes)
        if len(features) == 0 or len(features) != len(table):
            raise ValueError(f"{name}: {len(features)} features and {len(table)} labels")
        check_finite(name, features)
        x = features.float()
        out += [(x / (x.norm(dim=1, keepdim=True) + 1e-5)).cpu().numpy(), table]
    if empty := [c for c in range(classes) if not (out[3][:, c] > 0).any()]:
        raise ValueError(f"class {empty[0]} has no positive image in the test set: its average precision is undefined")
    return (*out, tuple(sorted(float(cost) for cost in set(costs))))


def _table(name: str, labels: Tensor, classes: int) -> np.ndarray:
    """int8 (N, C) of 1, 0, -1."""
    labels = labels.cpu().numpy()
    if labels.ndim == 1:
        if (labels < 0).any():
            raise ValueError(f"{name}: {int((labels < 0).sum())} of {len(labels)} samples have no label (-1)")
        return (labels[:, None] == np.arange(classes)).astype(np.int8)
    if labels.shape[1] != classes:
        raise ValueError(f"{name}: {labels.shape[1]} classes, the other set has {classes}")
    if not np.isin(labels, (1, 0, -1)).all():
        raise ValueError(f"{name}: labels must be 1 (present), 0 (absent) or -1 (difficult)")
    return labels.astype(np.int8)
