"""Semi-supervised classification: the network fine-tuned on 1 % or 10 % of the labels (OpenSelfSup's protocol).

Nine trainings: three rates of the backbone x three multiples of it for the head.  The published figure is the best of
the nine on the TEST SET ("selected_on=test").  The second row ("selected_on=held-out") is the setting that is best on
held-out labelled images; for it the nine are trained again on the other labelled images.  A call that was stopped
continues with the trainings that are not finished.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from fastssl import dist
from fastssl.config import Optim
from fastssl.eval.common import cache, finetuning
from fastssl.eval.common.stored_results import StoredResults
from fastssl.eval.common.target import EvalTarget
from fastssl.loader import Loader
from fastssl.sampler import permutation

NEEDS = ("train", "test")
RATES, HEAD_MULTS = (0.001, 0.01, 0.1), (1.0, 10.0, 100.0)
WEIGHT_DECAY: dict[float, float] = {1: 5e-4, 10: 1e-4}  # by percent of the labels


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    rates = args.lr or ((0.01,) if target.spec.sobel else RATES)
    mults = args.head_mult or ((1.0,) if target.spec.sobel else HEAD_MULTS)
    _check(args, rates, mults)
    loader, test = finetuning.training_loader(target, args.train_batch), target.loader(target.test)
    classes, rows, percent = finetuning.count_classes(loader), *labelled(loader, args)
    decay = args.weight_decay if args.weight_decay is not None else WEIGHT_DECAY.get(round(percent, 1))
    if decay is None:
        raise ValueError(
            f"{percent:g} % of the images are labelled, and a weight decay is published for 1 % and 10 % "
            "alone: give --weight-decay"
        )
    held_out, rest = split(rows, finetuning.class_labels(loader), args.held_out, args.seed)
    base = Optim(
        name="sgd",
        batch=args.train_batch,
        epochs=args.epochs,
        momentum=0.9,
        weight_decay=decay,
        schedule="step",
        milestones=args.milestones,
        gamma=args.gamma,
        precision=args.precision,
    )
    view = finetuning.training_view(target.view)
    evaluation_loader = target.loader(target.train)
    stored = StoredResults(
        args.out,
        {
            "weights": cache.hash_weights(target.backbone),
            "data": [cache.hash_data(loader), cache.hash_data(test)],
            "backbone": dataclasses.asdict(target.spec),
            "view": dataclasses.asdict(target.view),
            "seed": args.seed,
            "optim": dataclasses.asdict(base),
            "rows": rows.tolist(),
            "held_out": held_out.tolist(),
            "classes": classes,
        },
    )
    total = len(rates) * len(mults) * (2 if len(held_out) else 1)
    if stored.done:
        dist.print_main(f"{len(stored.done)} of {total} trainings are read from {stored.path}")

    def accuracy(lr: float, mult: float, fit: np.ndarray, on: Loader, rows: np.ndarray | None = None) -> dict:
        name = f"lr={lr:g} head_mult={mult:g} tested on {'the test set' if rows is None else 'held-out images'}"
        progress = f"training {len(stored.done) + 1} of {total}, {name}, "

        def train_and_test() -> dict:
            try:
                model = finetuning.train(
                    target.backbone,
                    loader,
                    view,
                    finetuning.with_head_rate(base, lr, mult),
                    classes=classes,
                    rows=fit,
                    options=finetuning.TrainingOptions(seed=args.seed, name=progress),
                )
            except finetuning.Diverged:
                return {"top1": 0.0, "diverged": True}
            return finetuning.accuracy(model, on, target.view, classes=classes, rows=rows, precision=args.precision)

        return stored.get(name, train_and_test)

    cells = []
    for lr, mult in ((lr, mult) for lr in rates for mult in mults):
        cell = {"lr": lr, "head_mult": mult, **accuracy(lr, mult, rows, test)}
        if len(held_out):
            cell["held_out_top1"] = accuracy(lr, mult, rest, evaluation_loader, held_out)["top1"]
        cells.append(cell)
        dist.print_main(" ".join(f"{key}={value:g}" for key, value in cell.items()))
    stored.remove()
    options = {
        "percent": percent,
        "labelled": len(rows),
        "subset": args.subset or "drawn",
        "epochs": args.epochs,
        "batch": args.train_batch,
        "milestones": list(args.milestones),
        "gamma": args.gamma,
        "weight_decay": decay,
        "held_out": len(held_out),
        "seed": args.seed,
        "train": loader.samples,
        "test": test.samples,
        "classes": classes,
    }
    found = [{"percent": percent, **row} for row in results(cells)]
    return {"protocol": "semisup", "options": options, "results": found, "selection": cells}


def results(cells: list[dict]) -> list[dict]:
    """The cell that is best on the test set and, where cells have "held_out_top1", the one that is best on held-out
    images; the first of equals."""
    keys = ("lr", "head_mult", "top1", "top5")
    keys_by = {"test": "top1"} | ({"held-out": "held_out_top1"} if "held_out_top1" in cells[0] else {})
    best = {on: max(cells, key=lambda cell: cell[key]) for on, key in keys_by.items()}
    return [{"selected_on": on, **{key: cell[key] for key in keys if key in cell}} for on, cell in best.items()]


def _check(args: argparse.Namespace, rates: tuple[float, ...], mults: tuple[float, ...]) -> None:
    if min(rates) <= 0 or min(mults) <= 0:
        raise ValueError(f"--lr {rates} and --head-mult {mults} must be positive")
    if args.epochs < 1 or not 0 <= args.held_out < 1:
        raise ValueError(f"--epochs {args.epochs} must be positive, --held-out {args.held_out} at least 0 and below 1")
    if args.subset not in (None, "all") and args.percent is not None:
        raise ValueError("--percent and --subset both say which images are labelled: give one of them")
    if args.names and args.subset in (None, "all"):
        raise ValueError("--names is for the names in a --subset FILE: give that, too")
    if args.percent is not None and not 0 < args.percent <= 100:
        raise ValueError(f"--percent {args.percent} must be above 0 and at most 100")


def labelled(loader: Loader, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """int64 rows of the labelled images, sorted, and their percentage of all images."""
    if args.subset == "all":
        return np.arange(loader.samples), 100.0 if args.percent is None else args.percent
    if args.subset is None:
        percent = 1.0 if args.percent is None else args.percent
        return balanced(finetuning.class_labels(loader), percent, args.seed), percent
    rows = read_subset(args.subset, loader, args.names)
    return rows, 100 * len(rows) / loader.samples


def balanced(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Sorted rows: `percent` of every class, rounded, at least one."""
    order = permutation(len(labels), seed, 0)
    parts = [(own := order[labels[order] == c])[: max(1, round(percent / 100 * len(own)))] for c in np.unique(labels)]
    return np.sort(np.concatenate(parts))


def split(rows: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out rows, other rows): `fraction` of the rows of each class, rounded, and the rest, at least one of each
    class."""
    if not fraction:
        return rows[:0], rows
    order = rows[permutation(len(rows), seed, 1)]
    parts = [
        (own := order[labels[order] == c])[: min(round(fraction * len(own)), len(own) - 1)]
        for c in np.unique(labels[rows])
    ]
    held_out = np.sort(np.concatenate(parts))
    if not len(held_out):
        raise ValueError(
            f"{len(rows)} labelled images of {len(parts)} classes leave none to hold out of {fraction:g}: "
            "give --held-out 0 (no held-out row) or a larger fraction"
        )
    return held_out, np.setdiff1d(rows, held_out)


def read_subset(path: str, loader: Loader, names: str | None) -> np.ndarray:
    """Sorted rows of a list of rows or names."""
    lines = _lines(path)
    if all(line.isdecimal() for line in lines):
        rows = np.array([int(line) for line in lines])
        if rows.max() >= loader.samples:
            raise ValueError(f"{path} has row {rows.max()}: {loader.path} has rows 0 to {loader.samples - 1}")
    else:
        if not names:
            raise ValueError(
                f"{path} holds names ({lines[0]!r}) and a .beton has none: give --names, the list of "
                "all its images in its order, or convert the subset to a .beton of its own (--subset "
                "all)"
            )
        known = _names(names, loader)
        wanted = [Path(line.split()[0]).name for line in lines]
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"{len(missing)} names of {path} are not in {names}, such as {missing[0]!r}")
        rows = np.array([known[name] for name in wanted])
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"{path} has {len(rows) - len(np.unique(rows))} images twice")
    return np.sort(rows)


def _names(path: str, loader: Loader) -> dict[str, int]:
    """File name without folders -> row; labels and folders in the list are checked against the .beton."""
    lines, labels = [line.split() for line in _lines(path)], loader.labels()
    if len(lines) != loader.samples:
        raise ValueError(
            f"{path} has {len(lines)} names and {loader.path} {loader.samples} images: is it the list "
            "that the file was converted from?"
        )
    names = loader.classes or []
    for row, (words, label) in enumerate(zip(lines, labels.tolist())):
        folder = Path(words[0]).parent.name
        given = int(words[1]) if len(words) > 1 and words[1].isdecimal() else None
        given = names.index(folder) if given is None and folder in names else given
        if given not in (None, label):
            raise ValueError(
                f"{path}, line {row + 1}: {words[0]} is of class {given}, and row {row} of {loader.path} "
                f"of class {label}: the list is in another order"
            )
    known = {Path(words[0]).name: row for row, words in enumerate(lines)}
    if len(known) < len(lines):
        raise ValueError(
            f"{path} has {len(lines) - len(known)} file names twice, in several folders: give --subset as rows"
        )
    return known


def _lines(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    if not lines:
        raise ValueError(f"{path} lists no image")
    return lines
