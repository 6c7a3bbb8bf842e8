"""ODC, online deep clustering: classify images by labels that change with every step instead of every epoch.
https://arxiv.org/abs/2006.10645

Labels and centroids are on every rank, and the bank of embeddings is sharded by samples; all are on the device and in
checkpoints, updated once per optimizer step with the samples of all ranks.  The sums of the clusters' rows are
integers, so that they are exact in any order of additions, and new centroids do not read the bank.  A cluster with
fewer than `least` samples is dissolved and takes part of the largest one; where two-means leaves fewer than `least` on
one side, that one is split at the median (the original: only if empty).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import clustering, dist
from fastssl.kernels import update_bank_
from fastssl.loader import Batch
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Context, ExtractOutputs, Outputs


@dataclass(frozen=True)
class Config:
    clusters: int = 10000
    dims: tuple[int, int] = (512, 256)  # hidden and output widths of the neck
    momentum: float = 0.5  # weight of the new embedding in the bank
    least: int = 20  # samples in a cluster
    every: int = 10  # steps between means of all clusters
    reweight: float = 0.5  # power p of loss weights size ** -p; 0: all equal
    dropout: float = 0.5
    norm: bool = True  # batch norm in the neck
    iterations: int = 20  # of the first k-means

    def build(self, backbone: nn.Module, context: Context) -> ODC:
        clustering.check_clusters(self.clusters, context.samples, self.least)
        if not 0 < self.momentum <= 1 or self.every < 1:
            raise ValueError(f"method.momentum={self.momentum} must be in (0, 1], method.every={self.every} at least 1")
        return ODC(self, backbone, context)


class ODC(nn.Module):
    views = 1
    mean_loss = True
    not_capturable = "ODC's labels and clusters change by counts that it reads from the device"

    def __init__(self, config: Config, backbone: nn.Module, context: Context):
        super().__init__()
        self.config, self.backbone, self.seed, self.kernels = config, backbone, context.seed, context.kernels
        samples = context.samples
        self.steps = samples // context.batch  # of an epoch
        hidden, dim = config.dims
        norm = nn.BatchNorm1d(hidden, momentum=0.001, affine=False) if config.norm else nn.Identity()
        self.neck = nn.Sequential(
            nn.Linear(backbone.dim, hidden),
            norm,
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, dim),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(dim, config.clusters)
        for layer in (self.neck[0], self.neck[4], self.head):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        self.bank = ShardedTable(samples, dim)
        self.register_buffer("labels", torch.arange(samples) % config.clusters)
        self.register_buffer("centroids", torch.zeros(config.clusters, dim))
        self.register_buffer("sizes", (samples - torch.arange(config.clusters) - 1) // config.clusters + 1)
        self.register_buffer("sums", torch.zeros(config.clusters, dim, dtype=torch.int64))  # of rows, in this unit:
        self.unit = 2.0 ** (samples.bit_length() - 62)  # the finest in which all rows, of length 1, do not overflow
        self.register_buffer("weights", torch.full((config.clusters,), 1 / config.clusters))
        self.register_buffer("changed", torch.zeros(()))  # share of the last step's labels

    def before_epoch(self, epoch: int, extract_outputs: ExtractOutputs) -> str | None:
        if epoch:
            return None
        x, index = extract_outputs("z")
        x = F.normalize(x, dim=1)
        found = clustering.kmeans(
            x, self.config.clusters, index, iterations=self.config.iterations, seed=self.seed, kernels=self.kernels
        )
        self.bank.fill_(x, index)
        self.labels.copy_(clustering.scatter(found.labels, index, len(self.labels)))
        self.recount()
        self.update_centroids()
        self.replace_small_clusters()
        return clustering.describe(found.counts, len(self.labels))

    def order(self, epoch: int) -> np.ndarray:
        return clustering.replacement_order(len(self.labels), self.seed, epoch)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(views[0])
        z = self.neck(h)
        return {"logits": self.head(z), "z": z.detach(), "features": h.detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        labels = self.labels[batch.index]
        loss = clustering.weighted_cross_entropy(out["logits"], labels, self.weights)
        return {"loss": loss, "changed": self.changed.clone()}  # the log reads it some steps later

    def total_weight(self, batch: Batch) -> Tensor:
        return clustering.total_weight(self.labels[batch.index], self.weights)

    @torch.no_grad()
    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor) -> None:
        index, z = dist.gather(batch.index), dist.gather(F.normalize(out["z"], dim=1))
        seen, place = index.unique(return_inverse=True)
        local, before = self.bank.is_local(index), self.bank.rows(seen)
        start = self.bank.shard.start
        update_bank_(self.bank.block, index[local] - start, z[local], self.config.momentum, impl=self.kernels)
        after = self.bank.rows(seen)
        labels = (after @ self.centroids.T).argmax(1)
        self.changed.copy_((labels != self.labels[seen])[place].to(self.changed.dtype).mean())
        self.move(seen, labels, before, after)
        if (batch.epoch * self.steps + batch.step + 1) % self.config.every == 0:
            self.update_centroids()
        self.replace_small_clusters()

    def move(self, index: Tensor, labels: Tensor, before: Tensor, after: Tensor) -> None:
        """Samples `index` (n,), each once, whose rows (n, D) were `before` and are `after`, get `labels` (n,)."""
        clusters, one = torch.cat([self.labels[index], labels]), torch.ones_like(labels)
        self.sizes.index_add_(0, clusters, torch.cat([-one, one]))
        change = torch.cat([-self.to_integers(before), self.to_integers(after)])
        self.sums.index_put_((clusters,), change, accumulate=True)
        self.labels[index] = labels

    def to_integers(self, x: Tensor) -> Tensor:
        return (x / self.unit).long()

    def recount(self) -> None:
        """Compute the clusters' sizes and sums from the bank."""
        self.sizes.copy_(torch.bincount(self.labels, minlength=len(self.sizes)))
        self.sums.zero_()
        for x, labels in zip(self.bank.block.split(1 << 16), self.labels[self.bank.shard].split(1 << 16)):
            self.sums.index_add_(0, labels, self.to_integers(x))
        dist.sum_(self.sums)

    def update_centroids(self) -> None:
        """Set the centroids to the means of their clusters; that of an empty cluster stays."""
        dtype, empty = self.centroids.dtype, (self.sizes == 0)[:, None]
        means = self.sums.to(dtype).mul_((self.unit / self.sizes.clamp(min=1)).to(dtype)[:, None])
        self.centroids.mul_(empty).add_(means)

    def replace_small_clusters(self) -> None:
        """Dissolve and refill the clusters below `least`, then weight all by their sizes.  (Waits for the device once,
        to learn whether there are any.)"""
        small = self.sizes < self.config.least
        if small.any():
            homeless = small[self.labels].nonzero()[:, 0]
            x = self.bank.rows(homeless)
            self.move(homeless, (x @ self.centroids.T).masked_fill(small, -torch.inf).argmax(1), x, x)
            for empty in small.nonzero()[:, 0]:
                self.split(self.sizes.argmax(), empty)
        self.weights.copy_(clustering.class_weights(self.sizes, self.config.reweight, 1e-5))

    def split(self, large: Tensor, empty: Tensor) -> None:
        """Give part of cluster `large` to cluster `empty`."""
        members = (self.labels == large).nonzero()[:, 0]
        x = self.bank.rows(members)
        second = clustering.two_means(x, self.config.least)
        self.move(members[second], empty.expand(len(members))[second], x[second], x[second])
        self.centroids[large], self.centroids[empty] = x[~second].mean(0), x[second].mean(0)
