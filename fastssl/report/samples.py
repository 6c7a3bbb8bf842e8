"""The report's pictures of data and features: views, nearest neighbours and maps, of a few images of the files.

All runs on a file show the same images.  Each part is a function that returns HTML, or raises where it cannot.
"""

from __future__ import annotations

import argparse
import base64
import io
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastssl import pictures
from fastssl.eval import knn, maps
from fastssl.eval.common import features
from fastssl.eval.common.search import nearest
from fastssl.eval.common.target import load_target
from fastssl.eval.options import add_target_options
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.report import cards, charts
from fastssl.report.run_data import RunData
from fastssl.sampler import Sampler

ROWS = 6  # images on a sheet
COLUMNS = 12  # views on a sheet, at most
NEIGHBOURS = 8
K = 20  # of the baselines' kNN
PIXELS = 64  # largest side of the pixel baseline


def views(run: RunData, args: argparse.Namespace) -> str:
    """Some whole training images, and their views in the first epochs."""
    path = _file(args.train or run.setting("data.train"), "--train")
    recipe = tuple(View(**{k: v for k, v in view.items() if k != "type"}) for view in run.setting("data.views", ()))
    if not recipe:
        raise ValueError("config.json names no views")
    rows = maps.sample(_samples(path, args), ROWS)
    batch = pictures.first_rows(path, rows, device=args.device, workers=args.workers)
    epochs = max(1, min(3, COLUMNS // len(recipe)))
    grid = pictures.view_rows(batch, recipe[:COLUMNS], run.setting("seed", 0), epochs)
    names = ["image"] + [f"view {v + 1}, epoch {e + 1}" for e in range(epochs) for v in range(len(recipe[:COLUMNS]))]
    lines = [
        [_tile(tile, f"image {row}: {name}", " first" * (name == "image")) for tile, name in zip(tiles, names)]
        for row, tiles in zip(rows, grid)
    ]
    left_out = f" (the first {COLUMNS} of {len(recipe)})" if len(recipe) > COLUMNS else ""
    return _sheet(
        lines,
        f"Images of {Path(path).name}, each whole and then as its {len(recipe)} "
        f"view{'s' * (len(recipe) > 1)}{left_out} of the first {epochs} epoch{'s' * (epochs > 1)}.",
    )


class SmallPixels(nn.Module):
    """Pixels of images at PIXELS x PIXELS: 1,000 images of 224 would be 0.6 GB."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=PIXELS, mode="area").flatten(1)


class Features:
    """Features of `args.points` images of a run's test file (its training file, if it names none)."""

    def __init__(
        self, run: RunData, args: argparse.Namespace, kind: Literal["weights", "untrained", "pixels"] = "weights"
    ) -> None:
        parser = argparse.ArgumentParser()
        add_target_options(parser)
        options = parser.parse_args([str(run.folder), "--batch", str(min(args.batch, args.points))])
        options.device, options.workers, options.train, options.test = args.device, args.workers, args.train, args.test
        options.features = kind
        which = "test" if args.test or run.setting("data.test") else "train"
        self.path = _file(getattr(args, which) or run.setting(f"data.{which}"), f"--{which}")
        self.target = load_target(options, (which,))
        loader = self.target.loader(self.path)
        self.names, self.args, self.run = loader.classes, args, run
        self.rows = maps.sample(loader.samples, min(args.points, loader.samples))
        self.x, labels = self._extract()
        self.labels = labels.numpy() if labels.ndim == 1 else np.full(len(labels), -1)

    def _extract(self) -> tuple[Tensor, Tensor]:
        extractor = self.target.extractor()
        if isinstance(extractor.backbone, features.Pixels) and self.target.view.size > PIXELS:
            extractor = replace(extractor, backbone=SmallPixels())
        x, labels = (p.cpu() for p in features.extract_rows(extractor, self.target.loader(self.path), self.rows))
        if not x.isfinite().all():
            raise ValueError("some features are NaN or infinite: the training diverged")
        return x, labels

    def name(self, label: int) -> str:
        if label < 0:
            return "no class"
        return str(self.names[label]) if self.names and label < len(self.names) else f"class {label}"

    def accuracy(self) -> float:
        """kNN accuracy in percent, leaving one out, of the images with a label."""
        known = self.labels >= 0
        y = torch.from_numpy(self.labels[known])
        return knn.knn(self.x[torch.from_numpy(known)], y, k=(min(K, len(y) - 1),))["results"][0]["top1"]

    def baselines(self) -> str:
        """kNN accuracy of the network, the untrained network and pixels, and the frequency of the largest class."""
        known = self.labels[self.labels >= 0]
        counts = np.unique(known, return_counts=True)[1]
        if len(counts) < 2:
            return ""
        found: list[tuple[str, float | None]] = [
            ("this network", self.accuracy()),
            ("the same network, untrained", Features(self.run, self.args, "untrained").accuracy()),
            ("pixels", Features(self.run, self.args, "pixels").accuracy()),
        ]
        found.append(("chance (the largest class)", 100 * counts.max() / counts.sum()))
        return cards.baselines(
            found,
            f"kNN, top-1, k = {min(K, len(known) - 1)}, of {len(known):,} images of "
            f"{Path(self.path).name}, each by the others.",
        )

    def caption(self, label: int) -> str:
        return "" if label < 0 else self.name(label)

    def neighbours(self) -> str:
        """Some of the images with their nearest others by cosine similarity."""
        x = self.x
        some = np.arange(0, len(x), max(1, len(x) // (ROWS + 2)))[: ROWS + 2]
        similarity, found = nearest(x, x[some], min(NEIGHBOURS, len(x) - 1), exclude=torch.from_numpy(some))
        shown = np.concatenate([some[:, None], found.numpy()], 1)
        tiles = pictures.images(
            self.path, self.rows[shown.flatten()], self.target.view, device=self.args.device, workers=self.args.workers
        )
        tiles = tiles.view(*shown.shape, pictures.SIDE, pictures.SIDE, 3)
        lines = []
        for r, positions in enumerate(shown):
            first_label = self.labels[positions[0]]
            line = [
                _tile(
                    tiles[r, 0],
                    f"image {self.rows[positions[0]]}, {self.name(first_label)}",
                    " first",
                    self.caption(first_label),
                )
            ]
            for c, position in enumerate(positions[1:]):
                label = self.labels[position]
                mark = "" if first_label < 0 or label < 0 else " same" if label == first_label else " other"
                relation = ", the same class" if mark == " same" else ", another class" if mark else ""
                line.append(
                    _tile(
                        tiles[r, c + 1],
                        f"image {self.rows[position]}, {self.name(label)}{relation}, similarity {similarity[r, c]:.3f}",
                        mark,
                        self.caption(label),
                    )
                )
            lines.append(line)
        marked = ""
        if (self.labels >= 0).any():
            same = np.array([self.labels[positions[1:]] == self.labels[positions[0]] for positions in shown])
            marked = (
                f" The class is below each image; a frame and a cross mark another class than that of the first image: "
                f"{100 * same.mean():.0f} % have the same."
            )
        return _sheet(
            lines,
            f"An image and its nearest among {len(x):,} of {Path(self.path).name}, by cosine "
            f"similarity of the features.{marked}",
        )

    def map(self, method: str) -> str:
        xy, facts = maps.project(self.x, method)
        note = {
            "pca": f"{facts.get('variance_%', 0):g} % of the variance",
            "tsne": f"perplexity {facts.get('perplexity', 0):g}; distances between far groups mean nothing",
        }[method]
        title = f"{ {'pca': 'PCA', 'tsne': 't-SNE'}[method] } of {self.run.label}"
        if len(xy) <= maps.TRUST_POINTS:
            title += f", trustworthiness {maps.trustworthiness(self.x, xy):.1f} %"
        return charts.scatter(title, xy, self.groups(), f"{len(xy):,} images of {Path(self.path).name}; {note}.")

    def groups(self) -> list[tuple[str, str, np.ndarray]]:
        return maps.palette(self.labels, self.names)


def _file(path: str | None, option: str) -> str:
    if not path:
        raise ValueError(f"the run names no such file: give {option} NAME.beton")
    if not Path(path).is_file():
        raise ValueError(
            f"{path} does not exist: start the report in the folder of the training, or give {option} NAME.beton"
        )
    return path


def _samples(path: str, args: argparse.Namespace) -> int:
    return Loader(path, 1, Sampler.sequential(rank=0, world=1), device=args.device, workers=1).samples


def _sheet(lines: list[list[str]], about: str) -> str:
    columns = len(lines[0])
    inside = "".join("".join(line) for line in lines)
    return (
        f'<div class="scroll"><div class="sheet" style="--n:{columns - 1}">{inside}'
        f'</div></div><p class="about">{escape(about)}</p>'
    )


def _tile(pixels: Tensor, text: str, mark: str = "", caption: str = "") -> str:
    """An image of pixels (SIDE, SIDE, 3) in [0, 1], as JPEG or PNG, whichever is smaller; `text`: what it shows."""
    image = Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8))
    encoded = {}
    for kind, options in (("jpeg", {"quality": 88}), ("png", {"optimize": True})):
        out = io.BytesIO()
        image.save(out, kind, **options)
        encoded[kind] = out.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    data = base64.b64encode(encoded[kind]).decode()
    side, below = pictures.SIDE, f"<small>{escape(caption)}</small>" if caption else ""
    return (
        f'<span class="tile{mark}"><img src="data:image/{kind};base64,{data}" width="{side}" height="{side}" '
        f'alt="{escape(text)}" title="{escape(text)}">{below}</span>'
    )
