"""DeepCluster: classification with pseudo-labels, the clusters of the features before each epoch.
https://arxiv.org/abs/1807.05520

Before each epoch the features of the training set are whitened, normalised and clustered on all ranks, and the
classifier is initialised again.  Clusters are sampled equally often, or the loss is weighted by their sizes.  The
labels are in the checkpoint, so a run that resumes within an epoch keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import clustering, zero
from fastssl.config import Count, NonNegative, PositiveInt
from fastssl.loader import Batch
from fastssl.trainer import Context, ExtractOutputs, Outputs


@dataclass(frozen=True)
class Config:
    clusters: PositiveInt = 10000
    pca_dim: Count = 256  # dimensions of the whitened features; 0: no whitening
    # "faiss": k-means by faiss on rank 0; "pic": power iteration clustering, of which the largest clusters are kept
    algorithm: Literal["kmeans", "pic", "faiss"] = "kmeans"
    iterations: PositiveInt = 20  # of k-means
    sampling: Literal["uniform", "all"] = "uniform"  # "uniform": clusters equally often; "all": each sample once
    reweight: NonNegative = 0.0  # exponent p of the class weights size ** -p; 0.5 is usual with sampling="all"

    def build(self, backbone: nn.Module, context: Context) -> DeepCluster:
        clustering.check_clusters(self.clusters, context.samples)
        if self.pca_dim > backbone.dim:
            raise ValueError(
                f"method.pca_dim={self.pca_dim} is more than the backbone's {backbone.dim} features: set at most that, "
                "or 0 for no whitening"
            )
        return DeepCluster(self, backbone, context)


class DeepCluster(nn.Module):
    views = 1
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, context: Context):
        super().__init__()
        self.config, self.backbone, self.seed, self.kernels = config, backbone, context.seed, context.kernels
        self.head = nn.Linear(backbone.dim, config.clusters)
        self.register_buffer("labels", torch.zeros(context.samples, dtype=torch.int64))
        self.register_buffer("weights", torch.full((config.clusters,), 1 / config.clusters))

    def before_epoch(self, epoch: int, extract_outputs: ExtractOutputs) -> str:
        c = self.config
        x, index = extract_outputs("features")
        x = F.normalize(clustering.pca_whiten(x, c.pca_dim) if c.pca_dim else x, dim=1)
        if c.algorithm == "pic":
            labels = clustering.pic(x, c.clusters, index)
        else:
            k_means = clustering.KMeans(
                c.clusters,
                c.iterations,
                seed=self.seed + epoch,
                backend="faiss" if c.algorithm == "faiss" else "torch",
                kernels=self.kernels,
            )
            labels = k_means.fit(x, index).labels
        self.labels.copy_(clustering.scatter(labels, index, len(self.labels)))
        counts = torch.bincount(self.labels[self.labels >= 0], minlength=c.clusters)
        self.weights.copy_(clustering.class_weights(counts, c.reweight, 1e-10))
        self.reset_head(epoch)
        return clustering.describe(counts, len(self.labels))

    def reset_head(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        weight = torch.randn(self.config.clusters, self.backbone.dim, generator=generator) * 0.01
        zero.overwrite_(self.head.weight, weight)
        zero.overwrite_(self.head.bias, torch.zeros(self.config.clusters))

    def order(self, epoch: int) -> np.ndarray | None:
        if self.config.sampling == "all":
            return None
        return clustering.uniform_order(self.labels.cpu().numpy(), self.seed, epoch)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(views[0])
        return {"logits": self.head(h), "features": h.detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        labels = self.labels[batch.index]
        correct = (out["logits"].detach().argmax(1) == labels).float()
        return {
            "loss": clustering.weighted_cross_entropy(out["logits"], labels, self.weights),
            "top1": clustering.weighted_mean(correct, labels, self.weights),
        }

    def total_weight(self, batch: Batch) -> Tensor:
        return clustering.total_weight(self.labels[batch.index], self.weights)

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
