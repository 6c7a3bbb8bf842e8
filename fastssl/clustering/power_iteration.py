"""Power iteration clustering, as in DeepCluster.  https://arxiv.org/abs/1807.05520"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl import dist
from fastssl.clustering.rows import blocks, scatter

NEIGHBOURS, SIGMA, ITERATIONS = 5, 0.2, 200
ALPHA = 0.001  # weight of the walk's steps


def pic(x: Tensor, clusters: int, index: Tensor) -> Tensor:
    """(n_r,) int64 labels of the rows x (n_r, D) of all ranks, whose sample numbers are index (n_r,).

    A random walk on the graph of nearest neighbours, whose edges are exp(-d^2 / sigma^2), gives each sample a
    probability; samples that reach the same local maximum by steepest ascent are a cluster.  A cluster of one sample
    joins that of its nearest neighbour with more.  Samples outside the `clusters` largest have label -1.
    """
    order = dist.gather_ragged(index).argsort()
    all_rows = dist.gather_ragged(x)[order]
    n = len(all_rows)
    if n <= NEIGHBOURS:
        raise ValueError(f"power iteration clustering needs more than {NEIGHBOURS} samples and has {n}")
    neighbour, distance = _neighbours(x, index, all_rows)
    neighbour, weight = scatter(neighbour, index, n), torch.exp(-scatter(distance, index, n).double() / SIGMA**2)
    rows = torch.arange(n, device=x.device)[:, None].expand_as(neighbour).flatten()
    edges = torch.stack([torch.cat([rows, neighbour.flatten()]), torch.cat([neighbour.flatten(), rows])])
    with torch.sparse.check_sparse_tensor_invariants(False):  # without this torch warns
        graph = torch.sparse_coo_tensor(edges, weight.flatten().repeat(2), (n, n)).coalesce()  # A + A^T
    v = torch.full((n, 1), 1 / n, dtype=torch.float64, device=x.device)
    for _ in range(ITERATIONS):
        v = ALPHA * torch.sparse.mm(graph, v) + (1 - ALPHA) / n
        v = v / v.sum()
    labels = _peaks(graph, v[:, 0])
    labels = _join_singles(labels, neighbour)
    sizes = torch.bincount(labels)
    rank = sizes.argsort(descending=True, stable=True).argsort()
    labels = torch.where(rank[labels] < clusters, rank[labels], -1)
    return dist.broadcast_(labels)[index]  # the sparse product rounds differently on each device


def _neighbours(x: Tensor, index: Tensor, all_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n_r, NEIGHBOURS) nearest other samples of this rank's rows and their squared distances."""
    half, neighbours, distances = all_rows.square().sum(1) / 2, [], []
    for part, own in zip(blocks(x, len(all_rows)), blocks(index, len(all_rows))):
        score = torch.addmm(-half, part, all_rows.T)
        score.scatter_(1, own[:, None], -math.inf)
        neighbours.append(score.topk(NEIGHBOURS, 1).indices)
        distances.append((part[:, None] - all_rows[neighbours[-1]]).square().sum(2))
    return torch.cat(neighbours), torch.cat(distances)


def _peaks(graph: Tensor, v: Tensor) -> Tensor:
    """(n,) the local maximum of `v`, numbered from 0, that each node reaches along the edges of steepest ascent."""
    n, (i, j) = len(v), graph.indices()
    gain = graph.values() * (v[j] - v[i])
    best = torch.zeros_like(v).scatter_reduce(0, i, gain, "amax")
    steepest = (gain == best[i]) & (gain > 0)
    up = torch.full((n,), n, device=v.device).scatter_reduce(0, i[steepest], j[steepest], "amin")
    up = torch.where(up == n, torch.arange(n, device=v.device), up)
    for _ in range(n.bit_length()):  # each round doubles the path length
        up = up[up]
    return up.unique(return_inverse=True)[1]


def _join_singles(labels: Tensor, neighbour: Tensor) -> Tensor:
    """Labels, numbered anew, after each sample that is alone has joined its nearest neighbour (n, k) that is not."""
    alone = torch.bincount(labels)[labels] == 1
    candidates = ~alone[neighbour]
    first = candidates.int().argmax(1)
    host = neighbour.gather(1, first[:, None])[:, 0]
    joins = alone & candidates.any(1)
    return torch.where(joins, labels[host], labels).unique(return_inverse=True)[1]
