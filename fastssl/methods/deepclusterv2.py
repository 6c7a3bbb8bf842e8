"""DeepCluster v2: each crop predicts the cluster of its image; the classifier's weights are the centroids.
https://arxiv.org/abs/2006.09882 (appendix)

Before each epoch, spherical k-means clusters the embeddings that the last epoch stored in a memory, once for each set
of prototypes.  As in the original, those of the first epoch are computed in training mode, and an empty cluster keeps
its centroid.  The memory is sharded over the ranks by samples; labels and prototypes are buffers, equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import clustering, dist
from fastssl.config import Positive, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Context, ExtractOutputs, Outputs


@dataclass(frozen=True)
class Config:
    clusters: tuple[PositiveInt, ...] = (3000, 3000, 3000)  # of each clustering; they use the large crops in turn
    temperature: Positive = 0.1
    dims: tuple[PositiveInt, ...] = (2048, 128)
    iterations: PositiveInt = 10  # of k-means
    norm: bool = True  # batch norm in the projector
    large_crops: PositiveInt = 2  # the first views of the recipe, whose embeddings are stored and clustered

    def build(self, backbone: nn.Module, context: Context) -> DeepClusterV2:
        if not self.clusters:
            raise ValueError("method.clusters=() must have at least one number; the default is (3000, 3000, 3000)")
        for clusters in self.clusters:
            clustering.check_clusters(clusters, context.samples)
        return DeepClusterV2(self, backbone, context)


class DeepClusterV2(nn.Module):
    views = None  # any number of crops
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, context: Context):
        super().__init__()
        self.config, self.backbone, self.seed, self.kernels = config, backbone, context.seed, context.kernels
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm)
        self.memory = ShardedTable(context.samples, config.large_crops, config.dims[-1])
        self.register_buffer("labels", torch.zeros(len(config.clusters), context.samples, dtype=torch.int64))
        for i, clusters in enumerate(config.clusters):
            self.register_buffer(f"prototypes_{i}", parts.random_directions(clusters, config.dims[-1]))

    def before_epoch(self, epoch: int, extract_outputs: ExtractOutputs) -> str:
        if epoch == 0:
            z, index = extract_outputs("z", augmented=True, training=True)
            self.memory.fill_(z[:, : self.config.large_crops], index)
        samples, shard, notes = self.memory.samples, self.memory.local_range, []
        index = torch.arange(shard.start, shard.stop, device=self.labels.device)
        for i, clusters in enumerate(self.config.clusters):
            k_means = clustering.KMeans(
                clusters,
                self.config.iterations,
                seed=self.seed + epoch * len(self.labels) + i,
                spherical=True,
                empty="keep",
                kernels=self.kernels,
            )
            result = k_means.fit(self.memory.local_rows[:, i % self.config.large_crops], index)
            self.get_buffer(f"prototypes_{i}").copy_(result.centroids)
            self.labels[i] = clustering.scatter(result.labels, index, samples)
            notes.append(clustering.describe(result.counts, samples))
        return "; ".join(notes)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = parts.multi_crop(self.backbone, views, self.config.large_crops)
        z = F.normalize(self.projector(h.flatten(0, 1)), dim=1).unflatten(0, h.shape[:2])
        return {"z": z, "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z = out["z"].flatten(0, 1)  # 2-d: on CUDA, cross_entropy of more dimensions has no deterministic gradient
        labels = self.labels[:, batch.index].repeat_interleave(out["z"].shape[1], 1)
        losses = [
            F.cross_entropy(z @ self.get_buffer(f"prototypes_{i}").T / self.config.temperature, label)
            for i, label in enumerate(labels)
        ]
        return {"loss": sum(losses) / len(losses)}

    @torch.no_grad()
    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        z = dist.gather(out["z"][:, : self.config.large_crops].contiguous())
        self.memory.write_(dist.gather(batch.index), z, found_inf)
