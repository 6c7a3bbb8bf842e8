"""NNCLR: the positive of a view's prediction is the nearest neighbour of the other view's projection in a queue.
https://arxiv.org/abs/2104.14548

The loss is the mean of InfoNCE in both directions, over the global batch: from neighbours to predictions and from
predictions to neighbours (some implementations have only the first).  The queue holds the projections of the first view
of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Count, Positive, PositiveInt
from fastssl.kernels import Impl, enqueue_, infonce_symmetric
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.1
    dims: tuple[PositiveInt, ...] = (2048, 2048, 256)
    predictor_dim: PositiveInt = 4096  # hidden width
    queue: Count = 98304
    norm: bool = True  # batch norm in the heads

    def build(self, backbone: nn.Module, context: Context) -> NNCLR:
        parts.check_queue(self.queue, context.batch)
        dim, norm = self.dims[-1], self.norm
        projector = parts.mlp(backbone.dim, *self.dims, norm=norm, last_norm=norm)
        predictor = parts.mlp(dim, self.predictor_dim, dim, norm=norm)
        return NNCLR(self, backbone, projector, predictor, context.kernels)


class NNCLR(parts.WithPredictor[Config]):
    min_batch = 2

    def __init__(self, config: Config, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, kernels: Impl):
        super().__init__(config, backbone, projector, predictor, kernels)
        self.register_buffer("queue", parts.random_directions(config.queue, config.dims[-1]))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (p_0, p_1), (nn_0, nn_1) = out["p"].unbind(1), (self.nearest(z) for z in out["z"].unbind(1))
        t = self.config.temperature
        losses = [
            infonce_symmetric(neighbour, p, t, group=dist.group(), impl=self.kernels)
            for neighbour, p in ((nn_0, p_1), (nn_1, p_0))
        ]
        return {"loss": sum(losses) / 2}

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(n, D): the row of the queue with the largest cosine similarity to each row of z."""
        return self.queue[(F.normalize(z, dim=1) @ self.queue.T).argmax(1)]

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        z = dist.gather(out["z"][:, 0].contiguous())
        enqueue_(self.queue, self.pointer, z, found_inf=found_inf, impl=self.kernels)
