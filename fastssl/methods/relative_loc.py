"""Relative location: which neighbour of the centre patch is this one?  https://arxiv.org/abs/1505.05192

The eight neighbours of a 3x3 split against its centre.  The centre is encoded once, in a call of its own: 9 passes an
image where OpenSelfSup makes 16, with the same batch statistics, loss and gradients.  (Its running variances differ: by
n / (n - 1) of the patches of a call, of which it has eight times as many.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.loader import Batch
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    hidden: int = 4096
    dropout: float = 0.5
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
        # two calls: batch norm takes the statistics of the neighbours and of the centres apart, as in OpenSelfSup
        neighbours = self.backbone(torch.cat(views[:4] + views[5:])).unflatten(0, (8, -1)).transpose(0, 1)
        centre = self.backbone(views[4])[:, None]
        pairs = torch.cat([neighbours, centre.expand_as(neighbours)], 2)
        logits = self.head(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        return {"logits": logits, "features": neighbours[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        logits = out["logits"].flatten(0, 1)
        places = torch.arange(8, device=logits.device).repeat(len(logits) // 8)
        right = (logits.detach().argmax(1) == places).float().mean()
        return {"loss": F.cross_entropy(logits, places), "top1": right}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
