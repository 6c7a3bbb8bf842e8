"""SimSiam: a predictor learns the other view's projection, which is detached.  https://arxiv.org/abs/2011.10566

There are no negatives and no momentum encoder; the stop-gradient and the predictor prevent collapse.  Configs keep the
predictor's learning rate constant: `optim.paramwise={r"^predictor": dict(schedule="constant")}`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        dim, norm = self.dims[-1], self.norm
        projector = parts.projector(backbone.dim, *self.dims, norm=norm, last_affine=False)
        predictor = parts.mlp(dim, self.predictor_dim, dim, norm=norm, bias=not norm)
        return SimSiam(self, backbone, projector, predictor)


class SimSiam(parts.WithPredictor[Config]):
    mean_loss = True

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (p_0, p_1), (z_0, z_1) = out["p"].unbind(1), out["z"].detach().unbind(1)
        return {"loss": -(parts.mean_cosine(p_0, z_1) + parts.mean_cosine(p_1, z_0)) / 2}
