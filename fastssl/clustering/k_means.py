"""Lloyd's k-means on the device, over the rows of all ranks, and the split of one cluster into two.

Starting centroids are drawn by (seed, sample): any number of ranks gives the clusters of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist
from fastssl.clustering.rows import blocks, find_rows
from fastssl.kernels import Impl, update_centroids_


class Clusters(NamedTuple):
    centroids: Tensor  # (K, D)
    labels: Tensor  # (n_r,) int64 of this rank's rows
    counts: Tensor  # (K,) int64 over all ranks
    objective: float  # sum over all rows of the squared distance to their centroid


def check_clusters(clusters: int, samples: int, min_size: int = 1) -> None:
    """ValueError for more clusters than the data can fill with `min_size` samples each."""
    if clusters < 1 or clusters * min_size > samples:
        raise ValueError(
            f"method.clusters={clusters} of {min_size} or more samples each cannot be made of the {samples} "
            f"samples of data.train: set method.clusters to at most {max(1, samples // min_size)}"
        )


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm: `KMeans(clusters=100).fit(x, index)`."""

    clusters: int
    iterations: int = 20
    seed: int = 0
    spherical: bool = False  # centroids of unit length, compared by dot product; rows should have unit length
    # An empty cluster takes half of a large one, as in faiss, and after the last iteration the farthest row ("split"),
    # or keeps its centroid and stays empty ("keep").
    empty: Literal["split", "keep"] = "split"
    backend: Literal["torch", "faiss"] = "torch"  # faiss runs on the CPU of rank 0
    kernels: Impl = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("torch", "faiss"):
            raise ValueError(f"backend={self.backend!r} is neither 'torch' nor 'faiss'")

    def fit(self, x: Tensor, index: Tensor | None = None) -> Clusters:
        """The clusters of the rows x (n_r, D) of all ranks, whose sample numbers are index (n_r,)."""
        samples = int(dist.sum_(torch.tensor(len(x), device=x.device)))
        check_clusters(self.clusters, samples)
        index = torch.arange(samples, device=x.device) if index is None else index
        if self.backend == "faiss":
            centroids = _faiss(x, index, self)
        else:
            centroids = _start(x, self.clusters, index, samples, self.seed)
            for _ in range(self.iterations):
                labels = assign(x, centroids, self.spherical)[0]
                centroids = self.update(x, labels, centroids)
        for repairs in range(11):  # equal rows fill one cluster: with too few distinct rows some stay empty
            labels, distances = assign(x, centroids, self.spherical)
            counts = count(labels, self.clusters)
            unused = (counts == 0).nonzero()[:, 0]
            if not len(unused) or self.empty == "keep" or repairs == 10:
                break
            centroids = centroids.index_copy(0, unused, _farthest(x, distances, index, len(unused), samples))
        return Clusters(centroids, labels, counts, float(dist.sum_(distances.double().sum())))

    def update(self, x: Tensor, labels: Tensor, old: Tensor) -> Tensor:
        """(K, D) new centroids of the rows x with `labels`, from the centroids `old`."""
        new, counts = means(x, labels, old, self.kernels)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty) and self.empty == "split":
            large = counts.argsort(descending=True, stable=True)[: len(old) - len(empty)][: len(empty)]
            # As in faiss, but one of the halves keeps the centroid: a row on the centroid would be equally far from
            # both, and rounding, which depends on the number of rows of a rank, would choose its label.
            nudge = 1 + torch.where(torch.arange(x.shape[1], device=x.device) % 2 == 0, 1, -1) / 512
            new[empty[: len(large)]] = new[large] * nudge
        return F.normalize(new, dim=1) if self.spherical else new


def assign(x: Tensor, centroids: Tensor, spherical: bool = False) -> tuple[Tensor, Tensor]:
    """(n,) int64 nearest centroid of each row, the first of equally near ones, and (n,) squared distances to it."""
    half = torch.zeros_like(centroids[:, 0]) if spherical else centroids.square().sum(1) / 2
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part, out in zip(blocks(x, len(centroids)), blocks(labels, len(centroids))):
        torch.argmax(torch.addmm(-half, part, centroids.T), 1, out=out)
    distances = torch.cat(
        [
            (part - centroids[own]).square().sum(1)
            for part, own in zip(blocks(x, x.shape[1]), blocks(labels, x.shape[1]))
        ]
    )
    return labels, distances


def count(labels: Tensor, clusters: int) -> Tensor:
    """(K,) int64 rows of each label over all ranks; labels below 0 are ignored."""
    return dist.sum_(torch.bincount(labels[labels >= 0], minlength=clusters))


def describe(counts: Tensor, samples: int) -> str:
    """The number and sizes of the clusters, for the log."""
    sizes = counts[counts > 0]
    unassigned = samples - int(counts.sum())
    return (
        f"{len(counts)} clusters, {len(counts) - len(sizes)} empty, the others of {int(sizes.min())} to "
        f"{int(sizes.max())} samples" + f"; {unassigned} samples in none" * bool(unassigned)
    )


def means(x: Tensor, labels: Tensor, old: Tensor, kernels: Impl = "auto") -> tuple[Tensor, Tensor]:
    """(K, D) means of the rows of each label over all ranks, `old` for a label without rows, and (K,) counts."""
    counts = torch.bincount(labels, minlength=len(old))
    own = update_centroids_(old.clone(), x, labels, impl=kernels)
    if dist.world() == 1:
        return own, counts
    sums = dist.sum_(own * counts[:, None])
    counts = dist.sum_(counts)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], old), counts


def _farthest(x: Tensor, distances: Tensor, index: Tensor, wanted: int, samples: int) -> Tensor:
    """The `wanted` rows of all ranks farthest from their centroids; of equally far ones those of the first samples."""
    far, numbers = _by_distance(distances, index, wanted)
    far, numbers = _by_distance(dist.gather_ragged(far), dist.gather_ragged(numbers), wanted)
    return find_rows(x, index, numbers, samples)


def _by_distance(distances: Tensor, index: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    order = index.argsort()
    order = order[distances[order].argsort(descending=True, stable=True)][:wanted]
    return distances[order], index[order]


def _start(x: Tensor, clusters: int, index: Tensor, samples: int, seed: int) -> Tensor:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))  # on the CPU: the same everywhere
    return find_rows(x, index, order[:clusters].to(x.device), samples)


def _faiss(x: Tensor, index: Tensor, options: KMeans) -> Tensor:
    try:
        import faiss
    except ImportError:
        raise ValueError("backend='faiss' needs faiss: pip install faiss-cpu, or use backend='torch'") from None
    all_rows = dist.gather_ragged(x)[dist.gather_ragged(index).argsort()]
    centroids = x.new_zeros(options.clusters, x.shape[1])
    if dist.is_main():
        found = faiss.Kmeans(
            x.shape[1],
            options.clusters,
            niter=options.iterations,
            seed=options.seed,
            spherical=options.spherical,
            max_points_per_centroid=10**7,
            min_points_per_centroid=1,
        )
        found.train(all_rows.float().cpu().numpy())
        centroids.copy_(torch.from_numpy(found.centroids))
    return dist.broadcast_(centroids)


def two_means(x: Tensor, min_size: int) -> Tensor:
    """bool (n,): which rows are in the second of two clusters, each of at least `min_size` rows (n >= 2 min_size).

    Starts with the rows on the two sides of the mean along the first principal axis.  If k-means leaves a cluster that
    is too small, the rows are split at the median along that axis.
    """
    centred = x - x.mean(0)
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(10):  # power iteration; it need not converge
        axis = F.normalize(centred.T @ (centred @ axis), dim=0)
    along = centred @ axis
    second = along > 0
    for _ in range(20):
        if not min_size <= int(second.sum()) <= len(x) - min_size:
            break
        centroids = torch.stack([x[~second].mean(0), x[second].mean(0)])
        before, second = second, assign(x, centroids)[0].bool()
        if torch.equal(before, second):
            break
    if not min_size <= int(second.sum()) <= len(x) - min_size:
        second = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        second[along.argsort(stable=True)[(len(x) + 1) // 2 :]] = True
    return second
