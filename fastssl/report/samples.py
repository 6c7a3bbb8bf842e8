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
from fastssl.eval.options import target_options
from fastssl.kernels.augment import View
from fastssl.report import cards, charts
from fastssl.report.run_data import RunData

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
    rows = maps.sample(pictures.loader(path, 1, args.device, 1).samples, ROWS)
    batch = pictures.first_rows(path, rows, device=args.device, workers=args.workers)
    epochs = max(1, min(3, COLUMNS // len(recipe)))
    grid = pictures.view_rows(batch, recipe[:COLUMNS], run.setting("seed", 0), epochs)
    names = ["image"] + [f"view {v + 1}, epoch {e + 1}" for e in range(epochs) for v in range(len(recipe[:COLUMNS]))]
    lines = [
        [_tile(tile, f"image {row}: {name}", " first" * (name == "image")) for tile, name in zip(tiles, names)]
        for row, tiles in zip(rows, grid)
    ]
    count = f"{len(recipe)} view{'s' * (len(recipe) > 1)}"
    count += f" (the first {COLUMNS} of {len(recipe)})" * (len(recipe) > COLUMNS)
    times = f"first {epochs} epoch{'s' * (epochs > 1)}"
    return _sheet(lines, f"Images of {Path(path).name}, each whole and then as its {count} of the {times}.")


class SmallPixels(nn.Module):
    """Pixels of images at PIXELS x PIXELS: 1,000 images of 224 would be 0.6 GB."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=PIXELS, mode="area").flatten(1)


class Features:
    """Features of `args.points` images of a run's test file (its training file, if it names none)."""

    def __init__(
        self, run: RunData, args: argparse.Namespace, kind: Literal["weights", "untrained", "pixels"] = "weights"
    ) -> None:
        given = {key: getattr(args, key) for key in ("device", "workers", "train", "test")}
        options = target_options(target=str(run.folder), batch=min(args.batch, args.points), features=kind, **given)
        which = "test" if args.test or run.setting("data.test") else "train"
        self.path = _file(getattr(args, which) or run.setting(f"data.{which}"), f"--{which}")
        self.target = load_target(options, (which,))
        loader = self.target.loader(self.path)
        self.names, self.args, self.run = loader.classes, args, run
        self.rows = maps.sample(loader.samples, min(args.points, loader.samples))
        extractor = self.target.extractor()
        if kind == "pixels" and self.target.view.size > PIXELS:
            extractor = replace(extractor, backbone=SmallPixels())
        self.x, labels = (part.cpu() for part in features.extract(extractor, loader, self.rows))
        features.check_finite(self.path, self.x)
        self.labels = labels.numpy() if labels.ndim == 1 else np.full(len(labels), -1)

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
        found = [
            ("this network", self.accuracy()),
            ("the same network, untrained", Features(self.run, self.args, "untrained").accuracy()),
            ("pixels", Features(self.run, self.args, "pixels").accuracy()),
            ("chance (the largest class)", 100 * counts.max() / counts.sum()),
        ]
        which = f"{len(known):,} images of {Path(self.path).name}"
        return cards.baselines(found, f"kNN, top-1, k = {min(K, len(known) - 1)}, of {which}, each by the others.")

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
        labels = self.labels[shown]
        same, known = labels == labels[:, :1], (labels >= 0) & (labels[:, :1] >= 0)
        lines: list[list[str]] = [[] for _ in shown]
        for r, c in np.ndindex(shown.shape):
            text, mark = f"image {self.rows[shown[r, c]]}, {self.name(labels[r, c])}", " first"
            if c:
                mark = "" if not known[r, c] else " same" if same[r, c] else " other"
                text += {" same": ", the same class", " other": ", another class", "": ""}[mark]
                text += f", similarity {similarity[r, c - 1]:.3f}"
            lines[r].append(_tile(tiles[r, c], text, mark, self.name(labels[r, c]) if labels[r, c] >= 0 else ""))
        about = f"An image and its nearest among {len(x):,} of {Path(self.path).name}, by cosine similarity."
        if (self.labels >= 0).any():
            about += " The class is below each image; a frame and a cross mark another class than that of the first"
            about += f" image: {100 * same[:, 1:].mean():.0f} % have the same."
        return _sheet(lines, about)

    def map(self, method: str) -> str:
        xy, facts = maps.project(self.x, method)
        note = {
            "pca": f"{facts.get('variance_%', 0):g} % of the variance",
            "tsne": f"perplexity {facts.get('perplexity', 0):g}; distances between far groups mean nothing",
        }[method]
        title = f"{'PCA' if method == 'pca' else 't-SNE'} of {self.run.label}"
        if len(xy) <= maps.TRUST_POINTS:
            title += f", trustworthiness {maps.trustworthiness(self.x, xy):.1f} %"
        return charts.scatter(title, xy, self.groups(), f"{len(xy):,} images of {Path(self.path).name}; {note}.")

    def groups(self) -> list[tuple[str, str, np.ndarray]]:
        return maps.palette(self.labels, self.names)


def _file(path: str | None, option: str) -> str:
    if not path:
        raise ValueError(f"the run names no such file: give {option} NAME.beton")
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: start the report in the folder of the training, or give {option}")
    return path


def _sheet(lines: list[list[str]], text: str) -> str:
    inside = "".join("".join(line) for line in lines)
    sheet = f'<div class="sheet" style="--n:{len(lines[0]) - 1}">{inside}</div>'
    return f'<div class="scroll">{sheet}</div>{charts.about(text)}'


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
