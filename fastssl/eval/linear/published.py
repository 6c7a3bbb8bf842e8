"""Linear classifiers on a frozen backbone as published: MoCo's "Last", OpenSelfSup's "Multi" on five pooled layers,
Places205, and SimSiam's with LARS.

Every image is augmented anew in each epoch and goes through the frozen network, in evaluation mode, once: all layers
and all learning rates train on that pass.  Each of them gets what it would get alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.backbones import evaluating
from fastssl.config import Optim
from fastssl.eval.common import features, finetuning
from fastssl.eval.common.features import check, hits
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.linear.augment import AUGMENT
from fastssl.kernels.augment import make_views
from fastssl.loader import Loader, permutation
from fastssl.norm import convert_sync_bn
from fastssl.optim import lr_multiplier

MOMENTUM, ETA = 0.9, 1e-3
ROWS = 4096  # of test features at a time


@dataclass(frozen=True)
class Recipe:
    lr: float  # for `batch`
    epochs: int
    batch: int = 256
    layers: tuple[str, ...] | None = ("last",)  # None: all maps
    milestones: tuple[int, ...] = ()  # epochs where the rate falls to a tenth; none: a cosine in steps of an epoch
    weight_decay: float = 0.0
    nesterov: bool = False
    lars: bool = False
    norm: bool = False  # batch norm over all ranks without affine, per channel of the pooled map
    augment: str = "resized"  # of AUGMENT
    published: str = "none"  # "selected_on" of the row that the papers print: the last epoch, or "test", the best one


RECIPES = {
    "moco": Recipe(30.0, 100, milestones=(60, 80), published="test"),
    "multi": Recipe(
        0.01, 90, layers=None, milestones=(30, 60, 90), weight_decay=1e-4, nesterov=True, norm=True, augment="jittered"
    ),
    "places205": Recipe(
        0.01, 28, layers=None, milestones=(7, 14, 21), weight_decay=1e-4, nesterov=True, norm=True, augment="window"
    ),
    "lars": Recipe(1.6, 90, batch=4096, lars=True, published="test"),
}


def run(
    target: EvalTarget,
    name: str,
    *,
    rates: tuple[float, ...] | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    layers: tuple[str, ...] | None = None,
    held_out: float = 0.0,
    augment: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """The protocol `name` of RECIPES.  Rows: each layer and rate at the last epoch ("selected_on": "none"), the best
    rate and epoch on the test set ("test"), with `held_out` > 0 also on that share of the training set ("held-out",
    then left out of training).

    Fewer `epochs` keep the milestones' shares; another `batch` scales the recipe's rate.  `augment=False` trains on the
    test crop's cached features.
    """
    recipe = RECIPES[name]
    batch, epochs = (own if given is None else given for given, own in ((batch, recipe.batch), (epochs, recipe.epochs)))
    recipe = replace(
        recipe,
        lr=recipe.lr * batch / recipe.batch,
        batch=batch,
        epochs=epochs,
        milestones=tuple(m * epochs / recipe.epochs for m in recipe.milestones),
    )
    rates = (recipe.lr,) if rates is None else tuple(sorted(set(rates)))
    known = features.layers_of(target.backbone)
    names = features.check_layers(target.backbone, layers or recipe.layers or known[:-1])
    _check(target, recipe, rates, held_out)
    loader, evaluation = training_loader(target, recipe), target.loader(target.train)
    classes = finetuning.classes(loader)
    order = permutation(loader.samples, target.args.seed, 0)
    held, kept = np.split(order, [round(held_out * len(order))])
    if recipe.batch > len(kept):
        raise ValueError(f"batch={recipe.batch}: there are {len(kept)} training images; use at most so many")
    sets = {"test": target.features(target.test, names)}
    if len(held):
        sets["held-out"] = features.extract_rows(
            target.backbone, evaluation, target.view, held, layers=names, precision=target.args.precision
        )
    for label, (*parts, y) in sets.items():
        for part in parts:
            check(label, part, y)
    shapes = features.shapes(target.backbone, target.view, names)
    heads = [
        LinearClassifiers(shape, rates, classes, recipe, target.args.seed + i, loader.device)
        for i, shape in enumerate(shapes)
    ]
    source = live(target, recipe, loader, names, kept) if augment else cached(target, recipe, names, kept)
    steps, curve = len(kept) // recipe.batch, []
    for epoch in range(recipe.epochs):
        factor, losses = rate_factor(recipe, epoch), torch.zeros(len(names), len(rates), device=loader.device)
        for xs, y in source(epoch, steps):
            losses += torch.stack([head.step(x, y, factor) for head, x in zip(heads, xs)]) / steps
        losses = losses.tolist()
        for i, (layer, head) in enumerate(zip(names, heads)):
            found = {label: head.accuracy(parts[i], parts[-1]) for label, parts in sets.items()}
            for j, rate in enumerate(rates):
                row = {"layer": layer, "lr": rate, "epoch": epoch + 1, "loss": losses[i][j], **found["test"][j]}
                if len(held):
                    row["held_out_top1"] = found["held-out"][j]["top1"]
                curve.append(row)
                say(" ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    options = {
        "recipe": name,
        "published": recipe.published,
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "milestones": list(recipe.milestones),
        "weight_decay": recipe.weight_decay,
        "lars": recipe.lars,
        "augment": recipe.augment if augment else "none",
        "held_out": len(held),
        "seed": target.args.seed,
        "train": len(kept),
        "test": len(sets["test"][-1]),
        "classes": classes,
    }
    return {"protocol": "linear", "options": options, "results": results(curve, names), "curve": curve}


def results(curve: list[dict], layers: tuple[str, ...]) -> list[dict]:
    """The rows that `run` describes, from the curve of all layers, rates and epochs; of equals the first."""
    rows, last = [], max(row["epoch"] for row in curve)
    for layer in layers:
        own = [row for row in curve if row["layer"] == layer]
        chosen = [("none", row) for row in own if row["epoch"] == last] + [("test", max(own, key=lambda r: r["top1"]))]
        if "held_out_top1" in own[0]:
            chosen.append(("held-out", max(own, key=lambda r: r["held_out_top1"])))
        rows += [
            {
                "layer": layer,
                "lr": row["lr"],
                "epoch": row["epoch"],
                "selected_on": on,
                **{key: row[key] for key in ("top1", "top5") if key in row},
            }
            for on, row in chosen
        ]
    return rows


def rate_factor(recipe: Recipe, epoch: int) -> float:
    optim = Optim(
        lr=1.0,
        schedule="step" if recipe.milestones else "cosine_epoch",
        gamma=0.1,
        lr_end=0.0,
        milestones=recipe.milestones,
        warmup_epochs=0,
    )
    return lr_multiplier(optim, epoch * 1000, 1000, recipe.epochs * 1000)  # 1000: milestones may fall into an epoch


def _check(target: EvalTarget, recipe: Recipe, rates: tuple[float, ...], held_out: float) -> None:
    if min(rates, default=0) <= 0 or recipe.epochs < 1 or recipe.batch < 1:
        raise ValueError(f"rates {rates}, epochs={recipe.epochs}, batch={recipe.batch} must all be positive")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: a share of the training set, 0 (none) to below 1")
    if recipe.augment == "window" and target.view.crop != "center":
        raise ValueError(f"the evaluation's view has crop={target.view.crop!r}: this protocol needs a centre crop")


# Batches of features: source(epoch, steps) gives ([x (B, dim) of each layer], y (B,)), this rank's share


def training_loader(target: EvalTarget, recipe: Recipe) -> Loader:
    """Shuffled batches of the recipe's size, in micro-batches of at most --batch images."""
    share = recipe.batch // dist.world()
    if recipe.batch % dist.world():
        raise ValueError(f"batch={recipe.batch} is not divisible by the {dist.world()} ranks")
    micro = next(m for m in range(1, share + 1) if share % m == 0 and share // m <= target.args.batch)
    return Loader(
        target.train,
        recipe.batch,
        seed=target.args.seed,
        device=target.args.device,
        micro=micro,
        workers=target.args.workers,
    )


def live(target: EvalTarget, recipe: Recipe, loader: Loader, layers: tuple[str, ...], kept: np.ndarray):
    view, finish = AUGMENT[recipe.augment](target.view)
    seed = target.args.seed

    @torch.no_grad()
    def source(epoch: int, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        order = np.resize(kept[permutation(len(kept), seed, epoch + 1)], loader.samples)
        with evaluating(target.backbone), contextlib.closing(loader.epoch(epoch, order=order)) as batches:
            for _ in range(steps):
                parts = []
                for batch in islice(batches, loader.micro):
                    x = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=seed, epoch=epoch)[0]
                    x = finish(x, batch.index, epoch, seed)
                    parts.append([*features.of_view(target.backbone, x, layers, target.args.precision), batch.label])
                *xs, y = (torch.cat(part) for part in zip(*parts))
                yield xs, y

    return source


def cached(target: EvalTarget, recipe: Recipe, layers: tuple[str, ...], kept: np.ndarray):
    *xs, y = target.features(target.train, layers)
    for x in xs:
        check("training set", x, y)

    def source(epoch: int, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        order = torch.from_numpy(kept[permutation(len(kept), target.args.seed, epoch + 1)]).to(y.device)
        for rows in order[: steps * recipe.batch].view(steps, dist.world(), -1)[:, dist.rank()]:
            yield [x[rows] for x in xs], y[rows]

    return source


class LinearClassifiers:
    """One linear classifier for each of G learning rates on the same features, N(0, 0.01) and zero bias at first.

    D dimensions, G rates, C classes.  Closed-form gradients of the mean cross entropy over the global batch.
    """

    def __init__(self, shape: torch.Size, rates: tuple[float, ...], classes: int, recipe: Recipe, seed: int, device):
        self.recipe, self.shape, dim = recipe, shape, shape.numel()
        self.rates_G1 = torch.tensor(rates, device=device)[:, None]
        start = 0.01 * torch.randn(dim, classes, generator=torch.Generator().manual_seed(seed))
        self.weight_DGC = start.to(device)[:, None].repeat(1, len(rates), 1)
        self.bias_GC = torch.zeros(len(rates), classes, device=device)
        self.velocity = [torch.zeros_like(p) for p in (self.weight_DGC, self.bias_GC)]
        norm = nn.BatchNorm1d(shape[0], affine=False) if recipe.norm else nn.Identity()
        self.norm = convert_sync_bn(norm, torch.device(device)).to(device)

    @torch.no_grad()
    def step(self, x_BD: Tensor, y_B: Tensor, factor: float) -> Tensor:
        """(G,) losses of the global batch, of which every rank holds as many rows; rates are times `factor`."""
        self.norm.train()
        x, n = self._normalised(x_BD), len(y_B) * dist.world()
        log_p = self._logits(x).log_softmax(-1)
        target = y_B[:, None, None].expand(-1, log_p.shape[1], 1)
        loss = dist.sum_(-log_p.gather(-1, target).sum((0, 2)) / n)
        residual = log_p.exp_().scatter_add_(-1, target, log_p.new_full(target.shape, -1.0)) / n
        grads = (x.T @ residual.flatten(1)).view(self.weight_DGC.shape), residual.sum(0)
        for p, grad, velocity in zip((self.weight_DGC, self.bias_GC), grads, self.velocity):
            update_(p, dist.sum_(grad), velocity, factor * self.rates_G1, self.recipe)
        return loss

    @torch.no_grad()
    def accuracy(self, x_ND: Tensor, y_N: Tensor) -> list[dict]:
        """{"top1", "top5" (more than five classes)} in percent for each rate; ranks share the rows.  A classifier that
        diverged has none right."""
        self.norm.eval()
        tops = (1, 5) if self.bias_GC.shape[1] > 5 else (1,)
        right = torch.zeros(len(tops), len(self.bias_GC), dtype=torch.int64, device=x_ND.device)
        mine = dist.shard(len(y_N))
        for x, y in zip(x_ND[mine].split(ROWS), y_N[mine].split(ROWS)):
            logits = self._logits(self._normalised(x)).transpose(0, 1)  # (G, B, C)
            sane = logits.isfinite().all(-1)
            right += torch.stack([(hits(logits, y, n) & sane).sum(1) for n in tops])
        counts = dist.sum_(right.to(dist.device())).T.tolist()
        return [{f"top{n}": 100 * count / len(y_N) for n, count in zip(tops, row)} for row in counts]

    def _normalised(self, x_BD: Tensor) -> Tensor:
        return self.norm(x_BD.view(len(x_BD), self.shape[0], -1)).flatten(1) if self.recipe.norm else x_BD

    def _logits(self, x_BD: Tensor) -> Tensor:
        return (x_BD @ self.weight_DGC.flatten(1)).view(len(x_BD), *self.bias_GC.shape) + self.bias_GC


def update_(p: Tensor, grad: Tensor, velocity: Tensor, rate_G1: Tensor, recipe: Recipe) -> None:
    """One step of p (..., G, C) in place: torch's SGD, or optim.Lars's rule with a ratio for each of the G."""
    d = grad + recipe.weight_decay * p
    if recipe.lars:
        others = [i for i in range(p.ndim) if i != p.ndim - 2]
        w, g = (t.square().sum(others).sqrt()[:, None] for t in (p, grad))
        ratio = torch.where((w > 0) & (g > 0), ETA * w / (g + recipe.weight_decay * w), 1.0)
        velocity.mul_(MOMENTUM).add_(ratio * rate_G1 * d)
        p.sub_(velocity)
    else:
        velocity.mul_(MOMENTUM).add_(d)
        p.sub_(rate_G1 * (d.add_(velocity, alpha=MOMENTUM) if recipe.nesterov else velocity))
