"""K-means, PCA-whitening and power iteration clustering in torch, on the device and sharded over the ranks.

Each rank brings its share of the rows, x (n_r, D), and their numbers, index (n_r,), of N samples in all; centroids are
on every rank and sums are all-reduced.  Starting points are drawn by (seed, sample), so any number of ranks gives the
clustering of one.  https://arxiv.org/abs/1807.05520 (DeepCluster), https://arxiv.org/abs/1702.08734 (faiss)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import dist
from fastssl.kernels import philox, update_centroids_

STREAM = 0x434C5553  # of the counter-based generator
CHUNK = 1 << 25  # entries of a block of similarities (128 MiB in float32)


class Clusters(NamedTuple):
    centroids: Tensor  # (K, D)
    labels: Tensor  # (n_r,) int64 of this rank's rows
    counts: Tensor  # (K,) int64 over all ranks
    objective: float  # sum over all rows of the squared distance to their centroid


def check_clusters(clusters: int, samples: int, least: int = 1) -> None:
    """Refuse more clusters than the data can fill with `least` samples each."""
    if clusters < 1 or clusters * least > samples:
        raise ValueError(
            f"method.clusters={clusters} of {least} or more samples each cannot be made of the {samples} "
            f"samples of data.train: set method.clusters to at most {max(1, samples // least)}"
        )


def kmeans(
    x: Tensor,
    clusters: int,
    index: Tensor | None = None,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = False,
    init: str = "random",
    empty: str = "split",
    backend: str = "torch",
    kernels: str = "auto",
) -> Clusters:
    """Lloyd's algorithm from `clusters` rows drawn at random, or by k-means++ (one pass over the data per cluster).

    A cluster that runs empty takes half of a large one, as in faiss, and at the end the farthest row; with empty="keep"
    it keeps its centroid and stays without rows.  `spherical`:
    unit centroids, compared by dot product; rows should be of unit length.  backend="faiss": by faiss, on rank 0's CPU.
    """
    samples = int(dist.sum_(torch.tensor(len(x), device=x.device)))
    check_clusters(clusters, samples)
    index = torch.arange(samples, device=x.device) if index is None else index
    if backend == "faiss":
        centroids = _faiss(x, clusters, index, iterations, seed, spherical)
    elif backend != "torch":
        raise ValueError(f"backend={backend!r} is neither 'torch' nor 'faiss'")
    elif init in ("random", "++"):
        start = _start_random if init == "random" else _start_plus_plus
        centroids = start(x, clusters, index, samples, seed)
        for _ in range(iterations):
            labels = assign(x, centroids, spherical)[0]
            centroids, _ = _update(x, labels, centroids, spherical, kernels, split=empty == "split")
    else:
        raise ValueError(f"init={init!r} is neither 'random' nor '++'")
    labels, distances = assign(x, centroids, spherical)
    counts = count(labels, clusters)
    rounds = 10 if empty == "split" else 0
    for _ in range(rounds):  # of equal rows one alone can fill a cluster; too few distinct rows leave some empty
        lost = (counts == 0).nonzero()[:, 0]
        if not len(lost):
            break
        centroids = centroids.index_copy(0, lost, _farthest(x, distances, index, len(lost), samples))
        labels, distances = assign(x, centroids, spherical)
        counts = count(labels, clusters)
    return Clusters(centroids, labels, counts, float(dist.sum_(distances.double().sum())))


def assign(x: Tensor, centroids: Tensor, spherical: bool = False) -> tuple[Tensor, Tensor]:
    """(n,) nearest centroid of each row (of equally near ones the first) and (n,) squared distances."""
    half = torch.zeros_like(centroids[:, 0]) if spherical else centroids.square().sum(1) / 2
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part, out in zip(_blocks(x, len(centroids)), _blocks(labels, len(centroids))):
        torch.argmax(torch.addmm(-half, part, centroids.T), 1, out=out)
    distances = torch.cat(
        [
            (part - centroids[own]).square().sum(1)
            for part, own in zip(_blocks(x, x.shape[1]), _blocks(labels, x.shape[1]))
        ]
    )
    return labels, distances


def count(labels: Tensor, clusters: int) -> Tensor:
    """(K,) int64 over all ranks; labels below 0 do not count."""
    return dist.sum_(torch.bincount(labels[labels >= 0], minlength=clusters))


def scatter(values: Tensor, index: Tensor, samples: int) -> Tensor:
    """This rank's rows as those of all ranks, (N, ...) in the order of the samples and on every rank."""
    out = values.new_zeros(samples, *values.shape[1:])
    out[index] = values
    return dist.sum_(out)


def scatter_block(values: Tensor, index: Tensor, samples: int) -> Tensor:
    """This rank's block (dist.shard) of the samples' rows, which lie on all ranks in any order."""
    for r in range(dist.world()):
        block = dist.shard(samples, r)
        here = (index >= block.start) & (index < block.stop)
        out = values.new_zeros(block.stop - block.start, *values.shape[1:])
        out[index[here] - block.start] = values[here]
        dist.sum_(out)
        if r == dist.rank():
            mine = out
    return mine


def _blocks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    return x.split(max(1, CHUNK // width))


def means(x: Tensor, labels: Tensor, old: Tensor, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """(K, D) means over all ranks' rows of each label, `old` where there are none, and (K,) their counts."""
    counts = torch.bincount(labels, minlength=len(old))
    own = update_centroids_(old.clone(), x, labels, impl=kernels)
    if dist.world() == 1:
        return own, counts
    sums = dist.sum_(own * counts[:, None])
    counts = dist.sum_(counts)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], old), counts


def _update(
    x: Tensor, labels: Tensor, old: Tensor, spherical: bool, kernels: str = "auto", split: bool = True
) -> tuple[Tensor, Tensor]:
    """Means of the clusters over all ranks; one that is empty takes half of a large one, or (not `split`) stays."""
    new, counts = means(x, labels, old, kernels)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty) and split:
        large = counts.argsort(descending=True, stable=True)[: len(old) - len(empty)][: len(empty)]
        # As in faiss, but one half stays: rows that lie on the centroid would be equally far from both, and their label
        # would depend on how a matrix product rounds, which depends on the number of rows that a rank holds.
        nudge = 1 + torch.where(torch.arange(x.shape[1], device=x.device) % 2 == 0, 1, -1) / 512
        new[empty[: len(large)]] = new[large] * nudge
    return (F.normalize(new, dim=1) if spherical else new), counts


def _rows(x: Tensor, index: Tensor, wanted: Tensor, samples: int) -> Tensor:
    """The rows of the samples `wanted`, wherever they are."""
    place = torch.full((samples,), -1, device=x.device)
    place[wanted] = torch.arange(len(wanted), device=x.device)
    place = place[index]
    out = x.new_zeros(len(wanted), x.shape[1])
    out[place[place >= 0]] = x[place >= 0]
    return dist.sum_(out)


def _farthest(x: Tensor, distances: Tensor, index: Tensor, wanted: int, samples: int) -> Tensor:
    """The rows of all ranks that are farthest from their centroids; of equally far ones those of the first samples."""
    far, numbers = _by_distance(distances, index, wanted)
    far, numbers = _by_distance(dist.gather_ragged(far), dist.gather_ragged(numbers), wanted)
    return _rows(x, index, numbers, samples)


def _by_distance(distances: Tensor, index: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    order = index.argsort()
    order = order[distances[order].argsort(descending=True, stable=True)][:wanted]
    return distances[order], index[order]


def _start_random(x: Tensor, clusters: int, index: Tensor, samples: int, seed: int) -> Tensor:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))  # on the CPU: the same everywhere
    return _rows(x, index, order[:clusters].to(x.device), samples)


def _start_plus_plus(x: Tensor, clusters: int, index: Tensor, samples: int, seed: int) -> Tensor:
    """The next start is a row drawn with probability proportional to its squared distance from the nearest start: the
    winner of a race of exponential clocks with those rates, one clock for each (seed, sample, draw)."""
    nearest, starts = torch.ones(len(x), dtype=torch.float64, device=x.device), []
    for draw in range(clusters):
        clock = -torch.log1p(-philox.uniform(philox.philox4x32(index, STREAM, draw, 0, seed)[0]))
        time = torch.where(nearest > 0, clock / nearest, math.inf)
        best = time.argmin()[None] if len(x) else None
        mine = torch.stack([time[best[0]], index[best[0]].double()]) if len(x) else time.new_tensor([math.inf, 0])
        all_ranks = dist.gather(mine[None])
        winner = all_ranks[all_ranks[:, 0].argmin(), 1].long()
        starts.append(_rows(x, index, winner[None], samples))
        distance = (x - starts[-1]).square().sum(1).double()
        nearest = distance if draw == 0 else torch.minimum(nearest, distance)
    return torch.cat(starts)


def _faiss(x: Tensor, clusters: int, index: Tensor, iterations: int, seed: int, spherical: bool) -> Tensor:
    try:
        import faiss
    except ImportError:
        raise ValueError("backend='faiss' needs faiss: pip install faiss-cpu, or use backend='torch'") from None
    everything = dist.gather_ragged(x)[dist.gather_ragged(index).argsort()]
    centroids = x.new_zeros(clusters, x.shape[1])
    if dist.is_main():
        found = faiss.Kmeans(
            x.shape[1],
            clusters,
            niter=iterations,
            seed=seed,
            spherical=spherical,
            max_points_per_centroid=10**7,
            min_points_per_centroid=1,
        )
        found.train(everything.float().cpu().numpy())
        centroids.copy_(torch.from_numpy(found.centroids))
    return dist.broadcast_(centroids)


def two_means(x: Tensor, least: int) -> Tensor:
    """bool (n,): which rows are in the second of two clusters, each of at least `least` rows (n >= 2 least).

    Starts from the halves on both sides of the mean along the first principal axis; when a cluster is too small, the
    upper half along that axis is the second.
    """
    centred = x - x.mean(0)
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(10):  # power iteration; far from converged is good enough
        axis = F.normalize(centred.T @ (centred @ axis), dim=0)
    along = centred @ axis
    second = along > 0
    for _ in range(20):
        if not least <= int(second.sum()) <= len(x) - least:
            break
        means = torch.stack([x[~second].mean(0), x[second].mean(0)])
        before, second = second, assign(x, means)[0].bool()
        if torch.equal(before, second):
            break
    if not least <= int(second.sum()) <= len(x) - least:
        second = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        second[along.argsort(stable=True)[(len(x) + 1) // 2 :]] = True
    return second


def pca_whiten(x: Tensor, dims: int) -> Tensor:
    """(n_r, dims) projections on the first principal components of all ranks' rows, each of variance 1 (over N - 1).

    The component's largest entry is positive.  A direction without variance (1e-6 of the first) projects to zero.
    """
    n = int(dist.sum_(torch.tensor(len(x), device=x.device)))
    if not 0 < dims <= min(n, x.shape[1]):
        raise ValueError(
            f"method.pca={dims}: {n} features of {x.shape[1]} dimensions have 1 to {min(n, x.shape[1])} "
            "components; 0 switches it off"
        )
    mean = (dist.sum_(x.sum(0, dtype=torch.float64)) / n).to(x.dtype)
    scatter_DD = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in _blocks(x, x.shape[1]):
        centred = part - mean
        scatter_DD += centred.T @ centred
    values, vectors = torch.linalg.eigh(dist.sum_(scatter_DD) / max(n - 1, 1))
    values, vectors = values.flip(0)[:dims], vectors.flip(1)[:, :dims]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    scale = torch.where(values > 1e-6 * values[0], values.clamp(min=1e-300).rsqrt(), 0.0)
    project = dist.broadcast_((vectors * scale).contiguous()).to(x.dtype)
    return torch.cat([(part - mean) @ project for part in _blocks(x, x.shape[1])])


def pic(
    x: Tensor,
    clusters: int,
    index: Tensor,
    *,
    neighbours: int = 5,
    sigma: float = 0.2,
    alpha: float = 0.001,
    iterations: int = 200,
) -> Tensor:
    """Labels (n_r,) by power iteration clustering as in DeepCluster: samples climb to the peaks of a random walk's
    distribution on the neighbour graph; a sample alone joins its nearest neighbour that is not.

    Peaks give the number of clusters; beyond the `clusters` largest a sample has the label -1.
    """
    order = dist.gather_ragged(index).argsort()
    everything = dist.gather_ragged(x)[order]
    n = len(everything)
    if neighbours >= n:
        raise ValueError(f"power iteration clustering needs more than {neighbours} samples and has {n}")
    near, weight = _neighbours(x, index, everything, neighbours)
    near, weight = scatter(near, index, n), torch.exp(-scatter(weight, index, n).double() / sigma**2)
    rows = torch.arange(n, device=x.device)[:, None].expand_as(near).flatten()
    edges = torch.stack([torch.cat([rows, near.flatten()]), torch.cat([near.flatten(), rows])])
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch warns when nothing is said
        graph = torch.sparse_coo_tensor(edges, weight.flatten().repeat(2), (n, n)).coalesce()  # A + A^T
    v = torch.full((n, 1), 1 / n, dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        v = alpha * torch.sparse.mm(graph, v) + (1 - alpha) / n
        v = v / v.sum()
    labels = _peaks(graph, v[:, 0])
    labels = _join_singles(labels, near)
    sizes = torch.bincount(labels)
    rank = sizes.argsort(descending=True, stable=True).argsort()
    labels = torch.where(rank[labels] < clusters, rank[labels], -1)
    return dist.broadcast_(labels)[index]  # sums of a sparse product may differ by device in the last bit


def _neighbours(x: Tensor, index: Tensor, everything: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n_r, k) nearest other samples of this rank's rows and their squared distances."""
    half, near, far = everything.square().sum(1) / 2, [], []
    for part, own in zip(_blocks(x, len(everything)), _blocks(index, len(everything))):
        score = torch.addmm(-half, part, everything.T)
        score.scatter_(1, own[:, None], -math.inf)
        near.append(score.topk(k, 1).indices)
        far.append((part[:, None] - everything[near[-1]]).square().sum(2))
    return torch.cat(near), torch.cat(far)


def _peaks(graph: Tensor, v: Tensor) -> Tensor:
    """(n,) the peak, numbered from 0, that each node reaches by its edges of steepest ascent."""
    n, (i, j) = len(v), graph.indices()
    gain = graph.values() * (v[j] - v[i])
    best = torch.zeros_like(v).scatter_reduce(0, i, gain, "amax")
    steepest = (gain == best[i]) & (gain > 0)
    up = torch.full((n,), n, device=v.device).scatter_reduce(0, i[steepest], j[steepest], "amin")
    up = torch.where(up == n, torch.arange(n, device=v.device), up)
    for _ in range(n.bit_length()):  # pointers double their reach
        up = up[up]
    return up.unique(return_inverse=True)[1]


def _join_singles(labels: Tensor, near: Tensor) -> Tensor:
    alone = torch.bincount(labels)[labels] == 1
    candidates = ~alone[near]
    first = candidates.int().argmax(1)
    host = near.gather(1, first[:, None])[:, 0]
    joins = alone & candidates.any(1)
    return torch.where(joins, labels[host], labels).unique(return_inverse=True)[1]


def uniform_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """N sample numbers, equally many of every non-empty cluster (with replacement where it is too small), shuffled."""
    random = np.random.Philox(key=[seed, epoch])
    kept = np.flatnonzero(labels >= 0)
    by_cluster = kept[np.lexsort((random.random_raw(len(kept)), labels[kept]))]  # in random order inside a cluster
    sizes = np.bincount(labels[kept])
    sizes = sizes[sizes > 0]
    share = len(labels) // len(sizes) + 1
    place = np.broadcast_to(np.arange(share), (len(sizes), share))
    drawn = (random.random_raw(place.size) >> np.uint64(11)).reshape(place.shape) * 2.0**-53 * sizes[:, None]
    place = np.where(sizes[:, None] > share, place, drawn.astype(np.int64))
    order = by_cluster[(np.cumsum(sizes) - sizes)[:, None] + place].ravel()
    return order[np.argsort(random.random_raw(len(order)), kind="stable")][: len(labels)]


def replacement_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """N sample numbers drawn with replacement."""
    words = np.random.Philox(key=[seed, epoch]).random_raw(samples) >> np.uint64(11)
    return (words * 2.0**-53 * samples).astype(np.int64)


def class_weights(counts: Tensor, power: float, eps: float) -> Tensor:
    """(K,) weights proportional to (count + eps) ** -power, of sum 1."""
    weights = (counts.double() + eps) ** -power
    return (weights / weights.sum()).float()


def target_weights(target: Tensor, weight: Tensor) -> Tensor:
    """(n,) weight of each target's class; 0 for a target of -1."""
    return torch.where(target >= 0, weight[target.clamp(min=0)], 0)


def total_weight(target: Tensor, weight: Tensor) -> Tensor:
    """Of the targets of the global batch, for the average rank."""
    return dist.mean(target_weights(target, weight).sum()).clamp(min=1e-30)


def weighted_mean(each: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Of this rank's numbers (n,), weighted by class and divided by the weights of the global batch."""
    weight = weight.to(each.dtype)
    return (target_weights(target, weight) * each).sum() / total_weight(target, weight)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy with class weights, divided by the weights of the global batch; a target of -1 does not count."""
    return weighted_mean(F.cross_entropy(logits, target.clamp(min=0), reduction="none"), target, weight)


def describe(counts: Tensor, samples: int) -> str:
    """One line for the log."""
    sizes = counts[counts > 0]
    left = samples - int(counts.sum())
    return (
        f"{len(counts)} clusters, {len(counts) - len(sizes)} empty, the others of {int(sizes.min())} to "
        f"{int(sizes.max())} samples" + f"; {left} samples in none" * bool(left)
    )
