"""ODC, online deep clustering: classify images by labels that change with every step instead of every epoch.
https://arxiv.org/abs/2006.10645

Labels and centroids are on every rank, the bank of embeddings is cut into a block of samples a rank; all live on the
device and in the checkpoint, and move once per optimizer step with what all ranks saw.  A cluster below `least` samples
is dissolved and takes part of the largest one; where the two means of that leave less than `least` on a side, it is cut
at the median (the original: only if empty).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import cluster, dist
from fastssl.kernels import update_


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

    def build(self, backbone: nn.Module, *, samples: int, batch: int, kernels: str = "auto", **_) -> ODC:
        cluster.check_clusters(self.clusters, samples, self.least)
        if not 0 < self.momentum <= 1 or self.every < 1:
            raise ValueError(f"method.momentum={self.momentum} must be in (0, 1], method.every={self.every} at least 1")
        return ODC(self, backbone, samples, samples // batch, kernels)


class ODC(nn.Module):
    views = 1
    sharded = ("bank",)

    def __init__(self, config: Config, backbone: nn.Module, samples: int, steps: int, kernels: str):
        super().__init__()
        self.config, self.backbone, self.steps, self.kernels = config, backbone, steps, kernels
        hidden, dim = config.dims
        norm = nn.BatchNorm1d(hidden, momentum=0.001, affine=False) if config.norm else nn.Identity()
        self.neck = nn.Sequential(nn.Linear(backbone.dim, hidden), norm, nn.ReLU(inplace=True),
                                  nn.Dropout(config.dropout), nn.Linear(hidden, dim), nn.ReLU(inplace=True))
        self.head = nn.Linear(dim, config.clusters)
        for layer in (self.neck[0], self.neck[4], self.head):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.mine = dist.share(samples)
        self.register_buffer("bank", torch.zeros(self.mine.stop - self.mine.start, dim), persistent=False)
        self.register_buffer("labels", torch.arange(samples) % config.clusters)
        self.register_buffer("centroids", torch.zeros(config.clusters, dim))
        self.register_buffer("weights", torch.full((config.clusters,), 1 / config.clusters))
        self.register_buffer("changed", torch.zeros(()))  # share of the last step's labels
        self.seed = int(torch.randint(2**31, (), device="cpu"))  # follows the run's seed

    def before_epoch(self, epoch: int, survey) -> str | None:
        if epoch:
            return None
        x, index = survey("z")
        x = F.normalize(x, dim=1)
        found = cluster.kmeans(x, self.config.clusters, index, iterations=self.config.iterations, seed=self.seed)
        self.bank.copy_(cluster.scatter_block(x, index, len(self.labels)))
        self.labels.copy_(cluster.scatter(found.labels, index, len(self.labels)))
        self.renew()
        self.repair(self.centroids)
        return cluster.describe(found.counts, len(self.labels))

    def order(self, epoch: int) -> np.ndarray:
        return cluster.replacement_order(len(self.labels), self.seed, epoch)

    def forward(self, views: list[Tensor], batch) -> dict[str, Tensor]:
        h = self.backbone(views[0])
        z = self.neck(h)
        return {"logits": self.head(z), "z": z.detach(), "features": h.detach()}

    def loss(self, out: dict[str, Tensor], batch) -> dict[str, Tensor]:
        labels = self.labels[batch.index]
        return {"loss": cluster.weighted_cross_entropy(out["logits"], labels, self.weights), "changed": self.changed}

    @torch.no_grad()
    def after_step(self, out: dict[str, Tensor], batch, progress: float) -> None:
        index, z = dist.gather(batch.index), dist.gather(F.normalize(out["z"], dim=1))
        here = self.here(index)
        update_(self.bank, index[here] - self.mine.start, z[here], self.config.momentum, impl=self.kernels)
        labels = (self.rows(index) @ self.centroids.T).argmax(1)
        self.changed.copy_((labels != self.labels[index]).to(self.changed.dtype).mean())
        self.labels[index] = labels
        if (batch.epoch * self.steps + batch.step + 1) % self.config.every == 0:
            self.renew()
        self.repair(self.centroids)

    def here(self, index: Tensor) -> Tensor:
        return (index >= self.mine.start) & (index < self.mine.stop)

    def rows(self, index: Tensor) -> Tensor:
        """(n, D) of the bank, from the ranks that hold them."""
        if dist.world() == 1:
            return self.bank[index]
        here = self.here(index)
        out = self.bank.new_zeros(len(index), self.bank.shape[1])
        out[here] = self.bank[index[here] - self.mine.start]
        return dist.sum_(out)

    def renew(self) -> None:
        """Bring the centroids to the means of their clusters."""
        self.centroids.copy_(cluster.means(self.bank, self.labels[self.mine], self.centroids, self.kernels)[0])

    def repair(self, centroids: Tensor) -> None:
        """Dissolve and refill the clusters below `least`, then weight all by their sizes.  (Waits for the device once,
        to learn whether there are any.)"""
        counts = torch.bincount(self.labels, minlength=len(centroids))
        small = counts < self.config.least
        if small.any():
            homeless = small[self.labels].nonzero()[:, 0]
            scores = (self.rows(homeless) @ centroids.T).masked_fill(small, -torch.inf)
            self.labels[homeless] = scores.argmax(1)
            counts = torch.bincount(self.labels, minlength=len(centroids))
            for empty in small.nonzero()[:, 0]:
                self.split(counts, counts.argmax(), empty)
        self.weights.copy_(cluster.class_weights(counts, self.config.reweight, 1e-5))

    def split(self, counts: Tensor, large: Tensor, empty: Tensor) -> None:
        """Give part of cluster `large` to cluster `empty`."""
        members = (self.labels == large).nonzero()[:, 0]
        x = self.rows(members)
        second = cluster.two_means(x, self.config.least)
        self.labels[members[second]] = empty
        for one, part in ((large, x[~second]), (empty, x[second])):
            self.centroids[one], counts[one] = part.mean(0), len(part)
