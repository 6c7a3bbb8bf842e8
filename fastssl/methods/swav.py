"""SwAV: each crop predicts the assignment of the other crops of its image to prototypes.
https://arxiv.org/abs/2006.09882

Sinkhorn makes the assignments balanced over the global batch and, for small batches, a queue of earlier embeddings.
The queue is the same on any number of ranks; each rank adds its part of the rows to the assignment.  The prototypes are
normalised after each step; the original does it before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist, zero
from fastssl.config import Count, Positive, PositiveInt
from fastssl.kernels import Impl, enqueue_
from fastssl.kernels.sinkhorn import sinkhorn_center
from fastssl.kernels.soft_cross_entropy import soft_cross_entropy
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.1
    dims: tuple[PositiveInt, ...] = (2048, 128)
    prototypes: PositiveInt = 3000
    epsilon: Positive = 0.05  # temperature of the assignments
    sinkhorn_iterations: PositiveInt = 3
    queue: Count = 0  # embeddings of earlier batches for each large crop (3840 for batch 256); 0: no queue
    queue_epoch: Count = 15  # first epoch (from 0) in which the queue is used
    freeze_epochs: Count = 1  # first epochs in which the prototypes are not trained
    weight_norm: bool = False  # normalise the prototypes in forward (solo-learn) instead of overwriting them
    norm: bool = True  # batch norm in the projector
    large_crops: PositiveInt = 2  # the first views of the recipe, whose assignments are computed

    def build(self, backbone: nn.Module, context: Context) -> SwAV:
        if self.queue:
            parts.check_queue(self.queue, context.batch)
            if self.queue % dist.world():
                raise ValueError(
                    f"method.queue={self.queue} must be a multiple of the number of ranks, {dist.world()}: each rank "
                    "takes as many rows"
                )
        return SwAV(self, backbone, context.kernels)


class SwAV(nn.Module):
    views = None  # any number of crops

    def __init__(self, config: Config, backbone: nn.Module, kernels: Impl):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm)
        self.prototypes = parts.Prototypes(config.dims[-1], config.prototypes, config.weight_norm)
        self.freeze_epochs = {r"^prototypes\.": config.freeze_epochs}
        self.register_buffer("queue", parts.random_directions(config.large_crops, config.queue, config.dims[-1]))
        self.register_buffer("pointers", torch.zeros(config.large_crops, dtype=torch.int64))

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = parts.multi_crop(self.backbone, views, self.config.large_crops)
        z = F.normalize(self.projector(h.flatten(0, 1)), dim=1)
        scores = self.prototypes(z, frozen=batch.epoch < self.config.freeze_epochs)
        z, scores = z.unflatten(0, h.shape[:2]), scores.unflatten(0, h.shape[:2])
        return {"scores": scores, "z": z[:, : self.config.large_crops].detach(), "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        c, scores = self.config, out["scores"].unbind(1)
        pairs = []
        for i, center in enumerate(self.centers(scores[: c.large_crops], batch.epoch)):
            pairs += [
                soft_cross_entropy(s, scores[i], c.temperature, c.epsilon, center=center, impl=self.kernels)
                for j, s in enumerate(scores)
                if j != i
            ]
        return {"loss": sum(pairs) / len(pairs)}

    def graph_key(self, epoch: int) -> tuple:
        return epoch < self.config.freeze_epochs, bool(self.config.queue) and epoch >= self.config.queue_epoch

    @torch.no_grad()
    def centers(self, scores: Sequence[Tensor], epoch: int) -> list[Tensor]:
        """(K,) for each large crop; its balanced assignments are softmax((scores - center) / epsilon)."""
        c = self.config
        if c.queue and epoch >= c.queue_epoch:
            with zero.gathered(list(self.prototypes.parameters())):
                scores = [
                    torch.cat([s, rows.chunk(dist.world())[dist.rank()] @ self.prototypes.directions().T])
                    for s, rows in zip(scores, self.queue)
                ]
        return [
            sinkhorn_center(s, c.epsilon, iterations=c.sinkhorn_iterations, group=dist.group(), impl=self.kernels)
            for s in scores
        ]

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        if not self.config.weight_norm:
            self.prototypes.normalize_(found_inf)
        if self.config.queue:
            z = dist.gather(out["z"])
            for i in range(self.config.large_crops):
                enqueue_(self.queue[i], self.pointers[i], z[:, i].contiguous(), found_inf=found_inf, impl=self.kernels)
