"""ODC (online deep clustering): DeepCluster whose pseudo-labels are updated at every step instead of every epoch.
https://arxiv.org/abs/2006.10645

Labels and centroids are equal on all ranks, the memory bank of embeddings is sharded by samples.  All are updated once
per optimizer step with the samples of all ranks.  The sum of each cluster's rows is kept as integers, which makes it
independent of the order of additions, so that new centroids need no pass over the bank.  A cluster with fewer than
`min_cluster_size` samples is dissolved, and the largest cluster is split by two-means, or at the median if a part would
be too small (the original: only if a part would be empty).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import clustering, dist
from fastssl.config import Fraction, NonNegative, PositiveInt
from fastssl.kernels import update_bank_
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Context, ExtractOutputs, Outputs


@dataclass(frozen=True)
class Config:
    clusters: PositiveInt = 10000
    dims: tuple[PositiveInt, PositiveInt] = (512, 256)  # hidden and output widths of the neck
    momentum: Fraction = 0.5  # weight of the new embedding in the bank
    min_cluster_size: PositiveInt = 20  # in samples
    centroid_interval: PositiveInt = 10  # steps between updates of the centroids
    reweight: NonNegative = 0.5  # exponent p of the class weights size ** -p; 0: equal weights
    dropout: Fraction = 0.5
    norm: bool = True  # batch norm in the neck
    iterations: PositiveInt = 20  # of the k-means before the first epoch

    def build(self, backbone: nn.Module, context: Context) -> ODC:
        clustering.check_clusters(self.clusters, context.samples, self.min_cluster_size)
        parts.check_bank_momentum(self.momentum)
        return ODC(self, backbone, context)


class ODC(nn.Module):
    views = 1
    mean_loss = True
    not_capturable = "ODC reads the sizes of its clusters from the device at every step"

    def __init__(self, config: Config, backbone: nn.Module, context: Context):
        super().__init__()
        self.config, self.backbone, self.seed, self.kernels = config, backbone, context.seed, context.kernels
        samples = context.samples
        self.steps_per_epoch = samples // context.batch
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
        self.register_buffer("sums", torch.zeros(config.clusters, dim, dtype=torch.int64))  # of rows, times 1 / unit
        self.unit = 2.0 ** (samples.bit_length() - 62)  # the smallest for which a sum of all unit rows fits int64
        self.register_buffer("weights", torch.full((config.clusters,), 1 / config.clusters))
        self.register_buffer("changed", torch.zeros(()))  # fraction of the last step's samples whose label changed

    def before_epoch(self, epoch: int, extract_outputs: ExtractOutputs) -> str | None:
        if epoch:
            return None
        x, index = extract_outputs("z")
        x = F.normalize(x, dim=1)
        k_means = clustering.KMeans(self.config.clusters, self.config.iterations, seed=self.seed, kernels=self.kernels)
        result = k_means.fit(x, index)
        self.bank.fill_(x, index)
        self.labels.copy_(clustering.scatter(result.labels, index, len(self.labels)))
        self.recount()
        self.update_centroids()
        self.replace_small_clusters()
        return clustering.describe(result.counts, len(self.labels))

    def order(self, epoch: int) -> np.ndarray:
        return clustering.replacement_order(len(self.labels), self.seed, epoch)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(views[0])
        z = self.neck(h)
        return {"logits": self.head(z), "z": z.detach(), "features": h.detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        labels = self.labels[batch.index]
        loss = clustering.weighted_cross_entropy(out["logits"], labels, self.weights)
        return {"loss": loss, "changed": self.changed.clone()}  # a copy: the log reads it some steps later

    def total_weight(self, batch: Batch) -> Tensor:
        return clustering.total_weight(self.labels[batch.index], self.weights)

    @torch.no_grad()
    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor) -> None:
        index, z = dist.gather(batch.index), dist.gather(F.normalize(out["z"], dim=1))
        seen, inverse = index.unique(return_inverse=True)
        local, before = self.bank.is_local(index), self.bank.lookup(seen)
        start = self.bank.local_range.start
        update_bank_(self.bank.local_rows, index[local] - start, z[local], self.config.momentum, impl=self.kernels)
        after = self.bank.lookup(seen)
        labels = (after @ self.centroids.T).argmax(1)
        self.changed.copy_((labels != self.labels[seen])[inverse].to(self.changed.dtype).mean())
        self.move(seen, labels, before, after)
        if (batch.epoch * self.steps_per_epoch + batch.step + 1) % self.config.centroid_interval == 0:
            self.update_centroids()
        self.replace_small_clusters()

    def move(self, index: Tensor, labels: Tensor, before: Tensor, after: Tensor) -> None:
        """Assign `labels` (n,) to the distinct samples `index` (n,), whose rows of the bank (n, D) changed from
        `before` to `after`, and update the clusters' sizes and sums."""
        clusters, one = torch.cat([self.labels[index], labels]), torch.ones_like(labels)
        self.sizes.index_add_(0, clusters, torch.cat([-one, one]))
        change = torch.cat([-self.to_integers(before), self.to_integers(after)])
        self.sums.index_put_((clusters,), change, accumulate=True)
        self.labels[index] = labels

    def to_integers(self, x: Tensor) -> Tensor:
        """x as int64 multiples of `unit`."""
        return (x / self.unit).long()

    def recount(self) -> None:
        """Compute the clusters' sizes and sums from the bank."""
        self.sizes.copy_(torch.bincount(self.labels, minlength=len(self.sizes)))
        self.sums.zero_()
        for x, labels in zip(self.bank.local_rows.split(1 << 16), self.labels[self.bank.local_range].split(1 << 16)):
            self.sums.index_add_(0, labels, self.to_integers(x))
        dist.sum_(self.sums)

    def update_centroids(self) -> None:
        """Set the centroids to the means of their clusters; an empty cluster keeps its centroid."""
        dtype, empty = self.centroids.dtype, (self.sizes == 0)[:, None]
        means = self.sums.to(dtype).mul_((self.unit / self.sizes.clamp(min=1)).to(dtype)[:, None])
        self.centroids.mul_(empty).add_(means)

    def replace_small_clusters(self) -> None:
        """Replace the clusters below `min_cluster_size` by parts of the largest ones, and update the class weights.

        The samples of a small cluster move to the nearest other one.  The host waits for the device once.
        """
        small = self.sizes < self.config.min_cluster_size
        if small.any():
            members = small[self.labels].nonzero()[:, 0]
            x = self.bank.lookup(members)
            self.move(members, (x @ self.centroids.T).masked_fill(small, -torch.inf).argmax(1), x, x)
            for empty in small.nonzero()[:, 0]:
                self.split(self.sizes.argmax(), empty)
        self.weights.copy_(clustering.class_weights(self.sizes, self.config.reweight, 1e-5))

    def split(self, large: Tensor, empty: Tensor) -> None:
        """Split cluster `large` by two-means and assign one part to the cluster `empty`."""
        members = (self.labels == large).nonzero()[:, 0]
        x = self.bank.lookup(members)
        second = clustering.two_means(x, self.config.min_cluster_size)
        self.move(members[second], empty.expand(len(members))[second], x[second], x[second])
        self.centroids[large], self.centroids[empty] = x[~second].mean(0), x[second].mean(0)
