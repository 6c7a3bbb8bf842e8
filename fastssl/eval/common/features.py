"""Features of a whole .beton file in file order, the same on every rank however many ranks computed them; the checks
that every protocol needs; and how a prediction counts as right.

Layers: "last" is the backbone's pooled output; "stem", "layer1" to "layer4" (other networks: "stage1", ...) are maps,
pooled to at most 9216 dimensions as OpenSelfSup's extract.py does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.amp import DTYPES
from fastssl.backbones import evaluating
from fastssl.kernels.augment import View, make_views
from fastssl.loader import free_memory

DIMS = 9216  # of a pooled map at most: https://arxiv.org/abs/1905.01235, "about 9,000"
# (side, grid): kernel, stride, padding of OpenSelfSup's MultiPooling, for a ResNet-50 at 224 pixels
WINDOWS = {(112, 12): (10, 10, 4), (56, 6): (16, 8, 0), (28, 4): (13, 5, 0), (14, 3): (8, 3, 0), (7, 2): (6, 1, 0)}


class Pixels(nn.Module):
    """The backbone that does nothing: features are the normalised pixels, the baseline that a network must beat."""

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
        whole = hasattr(backbone, "avgpool")
        maps["last"] = backbone.avgpool(maps["layer4"]).flatten(1) if whole else backbone(x)
    return [maps[name] if name == "last" else pooled(maps[name]) for name in layers]


def shapes(backbone: nn.Module, view: View, layers: tuple[str, ...]) -> list[torch.Size]:
    """Of one sample's features in each layer, before flattening: (dim,) or (C, g, g)."""
    device = next((p.device for p in backbone.parameters()), None)
    with torch.no_grad(), evaluating(backbone):
        return [
            part.shape[1:] for part in forward(backbone, torch.zeros(1, 3, view.size, view.size, device=device), layers)
        ]


def extract(
    backbone: nn.Module,
    loader,
    view: View,
    *,
    precision: str = "fp32",
    layers: tuple[str, ...] = ("last",),
    kernels: str = "auto",
) -> tuple[Tensor, ...]:
    """float32 features (N, dim) of each layer, then labels (N,) or (N, C), of all samples of `loader`; row i is sample
    i's.

    `loader` is a Loader with shuffle=False, drop_last=False; each rank computes its share and every rank gets all.
    Not normalised.  On the loader's device, where N * dim * 4 bytes must fit twice.
    """
    check_loader(loader)
    with evaluating(backbone):
        batches = [_of_batch(backbone, batch, view, layers, precision, kernels) for batch in loader.epoch(0)]
    batches = batches or [_no_rows(backbone, loader, view, layers)]  # of a small file a rank may have no share
    *parts, index = (dist.gather_ragged(torch.cat(part)) for part in zip(*batches))
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(loader.samples, device=index.device)):
        raise ValueError(
            f"{loader.path}: the loader gave {len(index)} samples that are not 0 to {loader.samples - 1}, "
            "each once; were all ranks given the same file?"
        )
    return tuple(part[order] for part in parts)


def extract_rows(
    backbone: nn.Module,
    loader,
    view: View,
    rows: np.ndarray,
    *,
    precision: str = "fp32",
    layers: tuple[str, ...] = ("last",),
) -> tuple[Tensor, ...]:
    """As `extract`, of the samples `rows` (different ones) alone, in the order of the file."""
    check_loader(loader)
    stop = -(-len(rows) // loader.batch)
    order = np.resize(rows, loader.samples)
    steps = [parts for _, parts in by_step(backbone, loader, view, layers, precision, stop=stop, order=order)]
    *parts, index = (dist.gather_ragged(torch.cat(part)) for part in zip(*steps))
    place = index.argsort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[place][1:] != index[place][:-1]  # the last batch is filled up with repetitions
    return tuple(part[place[first]] for part in parts)


def check_loader(loader) -> None:
    if loader.shuffle or loader.drop_last:
        raise ValueError("features need a Loader with shuffle=False, drop_last=False: every sample exactly once")


def check_memory(loader, dims: int) -> None:
    """ValueError on all ranks when a table of the file's rows x `dims` floats does not fit on one of them."""
    need, free = 4 * dims * loader.samples, free_memory(loader.device)
    if dist.sum_(torch.tensor([float(need > free)], device=dist.device())).item():
        raise ValueError(
            f"features of {loader.path} need {need / 2**30:.1f} GiB on {loader.device}, and a rank has "
            f"less (this one {free / 2**30:.1f} GiB): take fewer --layers, or eval extract --to npy, "
            "which holds one shard at a time"
        )


def by_step(
    backbone: nn.Module,
    loader,
    view: View,
    layers: tuple[str, ...],
    precision: str,
    start: int = 0,
    stop: int | None = None,
    order: np.ndarray | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """(step, [features (n, dim) of each layer, labels, index]) of this rank for the loader's steps from `start` to
    before `stop`; n may be 0.  Nothing before `start` is decoded."""
    pending = None
    with evaluating(backbone), contextlib.closing(loader.epoch(0, start, order)) as source:
        for step in range(start, loader.steps if stop is None else stop):
            pending = next(source, None) if pending is None else pending
            if pending is not None and pending.step == step:
                yield step, _of_batch(backbone, pending, view, layers, precision)
                pending = None
            else:  # this rank has no share of a small last batch
                yield step, _no_rows(backbone, loader, view, layers)


@torch.no_grad()
def _of_batch(
    backbone: nn.Module, batch, view: View, layers: tuple[str, ...], precision: str, kernels: str = "auto"
) -> list[Tensor]:
    x = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=0, epoch=0, impl=kernels)[0]
    return [*of_view(backbone, x, layers, precision), batch.label, batch.index]


@torch.no_grad()
def of_view(backbone: nn.Module, x: Tensor, layers: tuple[str, ...], precision: str) -> list[Tensor]:
    """float32 (B, dim) of each layer for images (B, 3, H, W); `backbone` is in evaluation mode."""
    dtype = DTYPES[precision]
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return [part.float().flatten(1) for part in forward(backbone, x, layers)]


def _no_rows(backbone: nn.Module, loader, view: View, layers: tuple[str, ...]) -> list[Tensor]:
    multi = loader.card.get("label") == "multi"
    labels = torch.zeros(0, len(loader.classes)) if multi else torch.zeros(0, dtype=torch.int64)
    rows = [torch.zeros(0, shape.numel()) for shape in shapes(backbone, view, layers)]
    return [part.to(loader.device) for part in (*rows, labels, torch.zeros(0, dtype=torch.int64))]


def check(name: str, features: Tensor, labels: Tensor) -> None:
    """Refuse what would give a number that means nothing."""
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
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(features)} features are NaN or infinite (first: sample "
            f"{int(bad.nonzero()[0])}): the training diverged, or precision is too low"
        )


def hits(scores: Tensor, labels: Tensor, n: int) -> Tensor:
    """bool (..., B): is the label among the n best of scores (..., B, C)?  Of equal scores the lower class counts."""
    labels = labels.expand(scores.shape[:-1])[..., None]
    own = scores.gather(-1, labels)
    lower = torch.arange(scores.shape[-1], device=scores.device) < labels
    return ((scores > own) | ((scores == own) & lower)).sum(-1) < n
