"""Terms of losses, statistics of the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist


def mean_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean cosine similarity of corresponding rows of p and z."""
    return F.cosine_similarity(p, z, dim=-1).mean()


def view_classification(logits: Tensor) -> dict[str, Tensor]:
    """Cross entropy and accuracy of logits (n, V, V), where the label of each view is its index."""
    n, count, _ = logits.shape
    logits, labels = logits.flatten(0, 1), torch.arange(count, device=logits.device).repeat(n)
    correct = (logits.detach().argmax(1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels), "top1": correct}


def standardize(z: Tensor) -> Tensor:
    """Batch norm without scale and shift over the samples of all ranks (as many on each), with exact gradients."""
    z = z - dist.mean(z.mean(0))
    return z * (dist.mean(z.square().mean(0)) + 1e-5).rsqrt()


def off_diagonal(c: Tensor) -> Tensor:
    """(n, n) -> (n (n - 1),): the off-diagonal entries."""
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def require_labels(method: str, classes: list | None) -> int:
    """The number of classes; ValueError without labels."""
    if not classes:
        raise ValueError(
            f"method {method!r} needs labels, but data.train has none: convert a labelled source, or choose a method "
            "that needs no labels"
        )
    return len(classes)
