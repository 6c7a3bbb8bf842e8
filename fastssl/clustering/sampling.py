"""The order in which clustered samples are drawn, and losses weighted by the sizes of clusters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist


def uniform_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """(N,) int64 sample numbers in random order, equally many of every non-empty cluster; drawn with replacement from a
    cluster that is too small.  Samples with a label of -1 are left out."""
    random = np.random.Philox(key=[seed, epoch])
    kept = np.flatnonzero(labels >= 0)
    by_cluster = kept[np.lexsort((random.random_raw(len(kept)), labels[kept]))]  # shuffled within each cluster
    sizes = np.bincount(labels[kept])
    sizes = sizes[sizes > 0]
    quota = len(labels) // len(sizes) + 1
    chosen = np.broadcast_to(np.arange(quota), (len(sizes), quota))
    drawn = (random.random_raw(chosen.size) >> np.uint64(11)).reshape(chosen.shape) * 2.0**-53 * sizes[:, None]
    chosen = np.where(sizes[:, None] > quota, chosen, drawn.astype(np.int64))
    order = by_cluster[(np.cumsum(sizes) - sizes)[:, None] + chosen].ravel()
    return order[np.argsort(random.random_raw(len(order)), kind="stable")][: len(labels)]


def replacement_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """(N,) int64 sample numbers drawn with replacement."""
    words = np.random.Philox(key=[seed, epoch]).random_raw(samples) >> np.uint64(11)
    return (words * 2.0**-53 * samples).astype(np.int64)


def class_weights(counts: Tensor, power: float, eps: float) -> Tensor:
    """(K,) weights proportional to (count + eps) ** -power, with sum 1."""
    weights = (counts.double() + eps) ** -power
    return (weights / weights.sum()).float()


def target_weights(target: Tensor, weight: Tensor) -> Tensor:
    """(n,) weight of each target's class; 0 for a target of -1."""
    return torch.where(target >= 0, weight[target.clamp(min=0)], 0)


def total_weight(target: Tensor, weight: Tensor) -> Tensor:
    """0-dim sum of the weights of the global batch's targets, divided by the number of ranks."""
    return dist.mean(target_weights(target, weight).sum()).clamp(min=1e-30)


def weighted_mean(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """0-dim sum of this rank's values (n,), weighted by class, over `total_weight`: the mean over ranks is that of the
    global batch."""
    weight = weight.to(values.dtype)
    return (target_weights(target, weight) * values).sum() / total_weight(target, weight)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`weighted_mean` of the cross entropies of logits (n, K); targets of -1 are ignored."""
    return weighted_mean(F.cross_entropy(logits, target.clamp(min=0), reduction="none"), target, weight)
