"""BYOL: a predictor learns the momentum encoder's projection of the other view.  https://arxiv.org/abs/2006.07733

The loss is the sum of 2 - 2 cos over both directions.  The momentum encoder normalises with its own batch statistics
and is updated once per optimizer step, after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastssl.config import Fraction, PositiveInt
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
        dim, bias = self.dims[-1], self.last_bias
        projector = parts.mlp(backbone.dim, *self.dims, norm=self.norm, last_bias=bias)
        predictor = parts.mlp(dim, self.predictor_dim, dim, norm=self.norm, last_bias=bias)
        if self.init == "openselfsup":
            parts.kaiming_(projector)
            parts.kaiming_(predictor)
            for layer in predictor:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
        if self.init == "haiku":
            haiku_(projector)
            haiku_(predictor)
        return BYOL(self, backbone, projector, predictor, context.kernels)


def haiku_(module: nn.Module) -> None:
    """Haiku's initialisation of linear and convolutional layers: a normal distribution of std 1 / sqrt(fan_in),
    truncated at two standard deviations (std of the result: 0.88 / sqrt(fan_in)); zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class BYOL(parts.WithMomentumEncoder[Config]):
    mean_loss = True

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (p_0, p_1), (z_0, z_1) = out["p"].unbind(1), out["z"].detach().unbind(1)
        return {"loss": 4 - 2 * (parts.mean_cosine(p_0, z_1) + parts.mean_cosine(p_1, z_0))}
