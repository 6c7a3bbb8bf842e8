"""SupCon (supervised contrastive learning): SimCLR in which the positives of a view are all views of images of its
class.  https://arxiv.org/abs/2004.11362

Positives and negatives are those of the global batch.  The only positive of an image without a label (-1) is its other
view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Positive, PositiveInt
from fastssl.kernels import Impl, ntxent
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
        return SupCon(self, backbone, context.kernels)


class SupCon(nn.Module):
    views = 2
    min_batch = 2

    def __init__(self, config: Config, backbone: nn.Module, kernels: Impl):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(torch.cat(views))
        z = self.projector(h)
        return {"z": torch.stack(z.chunk(2), 1), "features": h.detach()[: len(h) // 2]}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z = out["z"].transpose(0, 1).flatten(0, 1)  # (n, 2, D) -> (2 n, D): first view 0 of all images, then view 1
        return {"loss": ntxent(z, self.config.temperature, labels=batch.label, group=dist.group(), impl=self.kernels)}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
