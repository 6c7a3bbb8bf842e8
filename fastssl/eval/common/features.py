"""Features of a .beton file in file order, the same on every rank and for any number of ranks.

Layers: "last" is the backbone's pooled output; "stem", "layer1" to "layer4" (other networks: "stage1", ...) are maps,
pooled to at most 9216 dimensions as OpenSelfSup's extract.py does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.amp import autocast
from fastssl.backbones import evaluating
from fastssl.config import Precision
from fastssl.inference import forward_batches
from fastssl.kernels import Impl
from fastssl.kernels.augment import View, make_views
from fastssl.loader import Batch, Loader, free_memory

DIMS = 9216  # of a pooled map at most: https://arxiv.org/abs/1905.01235, "about 9,000"
# (side, grid): kernel, stride, padding of OpenSelfSup's MultiPooling, for a ResNet-50 at 224 pixels
WINDOWS = {(112, 12): (10, 10, 4), (56, 6): (16, 8, 0), (28, 4): (13, 5, 0), (14, 3): (8, 3, 0), (7, 2): (6, 1, 0)}


class Pixels(nn.Module):
    """A backbone without a network: features are the normalised pixels, the baseline that a network must beat."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dim = 3 * size * size

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def layers_of(backbone: nn.Module) -> tuple[str, ...]:
    """The names of the backbone's layers in order, "last" at the end."""
    names = [
        f"layer{i}" if hasattr(backbone, "layer4") else f"stage{i + 1}"
        for i in range(len(getattr(backbone, "stages", ())))
    ]
    return (*("stem" if name == "layer0" else name for name in names), "last")


def check_layers(backbone: nn.Module, layers: tuple[str, ...]) -> tuple[str, ...]:
    known = layers_of(backbone)
    wrong = [name for name in layers if name not in known]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers={','.join(layers)}: {'no ' + wrong[0] if wrong else 'each once'}; this backbone has "
            f"{', '.join(known)}"
        )
    return tuple(layers)


def pooled(x_BCHW: Tensor) -> Tensor:
    """(B, C, g, g): g the largest with C g^2 <= 9216 that the map has; a ResNet-50 at 224 pixels gets 12, 6, 4, 3, 2
    and OpenSelfSup's overlapping windows, any other map adaptive average pooling."""
    side = min(x_BCHW.shape[2:])
    grid = min(side, max(1, math.isqrt(DIMS // x_BCHW.shape[1])))
    window = WINDOWS.get((side, grid))
    return F.avg_pool2d(x_BCHW, *window) if window else F.adaptive_avg_pool2d(x_BCHW, grid)


def forward(backbone: nn.Module, x: Tensor, layers: tuple[str, ...]) -> list[Tensor]:
    """(B, dim) for "last", (B, C, g, g) for maps, of one pass through the network (timm's: one more for "last")."""
    if layers == ("last",):
        return [backbone(x)]
    maps = dict(zip(layers_of(backbone), backbone.forward_stages(x)))
    if "last" in layers:
        is_resnet = hasattr(backbone, "avgpool")
        maps["last"] = backbone.avgpool(maps["layer4"]).flatten(1) if is_resnet else backbone(x)
    return [maps[name] if name == "last" else pooled(maps[name]) for name in layers]


@dataclass(frozen=True, eq=False)
class Extractor:
    """Computes features of images: a backbone, its input view and the layers to read."""

    backbone: nn.Module
    view: View
    layers: tuple[str, ...] = ("last",)
    precision: Precision = "fp32"
    kernels: Impl = "auto"

    def __call__(self, batch: Batch) -> list[Tensor]:
        """float32 (B, dim) of each layer; the backbone must be in evaluation mode."""
        (x,) = make_views(batch.pixels, batch.sizes, batch.index, (self.view,), seed=0, epoch=0, impl=self.kernels)
        return self.of_images(x)

    def of_images(self, x: Tensor) -> list[Tensor]:
        """As for a batch, of normalised images (B, 3, H, W)."""
        with autocast(x.device, self.precision):
            return [part.float().flatten(1) for part in forward(self.backbone, x, self.layers)]

    @cached_property
    def shapes(self) -> list[torch.Size]:
        """Of one image's features in each layer, before flattening: (dim,) or (C, g, g)."""
        device = next((p.device for p in self.backbone.parameters()), None)
        x = torch.zeros(1, 3, self.view.size, self.view.size, device=device)
        with torch.no_grad(), evaluating(self.backbone):
            return [part.shape[1:] for part in forward(self.backbone, x, self.layers)]

    @property
    def dims(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def batches(
        self, loader: Loader, start: int = 0, stop: int | None = None, order: np.ndarray | None = None
    ) -> Iterator[tuple[Batch, list[Tensor]]]:
        """(batch, features) of this rank for the loader's steps from `start` to before `stop`; of 0 rows where it has
        no images in a step."""
        with evaluating(self.backbone):
            yield from forward_batches(self, loader, start=start, stop=stop, order=order)


def extract(extractor: Extractor, loader: Loader, rows: np.ndarray | None = None) -> tuple[Tensor, ...]:
    """float32 features (N, dim) of each layer, then labels (N,) or (N, C), of all samples of `loader`, or of the N
    different samples `rows` alone, in the order of the file.

    `loader` has the sampler Sampler.sequential(); each rank computes its shard and every rank gets all.  The features
    are not normalised, and on the loader's device, where N * dim * 4 bytes must fit twice.
    """
    check_loader(loader)
    rows = np.arange(loader.samples) if rows is None else np.sort(rows)
    stop, order = -(-len(rows) // loader.batch), np.resize(rows, loader.samples)
    found = [(*x, batch.label, batch.index) for batch, x in extractor.batches(loader, stop=stop, order=order)]
    *parts, index = (dist.gather_ragged(torch.cat(part)) for part in zip(*found))
    samples, first = np.unique(index.cpu().numpy(), return_index=True)  # the last batch is filled up with repetitions
    if len(index) != min(stop * loader.batch, loader.samples) or not np.array_equal(samples, rows):
        raise ValueError(
            f"{loader.path}: the ranks gave {len(samples)} samples that are not the {len(rows)} of the evaluation; "
            "were all given the same file?"
        )
    return tuple(part[torch.from_numpy(first).to(part.device)] for part in parts)


def check_loader(loader: Loader) -> None:
    if loader.sampler.shuffle or loader.sampler.drop_last:
        raise ValueError("features need a Loader with shuffle=False, drop_last=False: every sample exactly once")


def check_memory(loader: Loader, dims: int) -> None:
    """ValueError on all ranks when a table of the file's rows x `dims` floats does not fit on one of them."""
    need, free = 4 * dims * loader.samples, free_memory(loader.device)
    if dist.sum_(torch.tensor([float(need > free)], device=dist.device())).item():
        raise ValueError(
            f"features of {loader.path} need {need / 2**30:.1f} GiB on {loader.device}, and a rank has "
            f"less (this one {free / 2**30:.1f} GiB): take fewer --layers, or eval extract --to npy, "
            "which holds one shard at a time"
        )


def check_features(name: str, features: Tensor, labels: Tensor) -> None:
    """ValueError for features and labels of which no accuracy can be computed; `name`: what they are, for the error."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: {len(features)} samples of shape {tuple(features.shape)}; need (N, dim) with N > 0")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"{name}: labels are {labels.dtype} of shape {tuple(labels.shape)}; this protocol needs one "
            "class for each sample, multi-label data has none"
        )
    if len(labels) != len(features):
        raise ValueError(f"{name}: {len(features)} features and {len(labels)} labels")
    if (labels < 0).any():
        raise ValueError(f"{name}: {int((labels < 0).sum())} of {len(labels)} samples have no label (-1)")
    check_finite(name, features)


def check_finite(name: str, features: Tensor, first: int = 0) -> None:
    """ValueError where features (N, dim) are NaN or infinite; `first`: the number of row 0, for the error."""
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(features)} features are NaN or infinite (first: sample "
            f"{first + int(bad.nonzero()[0])}): the training diverged, or precision is too low"
        )
