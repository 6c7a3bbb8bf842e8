"""What is evaluated, from the options of the command: a backbone with its weights, its view, the data."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import backbones, dist, views, weights
from fastssl.config import Backbone
from fastssl.eval.common import cache, features
from fastssl.eval.common.classes import Labelled, match
from fastssl.eval.common.features import Extractor
from fastssl.files.datacard import DataCard
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.sampler import Sampler
from fastssl.weights.options import backbone_from


@dataclass
class EvalTarget:
    """A backbone on the device and the files to evaluate it on.  `weights`: where its tensors come from, in words;
    `run`: the config of its run, None for a weight file."""

    backbone: nn.Module
    spec: Backbone
    view: View
    weights: str
    run: dict | None
    train: str  # "": the protocol reads none, and none is given
    test: str
    args: argparse.Namespace
    class_numbers: np.ndarray | None = None  # class in `train` of each class of `test`, where they differ
    classes: list[str] | None = None  # of `train`

    def loader(self, path: str) -> Loader:
        """In file order; the labels of the test file are class numbers of the training file once they are matched."""
        loader = _loader(path, self.args)
        if self.class_numbers is not None and self.classes is not None and path == self.test:
            loader.relabel(self.class_numbers, self.classes)
        return loader

    def match_classes(self, labelled: Labelled) -> None:
        """Number the classes of the test file as in the training file (classes.match)."""
        train, test = self.loader(self.train), self.loader(self.test)
        match(train, test, labelled)
        self.class_numbers, self.classes = test.class_numbers, train.classes

    def features(self, path: str, layers: tuple[str, ...] = ("last",)) -> tuple[Tensor, ...]:
        """float32 features (N, dim) of each layer, then labels (N,) or (N, C), of a file, the same on all ranks:
        `x, y = target.features(path)`.  Computed once; then read from the cache (see cache.py)."""
        extractor, loader, folder = self.extractor(layers), self.loader(path), self.cache_folder()
        if folder is not None:
            return cache.load_or_extract(folder, extractor, loader, self.weights)
        features.check_memory(loader, 2 * sum(extractor.dims))  # the rows in the ranks' order, and sorted
        return features.extract(extractor, loader)

    def extractor(self, layers: tuple[str, ...] = ("last",)) -> Extractor:
        layers = features.check_layers(self.backbone, layers)
        return Extractor(self.backbone, self.view, layers, self.args.precision)

    def cache_folder(self) -> Path | None:
        """Where features are stored: --cache, or features/ in the run's folder or beside the weight file; or None."""
        if self.args.cache:
            return Path(self.args.cache)
        if self.args.no_cache or self.args.features == "pixels" or not self.args.target:
            return None
        target = Path(self.args.target)
        return (self.run_folder() or (target if target.is_dir() else target.parent)) / "features"

    def run_folder(self) -> Path | None:
        """The folder of the run, also where one of its checkpoints is evaluated; None for a weight file."""
        target = Path(self.args.target or ".")
        if self.args.target is None or not target.is_dir():
            return None
        return next((p for p in (target, *target.parents[:2]) if (p / "config.json").is_file()), None)

    def describe(self) -> dict:
        return {
            "backbone": dataclasses.asdict(self.spec),
            "features": self.args.features,
            "weights": self.weights,
            "train": self.train or None,
            "test": self.test or None,
            "view": dataclasses.asdict(self.view),
            "precision": self.args.precision,
        }


def load_target(args: argparse.Namespace, needs: tuple[str, ...] | None, labelled: Labelled = "all") -> EvalTarget:
    """`needs`: which of "train" and "test" the protocol reads; None: it reads no .beton at all.  With both, their
    classes are matched (classes.match); `labelled`: which images must have a label."""
    if args.cache and args.no_cache:
        raise ValueError(f"--cache {args.cache} and --no-cache exclude each other: give one of them")
    if args.target and not Path(args.target).exists():
        raise ValueError(f"no run folder or weight file {args.target}")
    run = weights.run_config(args.target) if args.target else None
    data = run["data"] if run else {}
    files: dict[str, str] = {
        "train": args.train or data.get("bank") or data.get("train") or "",
        "test": args.test or data.get("test") or "",
    }
    missing = next((name for name in needs or () if not files[name]), None)
    if missing:
        raise ValueError(f"give --{missing} NAME.beton: {args.target or 'the command'} names none")
    spec = backbone_from(args, args.target)
    if spec is None and args.features != "pixels":
        raise ValueError("a weight file does not name its backbone: give --backbone NAME (and --stem, --norm, --width)")
    spec = spec or Backbone("resnet50")
    some = next((files[name] for name in (*(needs or ()), *files) if files[name]), "")
    if needs is not None and not some:
        raise ValueError(f"give --train or --test NAME.beton: {args.target or 'the command'} names none")
    view = _view(args, data, spec, None if needs is None else _loader(some, args).card)
    if args.features != "pixels" and needs is not None:
        backbones.check_sizes(spec, [view.size])
    backbone, source = _backbone(args, spec, view)
    target = EvalTarget(backbone.to(args.device), spec, view, str(source), run, files["train"], files["test"], args)
    if needs and len(needs) == 2:
        target.match_classes(labelled)
    return target


def _loader(path: str, args: argparse.Namespace) -> Loader:
    batch = args.batch * dist.world()
    return Loader(path, batch, Sampler.sequential(), device=args.device, workers=args.workers)


def _view(args: argparse.Namespace, data: dict, spec: Backbone, card: DataCard | None) -> View:
    default: dict[str, Any] = {"size": 224 if spec.stem == "imagenet" else 32}
    fields: dict[str, Any] = data.get("eval_view") or next(iter(data.get("views", ())), default)
    changes = {key: getattr(args, key) for key in ("size", "mean", "std") if getattr(args, key) is not None}
    try:
        view = View(**{key: value for key, value in fields.items() if key != "type"})
    except TypeError as error:  # of another version, or written by hand
        raise ValueError(f"{args.target}: config.json has a view that this version does not: {error}") from None
    if not data.get("eval_view"):  # the default for the size, whatever crops the training uses
        plain = {key: changes.pop(key) for key in ("size",) if key in changes}
        view = views.default_view(View(**{"size": view.size, **plain, "mean": view.mean, "std": view.std}), card)
    if args.resize is not None:
        changes["resize"] = args.resize or None
    return dataclasses.replace(view, **changes)


def _backbone(args: argparse.Namespace, spec: Backbone, view: View) -> tuple[nn.Module, object]:
    """The module and where its weights come from, in words (as `str`)."""
    if args.features == "pixels":
        return features.Pixels(view.size), "normalised pixels"
    torch.manual_seed(args.seed)
    backbone = backbones.build(spec)
    if args.features == "untrained":
        return backbone, f"an untrained {spec.name}, seed {args.seed}"
    if args.target is None:
        raise ValueError("give a run folder or a weight file, or --features untrained or pixels")
    report = weights.load_backbone(args.target, backbone, prefix=args.prefix, which=args.which)
    return backbones.channels_last_(backbone), report
