"""Supervised classification: cross entropy of one linear layer, the yardstick of all others.

Images without a label (-1) do not count; the mean is over the labelled ones of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    label_smoothing: float = 0.0
    init: Literal["torch", "openselfsup"] = "torch"  # of the classifier; "openselfsup": N(0, 0.01) and no bias

    def build(self, backbone: nn.Module, context: Context) -> Supervised:
        return Supervised(self, backbone, parts.require_labels("supervised", context.classes))


class Supervised(nn.Module):
    views = 1
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, classes: int):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, classes)
        if config.init == "openselfsup":
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h = self.backbone(views[0])
        return {"logits": self.head(h), "features": h.detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        logits, label = out["logits"], batch.label
        if label.is_floating_point():
            raise ValueError("supervised takes one class per image; data.train has several labels per image")
        summed = F.cross_entropy(
            logits, label, ignore_index=-1, label_smoothing=self.config.label_smoothing, reduction="sum"
        )
        labelled = self.total_weight(batch)
        right = (logits.detach().argmax(1) == label).float().sum()
        return {"loss": summed / labelled, "top1": right / labelled}

    @staticmethod
    def total_weight(batch: Batch) -> Tensor:
        """How many images are labelled, of the average rank."""
        return dist.mean((batch.label >= 0).float().sum()).clamp(min=1.0)

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
