"""LeJEPA: an invariance loss between the views of an image, and SIGReg, which makes the distribution of embeddings an
isotropic Gaussian.  There is no teacher and no stop-gradient.  https://arxiv.org/abs/2511.08544

SIGReg compares the empirical characteristic function of the global batch with that of the Gaussian along random
directions, which depend on seed, epoch and step, and are equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Fraction, Positive, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[PositiveInt, ...] = (2048, 2048, 64)
    sigreg_weight: Fraction = 0.05  # lambda in the paper; 1 - lambda is the weight of the invariance
    directions: PositiveInt = 1024
    knots: PositiveInt = 17  # points of the integral over [0, t_max]
    t_max: Positive = 5.0  # as in the paper; 3 in the authors' code
    norm: bool = True  # batch norm in the projector
    large_crops: PositiveInt = 2  # the first views of the recipe, whose mean is the target of all views

    def build(self, backbone: nn.Module, context: Context) -> LeJEPA:
        return LeJEPA(self, backbone, context.seed)


class LeJEPA(nn.Module):
    views = None  # any number
    not_capturable = "LeJEPA draws its directions with a generator that the host seeds at each step"

    def __init__(self, config: Config, backbone: nn.Module, seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = parts.multi_crop(self.backbone, views, self.config.large_crops)
        z = self.projector(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return {"z": z, "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z, weight = out["z"], self.config.sigreg_weight
        invariance = (z - z[:, : self.config.large_crops].mean(1, keepdim=True)).square().mean()
        sigreg = self.sigreg(z.transpose(0, 1), batch)
        return {"loss": (1 - weight) * invariance + weight * sigreg, "invariance": invariance, "sigreg": sigreg}

    def sigreg(self, z_VnD: Tensor, batch: Batch) -> Tensor:
        """The Epps-Pulley statistic, averaged over views and directions: N times the integral over t of
        |phi_N(t) - exp(-t^2/2)|^2 exp(-t^2/2), where phi_N is the empirical characteristic function of N samples."""
        c = self.config
        generator = torch.Generator(z_VnD.device).manual_seed(self.seed + (batch.epoch << 32) + batch.step)
        a_DM = torch.randn(z_VnD.shape[2], c.directions, generator=generator, device=z_VnD.device)
        x_VnM = z_VnD @ (a_DM / a_DM.norm(dim=0)).to(z_VnD.dtype)
        t = torch.linspace(0, c.t_max, c.knots, dtype=z_VnD.dtype, device=z_VnD.device)
        gauss = torch.exp(-t.square() / 2)
        x_VnMt = x_VnM[..., None] * t
        real, imaginary = dist.replicated_mean(torch.stack([x_VnMt.cos().mean(1), x_VnMt.sin().mean(1)]))
        error = (real - gauss).square() + imaginary.square()
        return 2 * torch.trapezoid(error * gauss, t).mean() * z_VnD.shape[1] * dist.world()

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
