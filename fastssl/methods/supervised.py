"""Supervised classification with a linear layer and cross entropy, for comparison with the other methods.

The loss is the mean over the labelled images of the global batch; images without a label (-1) are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Fraction
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    label_smoothing: Fraction = 0.0
    init: Literal["torch", "openselfsup"] = "torch"  # of the classifier; "openselfsup": N(0, 0.01), zero bias

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
            raise ValueError(
                "method 'supervised' needs one class per image, but data.train has several labels per image: convert a "
                "source with one label each"
            )
        summed = F.cross_entropy(
            logits, label, ignore_index=-1, label_smoothing=self.config.label_smoothing, reduction="sum"
        )
        labelled = self.total_weight(batch)
        correct = (logits.detach().argmax(1) == label).float().sum()
        return {"loss": summed / labelled, "top1": correct / labelled}

    @staticmethod
    def total_weight(batch: Batch) -> Tensor:
        """Number of labelled images of the global batch divided by the number of ranks, at least 1."""
        return dist.mean((batch.label >= 0).float().sum()).clamp(min=1.0)

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass
