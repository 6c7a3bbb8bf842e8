"""Relative location: classify at which of eight positions around the centre patch a patch lies.
https://arxiv.org/abs/1505.05192

The patches are the cells of a 3x3 grid.  The centre is encoded once per image, in a separate call: 9 patches per image
instead of OpenSelfSup's 16 (it encodes the centre for each neighbour), with equal batch statistics, loss and gradients.
Running variances differ slightly, because their factor n / (n - 1) is that of the patches of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.config import Fraction, PositiveInt
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    hidden: PositiveInt = 4096
    dropout: Fraction = 0.5
    norm: bool = True  # batch norm in the head

    def build(self, backbone: nn.Module, context: Context) -> RelativeLoc:
        return RelativeLoc(self, backbone)


class RelativeLoc(nn.Module):
    views = 9
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        norm = nn.BatchNorm1d(config.hidden, momentum=0.003) if config.norm else nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(2 * backbone.dim, config.hidden),
            norm,
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 8),
        )
        for layer, bias in ((self.head[0], 0.1), (self.head[-1], 0.0)):
            nn.init.normal_(layer.weight, std=0.005)
            nn.init.constant_(layer.bias, bias)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        # two calls, so that batch norm has separate statistics for neighbours and centres, as in OpenSelfSup
        neighbours = self.backbone(torch.cat(views[:4] + views[5:])).unflatten(0, (8, -1)).transpose(0, 1)
        centre = self.backbone(views[4])[:, None]
        pairs = torch.cat([neighbours, centre.expand_as(neighbours)], 2)
        logits = self.head(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        return {"logits": logits, "features": neighbours[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return parts.view_classification(out["logits"])

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
