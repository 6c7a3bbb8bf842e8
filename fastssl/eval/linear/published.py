"""Linear classifiers on a frozen backbone by published protocols: MoCo's "Last", OpenSelfSup's "Multi" on five pooled
layers, Places205, and SimSiam's with LARS.

In each epoch every image is augmented and passes the frozen network, in evaluation mode, once.  The classifiers of all
layers and learning rates train on these features, each exactly as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from fastssl import dist
from fastssl.backbones import evaluating
from fastssl.eval.common import features, finetuning
from fastssl.eval.common.features import Extractor, check_features
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.linear.augment import AUGMENT
from fastssl.eval.linear.classifiers import LinearClassifiers
from fastssl.eval.linear.recipes import RECIPES, Recipe, rate_factor
from fastssl.inference import forward_batches
from fastssl.kernels.augment import make_views
from fastssl.loader import Batch, Loader
from fastssl.parsing import settings_text
from fastssl.sampler import Sampler, permutation


def train_and_test(
    target: EvalTarget,
    name: str,
    *,
    rates: tuple[float, ...] | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    layers: tuple[str, ...] | None = None,
    held_out: float = 0.0,
    augment: bool = True,
) -> dict:
    """Train and test linear classifiers by the protocol `name` of RECIPES.

    Rows of the result: each layer and rate at the last epoch ("selected_on": "none"), and for each layer the best rate
    and epoch on the test set ("test") and, with `held_out` > 0, on that fraction of the training set, which is then not
    trained on ("held-out").

    `epochs` other than the recipe's scale the milestones, another `batch` scales the rate.  `augment=False` trains on
    cached features of the test crop.
    """
    recipe = _rescaled(RECIPES[name], batch, epochs)
    rates = (recipe.lr,) if rates is None else tuple(sorted(set(rates)))
    known = features.layers_of(target.backbone)
    names = features.check_layers(target.backbone, layers or recipe.layers or known[:-1])
    _check(target, recipe, rates, held_out)
    loader = training_loader(target, recipe)
    classes = finetuning.count_classes(loader)
    order = permutation(loader.samples, target.args.seed, 0)
    held_out_rows, rows = np.split(order, [round(held_out * len(order))])
    if held_out and not len(held_out_rows):
        raise ValueError(f"held_out={held_out} of {len(order)} training images is none: use a larger fraction")
    if recipe.batch > len(rows):
        raise ValueError(f"batch={recipe.batch} is more than the {len(rows)} training images: use at most that many")
    extractor = target.extractor(names)
    sets = _test_sets(target, extractor, names, held_out_rows)
    classifiers = [
        LinearClassifiers(shape, rates, classes, recipe, target.args.seed + i, loader.device)
        for i, shape in enumerate(extractor.shapes)
    ]
    batches = (
        augmented_batches(extractor, recipe, loader, rows) if augment else cached_batches(target, recipe, names, rows)
    )
    curve = []
    for epoch in range(recipe.epochs):
        factor, steps = rate_factor(recipe, epoch), batches(epoch, len(rows) // recipe.batch)
        losses = [torch.stack([c.step(x, y, factor) for c, x in zip(classifiers, xs)]) for xs, y in steps]
        curve += _curve_rows(epoch, names, rates, torch.stack(losses).mean(0).tolist(), classifiers, sets)
    options = {
        "recipe": name,
        **{key: getattr(recipe, key) for key in ("published", "epochs", "batch", "weight_decay", "lars")},
        "milestones": list(recipe.milestones),
        "augment": recipe.augment if augment else "none",
        "held_out": len(held_out_rows),
        "seed": target.args.seed,
        "train": len(rows),
        "test": len(sets["test"][-1]),
        "classes": classes,
    }
    return {"protocol": "linear", "options": options, "results": results(curve, names), "curve": curve}


def _rescaled(recipe: Recipe, batch: int | None, epochs: int | None) -> Recipe:
    """The recipe with another batch, which scales its rate, and other epochs, which scale its milestones."""
    batch, epochs = recipe.batch if batch is None else batch, recipe.epochs if epochs is None else epochs
    milestones = tuple(m * epochs / recipe.epochs for m in recipe.milestones)
    return replace(recipe, lr=recipe.lr * batch / recipe.batch, batch=batch, epochs=epochs, milestones=milestones)


def _test_sets(
    target: EvalTarget, extractor: Extractor, layers: tuple[str, ...], held_out_rows: np.ndarray
) -> dict[str, tuple[Tensor, ...]]:
    """Features of each layer and labels of the test set ("test") and of the held-out images ("held-out"), if any."""
    sets = {"test": target.features(target.test, layers)}
    if len(held_out_rows):
        sets["held-out"] = features.extract(extractor, target.loader(target.train), held_out_rows)
    for name, (*xs, y) in sets.items():
        for x in xs:
            check_features(name, x, y)
    return sets


def _curve_rows(
    epoch: int,
    layers: tuple[str, ...],
    rates: tuple[float, ...],
    losses: list[list[float]],
    classifiers: list[LinearClassifiers],
    sets: dict[str, tuple[Tensor, ...]],
) -> list[dict]:
    """A row for each layer and rate after an epoch, which is also printed.  `sets`: features and labels to test on."""
    rows = []
    for i, (layer, classifier) in enumerate(zip(layers, classifiers)):
        accuracies = {name: classifier.accuracy(parts[i], parts[-1]) for name, parts in sets.items()}
        for j, rate in enumerate(rates):
            row = {"layer": layer, "lr": rate, "epoch": epoch + 1, "loss": losses[i][j], **accuracies["test"][j]}
            if "held-out" in sets:
                row["held_out_top1"] = accuracies["held-out"][j]["top1"]
            rows.append(row)
            dist.print_main(settings_text(row))
    return rows


def results(curve: list[dict], layers: tuple[str, ...]) -> list[dict]:
    """The rows that `train_and_test` returns, chosen from those of all layers, rates and epochs; the first of
    equals."""
    rows, last = [], max(row["epoch"] for row in curve)
    keys = ("layer", "lr", "epoch", "selected_on", "top1", "top5")
    for layer in layers:
        layer_rows = [row for row in curve if row["layer"] == layer]
        chosen = [("none", row) for row in layer_rows if row["epoch"] == last]
        for on, key in (("test", "top1"), ("held-out", "held_out_top1")):
            chosen += [(on, max(layer_rows, key=itemgetter(key)))] if key in layer_rows[0] else []
        found = [{**row, "selected_on": on} for on, row in chosen]
        rows += [{key: row[key] for key in keys if key in row} for row in found]
    return rows


def _check(target: EvalTarget, recipe: Recipe, rates: tuple[float, ...], held_out: float) -> None:
    if min(rates, default=0) <= 0 or recipe.epochs < 1 or recipe.batch < 1:
        raise ValueError(f"rates {rates}, epochs={recipe.epochs}, batch={recipe.batch} must all be positive")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: a fraction of the training set, 0 (none) to below 1")
    if recipe.augment == "window" and target.view.crop != "center":
        raise ValueError(f"the evaluation's view has crop={target.view.crop!r}: this protocol needs a centre crop")


def training_loader(target: EvalTarget, recipe: Recipe) -> Loader:
    """Shuffled batches of the recipe's size, in micro-batches of at most --batch images."""
    args, batch_local = target.args, recipe.batch // dist.world()
    if recipe.batch % dist.world():
        raise ValueError(f"batch={recipe.batch} is not divisible by the {dist.world()} ranks")
    micro = next(m for m in range(1, batch_local + 1) if batch_local % m == 0 and batch_local // m <= args.batch)
    sampler = Sampler(args.seed, micro)
    return Loader(target.train, recipe.batch, sampler, device=args.device, workers=args.workers)


# batches(epoch, steps): features (B, dim) of each layer and labels (B,), this rank's shard of each batch
Batches = Callable[[int, int], Iterator[tuple[list[Tensor], Tensor]]]


def augmented_batches(extractor: Extractor, recipe: Recipe, loader: Loader, rows: np.ndarray) -> Batches:
    """Batches of the training images `rows`, with new augmentations in each epoch."""
    view, finish = AUGMENT[recipe.augment](extractor.view)
    seed = loader.sampler.seed

    def forward(batch: Batch) -> list[Tensor]:
        (x,) = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=seed, epoch=batch.epoch)
        return extractor.of_images(finish(x, batch.index, batch.epoch, seed) if finish else x)

    def batches(epoch: int, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        # repeated to the length of the file, as the loader needs; only the first `steps` batches are read
        order = np.resize(rows[permutation(len(rows), seed, epoch + 1)], loader.samples)
        with evaluating(extractor.backbone):
            micro_batches = forward_batches(forward, loader, epoch=epoch, stop=steps, order=order)
            for _ in range(steps):
                parts = [(*xs, batch.label) for batch, xs in islice(micro_batches, loader.sampler.micro_per_step)]
                *xs, y = (torch.cat(part) for part in zip(*parts))
                yield xs, y

    return batches


def cached_batches(target: EvalTarget, recipe: Recipe, layers: tuple[str, ...], rows: np.ndarray) -> Batches:
    """Batches of cached features of the training images `rows`."""
    *xs, y = target.features(target.train, layers)
    for x in xs:
        check_features("training set", x, y)

    def batches(epoch: int, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        order = torch.from_numpy(rows[permutation(len(rows), target.args.seed, epoch + 1)]).to(y.device)
        for chosen in order[: steps * recipe.batch].view(steps, dist.world(), -1)[:, dist.rank()]:
            yield [x[chosen] for x in xs], y[chosen]

    return batches
