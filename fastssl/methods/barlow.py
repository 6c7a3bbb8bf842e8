"""Barlow Twins: the cross-correlation matrix of the projections of two views should be the identity.
https://arxiv.org/abs/2103.03230

Means, variances and correlations are those of the global batch, and gradients are exact on any number of ranks.  The
original's gradients are divided by the number of ranks, which LARS compensates for weights but not for biases and
norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl import dist
from fastssl.config import NonNegative, Positive, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[PositiveInt, ...] = (8192, 8192, 8192)
    redundancy: NonNegative = 0.0051  # weight of the off-diagonal entries, lambda in the paper
    scale: Positive = 1.0  # factor of the whole loss (solo-learn: 0.1)
    norm: bool = True  # batch norm in the projector

    def build(self, backbone: nn.Module, context: Context) -> BarlowTwins:
        projector = parts.mlp(backbone.dim, *self.dims, norm=self.norm, bias=not self.norm, last_bias=False)
        return BarlowTwins(self, backbone, projector)


class BarlowTwins(parts.TwoViews[Config]):
    min_batch = 2

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z_0, z_1 = (parts.standardize(z) for z in out["z"].unbind(1))
        c_DD = dist.replicated_mean(z_0.T @ z_1 / len(z_0))
        on_diagonal = (c_DD.diagonal() - 1).square().sum()
        off_diagonal = parts.off_diagonal(c_DD).square().sum()
        loss = self.config.scale * (on_diagonal + self.config.redundancy * off_diagonal)
        return {"loss": loss, "on_diagonal": on_diagonal, "off_diagonal": off_diagonal}
