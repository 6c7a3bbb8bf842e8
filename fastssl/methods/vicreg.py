"""VICReg: equal views (invariance), spread features (variance), no redundancy (covariance).
https://arxiv.org/abs/2105.04906

Variance and covariance are those of the global batch.  The variance term is the mean over both views, as in the
original; solo-learn sums them, so that its weight of 25 is 50 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.methods import parts


@dataclass(frozen=True)
class Config:
    dims: tuple[int, ...] = (8192, 8192, 8192)
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    norm: bool = True  # batch norm in the projector

    def build(self, backbone: nn.Module, **_) -> VICReg:
        return VICReg(self, backbone)


class VICReg(nn.Module):
    views = 2
    least_batch = 2

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm, last_bias=False)

    def forward(self, views: list[Tensor], batch) -> dict[str, Tensor]:
        h = [self.backbone(x) for x in views]
        z = [self.projector(h_i) for h_i in h]
        return {"z": torch.stack(z, 1), "features": h[0].detach()}

    def loss(self, out: dict[str, Tensor], batch) -> dict[str, Tensor]:
        z_0, z_1 = out["z"].unbind(1)
        invariance = (z_0 - z_1).square().mean()
        covariances = [self.covariance(z) for z in (z_0, z_1)]
        variance = sum((1 - (c.diagonal() + 1e-4).sqrt()).relu().mean() for c in covariances) / 2
        covariance = sum(parts.off_diagonal(c).square().sum() / len(c) for c in covariances)
        w = self.config
        return {"loss": w.invariance * invariance + w.variance * variance + w.covariance * covariance,
                "invariance": invariance, "variance": variance, "covariance": covariance}

    @staticmethod
    def covariance(z: Tensor) -> Tensor:
        """(D, D), unbiased, over the samples of all ranks."""
        z = z - dist.mean(z.mean(0))
        return dist.mean(z.T @ z) * (dist.world() / (len(z) * dist.world() - 1))

    def after_step(self, out: dict[str, Tensor], batch, progress: float, found_inf: Tensor | None = None) -> None:
        pass
