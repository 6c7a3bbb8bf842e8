"""Rotation prediction: classify whether an image was rotated by 0, 90, 180 or 270 degrees.
https://arxiv.org/abs/1803.07728

The four views of an image are one crop in all rotations; the index of the view is the label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    def build(self, backbone: nn.Module, context: Context) -> Rotation:
        return Rotation(backbone)


class Rotation(nn.Module):
    views = 4
    mean_loss = True

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, 4)
        parts.kaiming_(self.head)  # as in OpenSelfSup; with fan_out the first loss is 30 times as large

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(torch.cat(views)).unflatten(0, (4, -1)).transpose(0, 1)
        return {"logits": self.head(h), "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return parts.view_classification(out["logits"])

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
