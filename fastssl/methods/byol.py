"""BYOL: a predictor learns the momentum encoder's projection of the other view.  https://arxiv.org/abs/2006.07733

The loss is the sum of 2 - 2 cos over both directions.  The momentum encoder normalises with its own batch statistics
and is updated once per optimizer step, after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.config import Fraction, PositiveInt
from fastssl.kernels import Impl
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[PositiveInt, ...] = (4096, 256)  # hidden and output widths of the projector
    predictor_dim: PositiveInt = 4096  # hidden width
    momentum: Fraction = 0.996
    momentum_end: Fraction = 1.0  # reached by half a cosine over the run
    norm: bool = True  # batch norm in the heads
    last_bias: bool = True  # whether the heads' last linear layers have a bias; False in the authors' code
    # of the heads; "openselfsup": Kaiming, N(0, 0.01) in the predictor; "haiku": the authors', also for the backbone
    init: Literal["torch", "openselfsup", "haiku"] = "torch"

    def init_backbone(self, backbone: nn.Module) -> None:
        if self.init == "haiku":
            haiku_(backbone)

    def build(self, backbone: nn.Module, context: Context) -> BYOL:
        return BYOL(self, backbone, context.kernels)


def haiku_(module: nn.Module) -> None:
    """Haiku's initialisation of linear and convolutional layers: a normal distribution of std 1 / sqrt(fan_in),
    truncated at two standard deviations (std of the result: 0.88 / sqrt(fan_in)); zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class BYOL(nn.Module):
    views = 2
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, kernels: Impl):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm, last_bias=config.last_bias)
        self.predictor = parts.mlp(
            config.dims[-1], config.predictor_dim, config.dims[-1], norm=config.norm, last_bias=config.last_bias
        )
        if config.init == "openselfsup":
            for head in (self.projector, self.predictor):
                parts.kaiming_(head)
            for layer in self.predictor:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
        if config.init == "haiku":
            haiku_(self.projector)
            haiku_(self.predictor)
        self.target = parts.frozen_copy(self.backbone, self.projector)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = [self.backbone(x) for x in views]
        p = [self.predictor(self.projector(h_i)) for h_i in h]
        with torch.no_grad():
            z = [self.target(x) for x in views]
        return {"p": torch.stack(p, 1), "z": torch.stack(z, 1), "features": h[0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (p_0, p_1), (z_0, z_1) = out["p"].unbind(1), out["z"].detach().unbind(1)
        return {"loss": 4 - 2 * (parts.mean_cosine(p_0, z_1) + parts.mean_cosine(p_1, z_0))}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        momentum = parts.cosine(self.config.momentum, self.config.momentum_end, progress)
        parts.ema_(self.target, [self.backbone, self.projector], momentum, found_inf=found_inf, impl=self.kernels)
