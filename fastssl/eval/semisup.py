"""Semi-supervised classification: the network fine-tuned on 1 % or 10 % of the labels (OpenSelfSup's protocol).

Nine trainings: three rates of the backbone times three multiples of it for the head.  The published figure is the best
of the nine on the TEST SET ("selected_on=test").  The second row ("selected_on=held-out") is the setting that is best
on held-out labelled images, for which the nine trainings are repeated on the other labelled images.  With --out, a
command that was stopped continues with the trainings that are not finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from fastssl import dist
from fastssl.config import Optim
from fastssl.eval.common import cache, finetuning
from fastssl.eval.common.stored_results import StoredResults
from fastssl.eval.common.target import EvalTarget
from fastssl.files import untrusted
from fastssl.loader import Loader
from fastssl.parsing import settings_text
from fastssl.sampler import permutation

NEEDS = ("train", "test")
RATES, HEAD_MULTS = (0.001, 0.01, 0.1), (1.0, 10.0, 100.0)
WEIGHT_DECAY: dict[float, float] = {1: 5e-4, 10: 1e-4}  # by percent of the labels


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    rates = args.lr or ((0.01,) if target.spec.sobel else RATES)
    mults = args.head_mult or ((1.0,) if target.spec.sobel else HEAD_MULTS)
    _check(args, rates, mults)
    grid = list(itertools.product(rates, mults))
    trainings = Trainings(target, args, len(grid))
    cells = []
    for lr, mult in grid:
        cell = {"lr": lr, "head_mult": mult, **trainings.accuracy(lr, mult, False)}
        if len(trainings.held_out):
            cell["held_out_top1"] = trainings.accuracy(lr, mult, True)["top1"]
        cells.append(cell)
        dist.print_main(settings_text(cell))
    trainings.stored.remove()
    rows = [{"percent": trainings.percent, **row} for row in results(cells)]
    return {"protocol": "semisup", "options": trainings.options(), "results": rows, "selection": cells}


class Trainings:
    """Trainings of one network on the same labelled images with several rates.  Finished ones are stored on disk."""

    def __init__(self, target: EvalTarget, args: argparse.Namespace, settings: int):
        """`settings`: number of pairs of rates, for the progress in the printed lines."""
        self.target, self.args = target, args
        self.loader = finetuning.training_loader(target, args.train_batch)
        self.evaluation_loader, self.test = target.loader(target.train), target.loader(target.test)
        self.classes = finetuning.count_classes(self.loader)
        self.rows, self.percent = labelled(self.loader, args)
        self.optim = base_optim(args, self.percent)
        labels = finetuning.class_labels(self.loader)
        self.held_out, self.not_held_out = split(self.rows, labels, args.held_out, args.seed)
        self.total = settings * (2 if len(self.held_out) else 1)
        self.stored = StoredResults(args.out, self._facts())
        if self.stored.done:
            dist.print_main(f"{len(self.stored.done)} of {self.total} trainings are read from {self.stored.path}")

    def accuracy(self, lr: float, mult: float, on_held_out: bool) -> dict:
        """Accuracy on the test set after training on all labelled images, or on the held-out ones after training on the
        others; see finetuning.accuracy."""
        name = f"lr={lr:g} head_mult={mult:g} tested on {'held-out images' if on_held_out else 'the test set'}"
        return self.stored.get(name, partial(self._train_and_test, name, lr, mult, on_held_out))

    def _train_and_test(self, name: str, lr: float, mult: float, on_held_out: bool) -> dict:
        progress = f"training {len(self.stored.done) + 1} of {self.total}, {name}, "
        view = self.target.view
        try:
            model = finetuning.train(
                self.target.backbone,
                self.loader,
                finetuning.training_view(view),
                finetuning.with_head_rate(self.optim, lr, mult),
                classes=self.classes,
                rows=self.not_held_out if on_held_out else self.rows,
                options=finetuning.TrainingOptions(seed=self.args.seed, name=progress),
            )
        except finetuning.Diverged:
            return {"top1": 0.0, "diverged": True}
        test, rows = (self.evaluation_loader, self.held_out) if on_held_out else (self.test, None)
        precision = self.args.precision
        return finetuning.accuracy(model, test, view, classes=self.classes, rows=rows, precision=precision)

    def _facts(self) -> dict:
        """What the results depend on, beside the rates."""
        return {
            "weights": cache.hash_weights(self.target.backbone),
            "data": [cache.hash_data(self.loader), cache.hash_data(self.test)],
            "backbone": dataclasses.asdict(self.target.spec),
            "view": dataclasses.asdict(self.target.view),
            "seed": self.args.seed,
            "optim": dataclasses.asdict(self.optim),
            "rows": self.rows.tolist(),
            "held_out": self.held_out.tolist(),
            "classes": self.classes,
        }

    def options(self) -> dict:
        """The settings, for the result file."""
        return {
            "percent": self.percent,
            "labelled": len(self.rows),
            "subset": self.args.subset or "drawn",
            **{key: getattr(self.optim, key) for key in ("epochs", "batch", "milestones", "gamma", "weight_decay")},
            "held_out": len(self.held_out),
            "seed": self.args.seed,
            "train": self.loader.samples,
            "test": self.test.samples,
            "classes": self.classes,
        }


def base_optim(args: argparse.Namespace, percent: float) -> Optim:
    """The optimizer's settings without the rates, for `percent` of the labels."""
    decay = args.weight_decay if args.weight_decay is not None else WEIGHT_DECAY.get(round(percent, 1))
    if decay is None:
        raise ValueError(
            f"{percent:g} % of the images are labelled, and a weight decay is published only for 1 % and 10 %: "
            "give --weight-decay"
        )
    return Optim(
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


def results(cells: list[dict]) -> list[dict]:
    """The best cell on the test set and, if cells have "held_out_top1", on held-out images; the first of equal ones."""
    keys = ("lr", "head_mult", "top1", "top5")
    chosen = [(on, key) for on, key in (("test", "top1"), ("held-out", "held_out_top1")) if key in cells[0]]
    best = [(on, max(cells, key=itemgetter(key))) for on, key in chosen]
    return [{"selected_on": on, **{key: cell[key] for key in keys if key in cell}} for on, cell in best]


def _check(args: argparse.Namespace, rates: tuple[float, ...], mults: tuple[float, ...]) -> None:
    if min(rates) <= 0 or min(mults) <= 0:
        raise ValueError(f"--lr {rates} and --head-mult {mults} must be positive")
    if args.epochs < 1 or not 0 <= args.held_out < 1:
        raise ValueError(f"--epochs {args.epochs} must be positive, --held-out {args.held_out} at least 0 and below 1")
    if args.subset not in (None, "all") and args.percent is not None:
        raise ValueError("--percent and --subset both choose the labelled images: give one of them")
    if args.names and args.subset in (None, "all"):
        raise ValueError("--names needs a --subset FILE that holds names: give both")
    if args.percent is not None and not 0 < args.percent <= 100:
        raise ValueError(f"--percent {args.percent} must be above 0 and at most 100")


def labelled(loader: Loader, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Sorted int64 rows of the labelled images in the file, and their percentage of all images."""
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
    """(held-out rows, other rows): `fraction` of the rows of each class, rounded, but at least one of each class is not
    held out."""
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
            f"--held-out {fraction:g} of {len(rows)} labelled images of {len(parts)} classes is less than one image "
            "per class: give --held-out 0 (no held-out row) or a larger fraction"
        )
    return held_out, np.setdiff1d(rows, held_out)


def read_subset(path: str, loader: Loader, names: str | None) -> np.ndarray:
    """Sorted rows of the file `path`, a list of rows or, with the list `names` of all images, of image names."""
    lines = _lines(path)
    if all(line.isdecimal() for line in lines):
        rows = np.array([int(line) for line in lines])
        if rows.max() >= loader.samples:
            raise ValueError(f"{path} has row {rows.max()}: {loader.path} has rows 0 to {loader.samples - 1}")
    else:
        if not names:
            raise ValueError(
                f"{path} has names ({lines[0]!r}), which a .beton does not: give --names, the list of all its images "
                "in its order, or convert the subset to another .beton (--subset all)"
            )
        known = _names(names, loader)
        wanted = [Path(line.split()[0]).name for line in lines]
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"{len(missing)} names of {path} are not in {names}, such as {missing[0]!r}")
        rows = np.array([known[name] for name in wanted])
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"{path} has {len(rows) - len(np.unique(rows))} images twice: remove the repetitions")
    return np.sort(rows)


def _names(path: str, loader: Loader) -> dict[str, int]:
    """{file name without folders: row}; labels and folders in the list are checked against the .beton."""
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
                f"{path}, line {row + 1}: {words[0]} has class {given}, but row {row} of {loader.path} has class "
                f"{label}: the list is in another order"
            )
    known = {Path(words[0]).name: row for row, words in enumerate(lines)}
    if len(known) < len(lines):
        raise ValueError(
            f"{path} has {len(lines) - len(known)} file names in several folders: give --subset as a list of rows"
        )
    return known


def _lines(path: str) -> list[str]:
    lines = untrusted.read_lines(path)
    if not lines:
        raise ValueError(f"{path} lists no image")
    return lines
