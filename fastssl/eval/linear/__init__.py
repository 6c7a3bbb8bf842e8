"""The linear probe on frozen, cached features: multinomial logistic regression, all learning rates trained at once;
with --recipe the published protocols, which see augmented images (published.py).

Features are standardised per dimension and divided by sqrt(dim), so that one grid of learning rates serves every
backbone.  The setting is chosen on a tenth of the training set, then refitted on all of it; the test set is used once.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fastssl import dist
from fastssl.eval.common.features import check, hits
from fastssl.eval.common.target import EvalTarget, numbers
from fastssl.eval.linear import published
from fastssl.loader import permutation

LEARNING_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # solver "sgd"
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # solver "lbfgs": l2 of the weights, loss = mean + l2 / 2 |W|^2
MOMENTUM = 0.9
LOGITS = 1 << 26  # entries of (rows, settings, classes) at a time: 256 MB, a few times over
NEEDS = ("train", "test")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        choices=("probe", *published.RECIPES),
        default="probe",
        help="probe: on cached features, the rate chosen on held-out images; the others as published: "
        "moco (OpenSelfSup's Last), multi (five layers), places205, lars (SimSiam, MMSelfSup)",
    )
    parser.add_argument("--solver", choices=("sgd", "lbfgs"), help="of the probe; default: sgd")
    parser.add_argument(
        "--grid",
        type=numbers(float),
        help="learning rates, trained at once (probe with lbfgs: l2 penalties); default: the recipe's",
    )
    parser.add_argument(
        "--epochs", type=int, help="default: the recipe's; probe: 100 (lbfgs: at most so many iterations)"
    )
    parser.add_argument("--probe-batch", type=int, help="of all ranks together; default: the recipe's, probe: 1024")
    parser.add_argument(
        "--held-out",
        type=float,
        help="share of the training set that chooses the setting, never on "
        "the test set; default: 0.1 for the probe, 0 for the published recipes",
    )
    parser.add_argument(
        "--layers",
        type=lambda text: tuple(text.split(",")),
        help="of the published recipes: stem,layer1,...,layer4,last; default: the recipe's",
    )
    parser.add_argument(
        "--no-augment",
        action="store_true",
        help="published recipes on the cached features of the test's crop: minutes, and not what the papers report",
    )


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    if args.recipe == "probe":
        if args.layers or args.no_augment:
            raise ValueError(
                f"--{'layers' if args.layers else 'no-augment'} is for the published recipes: give "
                f"--recipe, one of {', '.join(published.RECIPES)}"
            )
        if args.solver == "lbfgs" and args.probe_batch is not None:
            raise ValueError(f"--probe-batch {args.probe_batch} is for --solver sgd: lbfgs sees all rows at once")
        return probe(
            *target.features(target.train),
            *target.features(target.test),
            solver=args.solver or "sgd",
            grid=args.grid,
            epochs=_given(args.epochs, 100),
            batch=_given(args.probe_batch, 1024),
            held_out=_given(args.held_out, 0.1),
            seed=args.seed,
        )
    if args.solver:
        raise ValueError(f"--solver is the probe's: leave it out with --recipe {args.recipe}")
    say = (lambda text: print(text, flush=True)) if dist.is_main() else (lambda text: None)
    return published.run(
        target,
        args.recipe,
        rates=args.grid,
        epochs=args.epochs,
        batch=args.probe_batch,
        layers=args.layers,
        held_out=_given(args.held_out, 0.0),
        augment=not args.no_augment,
        say=say,
    )


def _given(value, default):
    return default if value is None else value


@torch.no_grad()
def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    solver: str = "sgd",
    grid: tuple[float, ...] | None = None,
    epochs: int = 100,
    batch: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
) -> dict:
    """Test accuracy in percent.  Features (N, dim), (M, dim); labels (N,), (M,); all ranks hold all rows.

    "sgd": momentum 0.9, cosine to zero over `epochs`, no weight decay, `grid` holds learning rates for `batch`.
    "lbfgs": `grid` holds penalties, `epochs` is the most iterations.  Ranks share the rows of every batch.
    """
    check("training set", train, train_labels)
    check("test set", test, test_labels)
    classes = int(train_labels.max()) + 1
    _check(train, test, test_labels, solver, grid, epochs, batch, held_out, classes)
    grid = tuple(sorted(grid or (LEARNING_RATES if solver == "sgd" else PENALTIES)))
    order = torch.from_numpy(permutation(len(train), seed, 0)).to(train.device)
    chosen_on, fitted_on = order.split([(n := max(1, round(held_out * len(train)))), len(train) - n])

    mean, scale = _standard(train)
    x = _scaled(train, mean, scale)
    fit = {"sgd": _sgd, "lbfgs": _lbfgs}[solver]
    w_DGC = fit(x[fitted_on], train_labels[fitted_on], grid, classes, epochs, batch, seed)
    held = [_accuracy(x[chosen_on] @ w, train_labels[chosen_on])["top1"] for w in w_DGC.unbind(1)]
    best = grid[held.index(max(held))]  # the smallest of equals
    w_DC = fit(x, train_labels, (best,), classes, epochs, batch, seed)[:, 0]
    setting = "lr" if solver == "sgd" else "l2"
    options = {
        "solver": solver,
        "epochs": epochs,
        "batch": min(batch, len(train)),
        "held_out": held_out,
        "seed": seed,
        "train": len(train),
        "test": len(test),
        "dim": train.shape[1],
        "classes": classes,
    }
    if solver == "lbfgs":
        del options["batch"]
    result = {setting: best, **_accuracy(_scaled(test, mean, scale) @ w_DC, test_labels)}
    tried = [{setting: value, "held_out_top1": accuracy} for value, accuracy in zip(grid, held)]
    return {"protocol": "linear", "options": options, "results": [result], "selection": tried}


def _check(train, test, test_labels, solver, grid, epochs, batch, held_out, classes) -> None:
    if solver not in ("sgd", "lbfgs"):
        raise ValueError(f"solver={solver!r}: known are sgd and lbfgs")
    if grid is not None and (not grid or min(grid) <= 0):
        raise ValueError(f"grid={grid}: give positive values")
    if epochs < 1 or batch < 1 or not 0 < held_out < 1:
        raise ValueError(f"epochs={epochs}, batch={batch} must be positive, held_out={held_out} between 0 and 1")
    if len(train) < 2:
        raise ValueError("the training set has one sample: none is left to choose the setting on")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"the training set has {train.shape[1]} dimensions, the test set {test.shape[1]}")
    if int(test_labels.max()) >= classes:
        raise ValueError(f"class {int(test_labels.max())} of the test set is not in the training set")


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x.float(), 0, correction=0)
    alive = std > 1e-6 * std.max()  # a constant dimension would blow up the test set's rounding
    return mean, torch.where(alive, 1 / std, 0.0) / math.sqrt(x.shape[1])


def _scaled(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(N, dim + 1): standardised, and a column of ones for the bias."""
    x = (x.float() - mean) * scale
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _accuracy(logits: Tensor, labels: Tensor) -> dict:
    tops = (1, 5) if logits.shape[1] > 5 else (1,)
    return {f"top{n}": 100 * hits(logits, labels, n).sum().item() / len(labels) for n in tops}


def _loss_and_gradient(w_DGC: Tensor, x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy summed over this rank's rows and all settings G, and its gradient in closed form."""
    logits = (x_ND @ w_DGC.flatten(1)).view(len(x_ND), *w_DGC.shape[1:])
    log_p = logits.log_softmax(-1)
    target = y_N[:, None, None].expand(-1, w_DGC.shape[1], 1)
    loss = -log_p.gather(-1, target).double().sum()
    residual = log_p.exp_().scatter_add_(-1, target, log_p.new_full(target.shape, -1.0))
    return loss, (x_ND.T @ residual.flatten(1)).view(w_DGC.shape)


def _sgd(x: Tensor, y: Tensor, rates: tuple[float, ...], classes: int, epochs: int, batch: int, seed: int) -> Tensor:
    w = x.new_zeros(x.shape[1], len(rates), classes)
    velocity = torch.zeros_like(w)
    rate = torch.tensor(rates, device=x.device)[:, None]
    steps = -(-len(x) // batch)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(x), seed, epoch + 1)).to(x.device)
        for step, rows in enumerate(order.split(batch)):
            mine = rows[dist.shard(len(rows))]
            grad = dist.sum_(_loss_and_gradient(w, x[mine], y[mine])[1]) / len(rows)
            velocity.mul_(MOMENTUM).add_(grad)
            w.sub_(rate * velocity * (0.5 + 0.5 * math.cos(math.pi * (epoch * steps + step) / (epochs * steps))))
    return w


def _lbfgs(x: Tensor, y: Tensor, penalties: tuple[float, ...], classes: int, epochs: int, *_) -> Tensor:
    """From the strongest penalty to the weakest, each from where the last ended (one run on the sum of their losses has
    the same minimum and takes several times the iterations).

    Weights and sums are fp64 for the line search, which compares losses that agree in fp32's digits; products are fp32.
    """
    w = x.new_zeros(x.shape[1], 1, classes, dtype=torch.float64)
    n, mine, chunk = len(x), dist.shard(len(x)), max(1, LOGITS // classes)
    rows = list(zip(x[mine].split(chunk), y[mine].split(chunk)))
    out = {}
    for penalty in sorted(penalties, reverse=True):
        l2 = torch.full_like(w, penalty)
        l2[-1] = 0  # the bias is free

        def closure(l2=l2) -> Tensor:
            parts = [_loss_and_gradient(w.float(), *part) for part in rows]
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
