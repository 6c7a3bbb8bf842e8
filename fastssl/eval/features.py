"""Features of a whole .beton file in file order, the same on every rank however many ranks computed them; the checks
that every protocol needs; and how a prediction counts as right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.amp import DTYPES
from fastssl.backbones import evaluating
from fastssl.kernels.views import View, make_views


class Pixels(nn.Module):
    """The backbone that does nothing: features are the normalised pixels, the baseline that a network must beat."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dim = 3 * size * size

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@torch.no_grad()
def extract(backbone: nn.Module, loader, view: View, *, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """float32 features (N, dim) and labels (N,) or (N, C) of all samples of `loader`, row i for sample i.

    `loader` is a Loader with shuffle=False, drop_last=False; each rank computes its share and every rank gets all.
    Not normalised.  On the loader's device, where N * dim * 4 bytes must fit twice.
    """
    if loader.shuffle or loader.drop_last:
        raise ValueError("features need a Loader with shuffle=False, drop_last=False: every sample exactly once")
    rows, labels, index = [], [], []
    dtype = DTYPES[precision]
    with evaluating(backbone):
        for batch in loader.epoch(0):
            x = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=0, epoch=0)[0]
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                rows.append(backbone(x).float())
            labels.append(batch.label)
            index.append(batch.index)
    if not rows:  # a rank may have no share of a small file; the others' shapes are needed to gather
        rows, labels, index = _no_rows(backbone, loader)
    features, labels, index = (dist.gather_ragged(torch.cat(part)) for part in (rows, labels, index))
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(loader.samples, device=index.device)):
        raise ValueError(f"{loader.path}: the loader gave {len(index)} samples that are not 0 to {loader.samples - 1}, "
                         "each once; were all ranks given the same file?")  # fmt: skip
    return features[order], labels[order]


def _no_rows(backbone: nn.Module, loader):
    multi = loader.card.get("label") == "multi"
    labels = torch.zeros(0, len(loader.classes)) if multi else torch.zeros(0, dtype=torch.int64)
    parts = torch.zeros(0, backbone.dim), labels, torch.zeros(0, dtype=torch.int64)
    return [[part.to(loader.device)] for part in parts]


def check(name: str, features: Tensor, labels: Tensor) -> None:
    """Refuse what would give a number that means nothing."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: {len(features)} samples of shape {tuple(features.shape)}; need (N, dim) with N > 0")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"{name}: labels are {labels.dtype} of shape {tuple(labels.shape)}; this protocol needs one "
                         "class for each sample, multi-label data has none")  # fmt: skip
    if len(labels) != len(features):
        raise ValueError(f"{name}: {len(features)} features and {len(labels)} labels")
    if (labels < 0).any():
        raise ValueError(f"{name}: {int((labels < 0).sum())} of {len(labels)} samples have no label (-1)")
    bad = ~features.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{name}: {int(bad.sum())} of {len(features)} features are NaN or infinite (first: sample "
                         f"{int(bad.nonzero()[0])}): the training diverged, or precision is too low")  # fmt: skip


def hits(scores: Tensor, labels: Tensor, n: int) -> Tensor:
    """bool (..., B): is the label among the n best of scores (..., B, C)?  Of equal scores the lower class counts."""
    labels = labels.expand(scores.shape[:-1])[..., None]
    own = scores.gather(-1, labels)
    lower = torch.arange(scores.shape[-1], device=scores.device) < labels
    return ((scores > own) | ((scores == own) & lower)).sum(-1) < n
