"""LeJEPA: views of an image agree, and embeddings are made an isotropic Gaussian by SIGReg; no teacher, no
stop-gradient.  https://arxiv.org/abs/2511.08544

SIGReg compares the characteristic function of the global batch with the Gaussian's along random directions, drawn anew
for each step from (epoch, step): the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[int, ...] = (2048, 2048, 64)
    weight: float = 0.05  # of SIGReg, lambda; the rest is of the agreement
    directions: int = 1024
    knots: int = 17  # of the integral over [0, end]
    end: float = 5.0  # the paper's; the authors' code has 3
    norm: bool = True  # batch norm in the projector
    large: int = 2  # views whose mean the others are drawn to, the first of the recipe

    def build(self, backbone: nn.Module, context: Context) -> LeJEPA:
        return LeJEPA(self, backbone, context.seed)


class LeJEPA(nn.Module):
    views = None  # any number
    not_capturable = "LeJEPA draws its directions by a generator that the host seeds for each step"

    def __init__(self, config: Config, backbone: nn.Module, seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = parts.multi_crop(self.backbone, views, self.config.large)
        z = self.projector(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return {"z": z, "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z, weight = out["z"], self.config.weight
        agreement = (z - z[:, : self.config.large].mean(1, keepdim=True)).square().mean()
        sigreg = self.sigreg(z.transpose(0, 1), batch)
        return {"loss": (1 - weight) * agreement + weight * sigreg, "agreement": agreement, "sigreg": sigreg}

    def sigreg(self, z_VnD: Tensor, batch: Batch) -> Tensor:
        """N times the Epps-Pulley statistic, integral over t of |phi_N(t) - exp(-t^2/2)|^2 exp(-t^2/2), averaged over
        views and directions."""
        c = self.config
        generator = torch.Generator(z_VnD.device).manual_seed(self.seed + (batch.epoch << 32) + batch.step)
        a_DM = torch.randn(z_VnD.shape[2], c.directions, generator=generator, device=z_VnD.device)
        x_VnM = z_VnD @ (a_DM / a_DM.norm(dim=0)).to(z_VnD.dtype)
        t = torch.linspace(0, c.end, c.knots, dtype=z_VnD.dtype, device=z_VnD.device)
        gauss = torch.exp(-t.square() / 2)
        x_VnMt = x_VnM[..., None] * t
        real, imaginary = dist.replicated_mean(torch.stack([x_VnMt.cos().mean(1), x_VnMt.sin().mean(1)]))
        error = (real - gauss).square() + imaginary.square()
        return 2 * torch.trapezoid(error * gauss, t).mean() * z_VnD.shape[1] * dist.world()

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
