"""SimSiam: a predictor learns the other view's projection, which is detached.  https://arxiv.org/abs/2011.10566

There are no negatives and no momentum encoder; the stop-gradient and the predictor prevent collapse.  Configs keep the
predictor's learning rate constant: `optim.paramwise={r"^predictor": dict(schedule="constant")}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.config import PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[PositiveInt, ...] = (2048, 2048, 2048)  # of the projector
    predictor_dim: PositiveInt = 512  # hidden width
    norm: bool = True  # batch norm in the heads

    def build(self, backbone: nn.Module, context: Context) -> SimSiam:
        return SimSiam(self, backbone)


class SimSiam(nn.Module):
    views = 2
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = parts.projector(backbone.dim, *config.dims, norm=config.norm, last_affine=False)
        self.predictor = parts.mlp(
            config.dims[-1], config.predictor_dim, config.dims[-1], norm=config.norm, bias=not config.norm
        )

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = [self.backbone(x) for x in views]
        z = [self.projector(h_i) for h_i in h]
        p = [self.predictor(z_i) for z_i in z]
        return {"p": torch.stack(p, 1), "z": torch.stack(z, 1), "features": h[0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (p_0, p_1), (z_0, z_1) = out["p"].unbind(1), out["z"].detach().unbind(1)
        return {"loss": -(parts.mean_cosine(p_0, z_1) + parts.mean_cosine(p_1, z_0)) / 2}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
