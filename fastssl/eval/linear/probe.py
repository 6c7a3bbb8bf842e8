"""The linear probe on frozen features: multinomial logistic regression, all learning rates trained at once.

Features are standardised per dimension and divided by sqrt(dim), so that one grid of learning rates serves every
backbone.  The setting is chosen on a tenth of the training set, then refitted on all of it; the test set is used once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastssl import dist
from fastssl.eval.common.features import check_features
from fastssl.eval.common.metrics import accuracy
from fastssl.eval.common.softmax import loss_and_gradient
from fastssl.sampler import permutation

LEARNING_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # solver "sgd"
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # solver "lbfgs": l2 of the weights, loss = mean + l2 / 2 |W|^2
MOMENTUM = 0.9
LOGITS = 1 << 26  # entries of (rows, settings, classes) at a time: 256 MB, a few times over
Solver = Literal["sgd", "lbfgs"]


@dataclass(frozen=True)
class ProbeOptions:
    """`solver` "sgd": momentum 0.9, cosine to zero over `epochs`, no weight decay; `grid` holds learning rates for
    `batch`.  "lbfgs": `grid` holds penalties, `epochs` is the most iterations, `batch` has no effect."""

    solver: Solver = "sgd"
    grid: tuple[float, ...] | None = None  # None: LEARNING_RATES or PENALTIES
    epochs: int = 100
    batch: int = 1024  # of all ranks together
    held_out: float = 0.1  # fraction of the training set on which the setting is chosen
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver={self.solver!r}: known are {' and '.join(get_args(Solver))}")
        if self.grid is not None and (not self.grid or min(self.grid) <= 0):
            raise ValueError(f"grid={self.grid}: give positive values")
        if self.epochs < 1 or self.batch < 1 or not 0 < self.held_out < 1:
            raise ValueError(
                f"epochs={self.epochs}, batch={self.batch} must be positive, held_out={self.held_out} between 0 and 1"
            )


@torch.no_grad()
def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, options: ProbeOptions = ProbeOptions()
) -> dict:
    """Test accuracy in percent.  Features (N, dim), (M, dim); labels (N,), (M,); all ranks hold all rows, and each
    computes its shard of every batch."""
    check_features("training set", train, train_labels)
    check_features("test set", test, test_labels)
    classes, solver = int(train_labels.max()) + 1, options.solver
    if len(train) < 2:
        raise ValueError("the training set has one sample: the setting cannot be chosen on another one")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"the training set has {train.shape[1]} dimensions, the test set {test.shape[1]}")
    if int(test_labels.max()) >= classes:
        raise ValueError(f"class {int(test_labels.max())} of the test set is not in the training set")
    grid = tuple(sorted(options.grid or (LEARNING_RATES if solver == "sgd" else PENALTIES)))
    order = torch.from_numpy(permutation(len(train), options.seed, 0)).to(train.device)
    count = min(max(1, round(options.held_out * len(train))), len(train) - 1)
    held_out, rest = order[:count], order[count:]

    mean, scale = _mean_and_scale(train)
    x = _standardised(train, mean, scale)
    fit = _sgd if solver == "sgd" else _lbfgs
    settings = (classes, options.epochs, options.batch, options.seed)
    w_DGC = fit(x[rest], train_labels[rest], grid, *settings)
    top1 = [accuracy(x[held_out] @ w, train_labels[held_out])["top1"] for w in w_DGC.unbind(1)]
    best = grid[top1.index(max(top1))]  # the smallest of equals
    w_DC = fit(x, train_labels, (best,), *settings)[:, 0]
    setting = "lr" if solver == "sgd" else "l2"
    about = {
        **{key: getattr(options, key) for key in ("solver", "epochs", "held_out", "seed")},
        **({"batch": min(options.batch, len(train))} if solver == "sgd" else {}),
        "train": len(train),
        "test": len(test),
        "dim": train.shape[1],
        "classes": classes,
    }
    result = {setting: best, **accuracy(_standardised(test, mean, scale) @ w_DC, test_labels)}
    tried = [{setting: value, "held_out_top1": percent} for value, percent in zip(grid, top1)]
    return {"protocol": "linear", "options": about, "results": [result], "selection": tried}


def _mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x.float(), 0, correction=0)
    varies = std > 1e-6 * std.max()  # a constant dimension would amplify rounding errors of the test set
    return mean, torch.where(varies, 1 / std, 0.0) / math.sqrt(x.shape[1])


def _standardised(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(N, dim + 1): standardised, and a column of ones for the bias."""
    x = (x.float() - mean) * scale
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _summed_gradient(w_DGC: Tensor, x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy summed over these rows and all settings G, and its gradient."""
    logits = (x_ND @ w_DGC.flatten(1)).view(len(x_ND), *w_DGC.shape[1:])
    loss, gradient = loss_and_gradient(logits, y_N)
    return loss.double().sum(), (x_ND.T @ gradient.flatten(1)).view(w_DGC.shape)


def _sgd(x: Tensor, y: Tensor, rates: tuple[float, ...], classes: int, epochs: int, batch: int, seed: int) -> Tensor:
    w = x.new_zeros(x.shape[1], len(rates), classes)
    velocity = torch.zeros_like(w)
    rate = torch.tensor(rates, device=x.device)[:, None]
    steps = -(-len(x) // batch)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(x), seed, epoch + 1)).to(x.device)
        for step, rows in enumerate(order.split(batch)):
            shard = rows[dist.shard(len(rows))]
            grad = dist.sum_(_summed_gradient(w, x[shard], y[shard])[1]) / len(rows)
            velocity.mul_(MOMENTUM).add_(grad)
            w.sub_(rate * velocity * (0.5 + 0.5 * math.cos(math.pi * (epoch * steps + step) / (epochs * steps))))
    return w


def _lbfgs(x: Tensor, y: Tensor, penalties: tuple[float, ...], classes: int, epochs: int, *_: int) -> Tensor:
    """From the strongest penalty to the weakest, each from the solution of the one before (one run on the sum of their
    losses has the same minimum and takes several times the iterations).

    Weights and sums are fp64 for the line search, which compares losses that agree in fp32's digits; products are fp32.
    """
    w = x.new_zeros(x.shape[1], 1, classes, dtype=torch.float64)
    n, shard, chunk = len(x), dist.shard(len(x)), max(1, LOGITS // classes)
    rows = list(zip(x[shard].split(chunk), y[shard].split(chunk)))
    out = {}
    for penalty in sorted(penalties, reverse=True):
        l2 = torch.full_like(w, penalty)
        l2[-1] = 0  # no penalty on the bias

        def closure(l2: float = l2) -> Tensor:
            parts = [_summed_gradient(w.float(), *part) for part in rows]
            loss, grad = (dist.sum_(sum(part).double()) / n for part in zip(*parts))
            w.grad = grad + l2 * w
            return loss + 0.5 * (l2 * w * w).sum()

        torch.optim.LBFGS(
            [w],
            max_iter=epochs,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        ).step(closure)
        out[penalty] = w.float()
    return torch.cat([out[penalty] for penalty in penalties], 1)
