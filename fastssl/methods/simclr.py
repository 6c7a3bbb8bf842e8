"""SimCLR: NT-Xent, the cross entropy of finding a view's positive, the other view of its image, by cosine similarity.
https://arxiv.org/abs/2002.05709

The negatives are the views of all other images of the global batch, on any number of ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    norm: bool = True  # batch norm in the projector (SimCLR on ImageNet); False: solo-learn's CIFAR recipe
    last_shift: bool = True  # whether the last batch norm has a bias; False in the authors' code
    init: Literal["torch", "openselfsup"] = "torch"  # of the projector; "openselfsup": Kaiming

    def build(self, backbone: nn.Module, context: Context) -> SimCLR:
        return SimCLR(self, backbone, context.kernels)


class SimCLR(nn.Module):
    views = 2
    min_batch = 2

    def __init__(self, config: Config, backbone: nn.Module, kernels: Impl):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.projector = parts.projector(backbone.dim, *config.dims, norm=config.norm)
        if config.norm and not config.last_shift:
            self.projector[-1].bias.requires_grad_(False)  # stays 0
        if config.init == "openselfsup":
            parts.kaiming_(self.projector)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(torch.cat(views))
        z = self.projector(h)
        return {"z": torch.stack(z.chunk(2), 1), "features": h.detach()[: len(h) // 2]}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        z = out["z"].transpose(0, 1).flatten(0, 1)  # (n, 2, D) -> (2 n, D): first view 0 of all images, then view 1
        return {"loss": ntxent(z, self.config.temperature, group=dist.group(), impl=self.kernels)}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
