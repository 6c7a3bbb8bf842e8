"""DCL (decoupled contrastive learning): SimCLR without the positive in the softmax's denominator, which helps small
batches.  https://arxiv.org/abs/2110.06848

The negatives are the views of all other images of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.config import Positive, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.1
    dims: tuple[PositiveInt, ...] = (2048, 128)  # hidden and output widths of the projector
    norm: bool = True  # batch norm in the projector

    def build(self, backbone: nn.Module, context: Context) -> DCL:
        projector = parts.projector(backbone.dim, *self.dims, norm=self.norm)
        return DCL(self, backbone, projector, context.kernels)


class DCL(parts.Contrastive[Config]):
    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.ntxent(out["z"], decoupled=True)}
