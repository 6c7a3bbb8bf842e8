"""VICReg: three terms that make the views of an image equal (invariance), keep the standard deviation of each feature
at 1 or more (variance), and decorrelate the features (covariance).  https://arxiv.org/abs/2105.04906

Variance and covariance are those of the global batch.  If the batch has fewer than D samples, no D x D matrix is
formed.  The variance term is the mean over both views, as in the original; solo-learn takes the sum, so its weight of
25 is 50 here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl import dist
from fastssl.config import NonNegative, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    dims: tuple[PositiveInt, ...] = (8192, 8192, 8192)
    invariance: NonNegative = 25.0  # weights of the three terms
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0
    norm: bool = True  # batch norm in the projector

    def build(self, backbone: nn.Module, context: Context) -> VICReg:
        projector = parts.mlp(backbone.dim, *self.dims, norm=self.norm, last_bias=False)
        return VICReg(self, backbone, projector)


class VICReg(parts.TwoViews[Config]):
    min_batch = 2

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z_0, z_1 = out["z"].unbind(1)
        invariance = (z_0 - z_1).square().mean()
        variances, covariances = zip(*(self.variance_and_covariance(z) for z in (z_0, z_1)))
        variance = sum((1 - (v_D + 1e-4).sqrt()).relu().mean() for v_D in variances) / 2
        covariance = sum(covariances) / z_0.shape[1]
        w = self.config
        return {
            "loss": w.invariance * invariance + w.variance * variance + w.covariance * covariance,
            "invariance": invariance,
            "variance": variance,
            "covariance": covariance,
        }

    @staticmethod
    def variance_and_covariance(z_nD: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased variances (D,) over the N samples of all ranks, and a number whose mean over ranks is the sum of the
        squared off-diagonal covariances.

        With N < D the D x D covariance is not formed.  The ranks exchange samples instead (2 N D numbers, not 2 D D),
        and each multiplies its samples by all samples, since |z^T z| = |z z^T| in the Frobenius norm.
        """
        (n, features), samples = z_nD.shape, len(z_nD) * dist.world()
        if samples >= features:
            z_nD = z_nD - dist.mean(z_nD.mean(0))
            c_DD = dist.replicated_mean(z_nD.T @ z_nD) * (dist.world() / (samples - 1))
            return c_DD.diagonal(), parts.off_diagonal(c_DD).square().sum()
        z_ND = dist.gather(z_nD)
        z_ND = z_ND - z_ND.mean(0)
        v_D = z_ND.square().sum(0) / (samples - 1)
        k_nN = z_ND[dist.rank() * n :][:n] @ z_ND.T / (samples - 1)
        return v_D, dist.world() * k_nN.square().sum() - v_D.square().sum()
