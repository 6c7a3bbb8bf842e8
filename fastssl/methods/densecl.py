"""DenseCL: MoCo v2, and the same loss between positions of the feature maps of two views.
https://arxiv.org/abs/2011.09157

The positive of each position of the query's last feature map is the position of the key's map whose backbone features
are the most similar.  The negatives are a second queue, of dense keys averaged over the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Count, Fraction, Positive, PositiveInt
from fastssl.kernels import Impl, enqueue_, infonce
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.2
    dims: tuple[PositiveInt, ...] = (2048, 128)  # hidden and output widths of both projectors
    dense_weight: Fraction = 0.5  # of the dense loss, lambda in the paper; 1 - lambda is that of MoCo's loss
    queue: Count = 65536
    momentum: Fraction = 0.999
    shuffle: bool = True  # shuffled batch norm
    init: Literal["torch", "openselfsup"] = "torch"  # "openselfsup", the authors': Kaiming, only in the projector

    def build(self, backbone: nn.Module, context: Context) -> DenseCL:
        parts.check_queue(self.queue, context.batch)
        parts.check_shuffle(self.shuffle, backbone)
        projector, dense_projector = (parts.mlp(backbone.dim, *self.dims, norm=False) for _ in range(2))
        if self.init == "openselfsup":
            parts.kaiming_(projector)
        return DenseCL(self, backbone, projector, dense_projector, context.kernels)


class DenseCL(parts.TwoViews[Config]):
    mean_loss = True

    def __init__(
        self, config: Config, backbone: nn.Module, projector: nn.Module, dense_projector: nn.Module, kernels: Impl
    ):
        super().__init__(config, backbone, projector, kernels)
        self.dense_projector = dense_projector
        self.target = parts.frozen_copy(backbone, projector, dense_projector)
        for name in ("queue", "dense_queue"):
            self.register_buffer(name, parts.random_directions(config.queue, config.dims[-1]))
        self.register_buffer("pointers", torch.zeros(2, dtype=torch.int64))

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        x_q, x_k = views
        h, q, q_dense, f_q = self.embed(x_q, self.backbone, self.projector, self.dense_projector)
        with torch.no_grad():
            shuffle = parts.Shuffle(len(x_k), x_k.device, self.config.shuffle)
            _, *key = self.embed(shuffle.shuffle(x_k), *self.target)
            k, k_dense, f_k = (shuffle.unshuffle(t) for t in key)
            match = (F.normalize(f_q, dim=2) @ F.normalize(f_k, dim=2).mT).argmax(2)
        return {"q": q, "k": k, "q_dense": q_dense, "k_dense": k_dense, "match": match, "features": h.detach()}

    @staticmethod
    def embed(x: Tensor, backbone: nn.Module, projector: nn.Module, dense_projector: nn.Module) -> tuple[Tensor, ...]:
        """Pooled features (n, C), embeddings (n, D), dense embeddings (n, S, D), dense features (n, S, C); S
        positions."""
        f = backbone.forward_stages(x)[-1].flatten(2).transpose(1, 2)
        h = f.mean(1)
        return h, projector(h), dense_projector(f), f

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        t, d = self.config.temperature, self.config.dense_weight
        k_dense = out["k_dense"].detach()
        paired = k_dense.gather(1, out["match"][:, :, None].expand_as(k_dense))
        single = infonce(out["q"], out["k"].detach(), self.queue, t, impl=self.kernels)
        dense = infonce(out["q_dense"].flatten(0, 1), paired.flatten(0, 1), self.dense_queue, t, impl=self.kernels)
        return {"loss": (1 - d) * single + d * dense, "single": single, "dense": dense}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        parts.ema_(
            self.target,
            [self.backbone, self.projector, self.dense_projector],
            self.config.momentum,
            found_inf=found_inf,
            impl=self.kernels,
        )
        for queue, pointer, keys in zip(
            (self.queue, self.dense_queue), self.pointers, (out["k"], out["k_dense"].mean(1))
        ):
            enqueue_(queue, pointer, dist.gather(keys), found_inf=found_inf, impl=self.kernels)
