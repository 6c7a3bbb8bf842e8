"""SimCLR: NT-Xent, the cross entropy of finding a view's positive, the other view of its image, by cosine similarity.
https://arxiv.org/abs/2002.05709

The negatives are the views of all other images of the global batch, on any number of ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastssl.config import Positive, PositiveInt
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
        projector = parts.projector(backbone.dim, *self.dims, norm=self.norm)
        if self.norm and not self.last_shift:
            projector[-1].bias.requires_grad_(False)  # stays 0
        if self.init == "openselfsup":
            parts.kaiming_(projector)
        return SimCLR(self, backbone, projector, context.kernels)


class SimCLR(parts.Contrastive[Config]):
    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.ntxent(out["z"])}
