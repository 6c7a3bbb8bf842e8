"""SupCon (supervised contrastive learning): SimCLR in which the positives of a view are all views of images of its
class.  https://arxiv.org/abs/2004.11362

Positives and negatives are those of the global batch.  The only positive of an image without a label (-1) is its other
view.
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
    norm: bool = False  # batch norm in the projector

    def build(self, backbone: nn.Module, context: Context) -> SupCon:
        parts.require_labels("supcon", context.classes)
        projector = parts.mlp(backbone.dim, *self.dims, norm=self.norm)
        return SupCon(self, backbone, projector, context.kernels)


class SupCon(parts.Contrastive[Config]):
    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.ntxent(out["z"], labels=batch.label)}
