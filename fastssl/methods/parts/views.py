"""Networks applied to views, and base classes of the methods that apply a backbone and a projector to two views, which
add their loss.

C: the dataclass of the method's settings.  Outputs have one row for each of n samples, as fastssl.trainer.Method says.
"""

from __future__ import annotations

import itertools
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.kernels import Impl, ntxent
from fastssl.loader import Batch
from fastssl.methods.parts.momentum import cosine, ema_, frozen_copy
from fastssl.trainer import Outputs

C = TypeVar("C", bound=Any)


def multi_crop(module: nn.Module, views: list[Tensor], large_crops: int) -> Tensor:
    """(n, V, D) outputs of `module` for views of several sizes, the first `large_crops` of which are the large ones.

    Consecutive views of equal size are one batch, with common batch statistics, as in SwAV.
    """
    if len(views) < max(large_crops, 2) or len({x.shape for x in views[:large_crops]}) > 1:
        raise ValueError(
            f"data.views gives {len(views)} views of {[x.shape[-1] for x in views]} pixels, but this method needs at "
            f"least {max(large_crops, 2)} views, the first {large_crops} of equal size: change data.views or "
            "method.large_crops"
        )
    out = []
    for _, same_size in itertools.groupby(views, key=lambda x: x.shape[-1]):
        group = list(same_size)
        out.append(module(torch.cat(group)).unflatten(0, (len(group), -1)))
    return torch.cat(out).transpose(0, 1)


def encode(views: list[Tensor], *modules: nn.Module, one_batch: bool = False) -> list[list[Tensor]]:
    """For each of `modules`, its outputs (n, D) of all views; a module receives the outputs of the one before it.

    one_batch: all views are one batch, with common batch statistics, instead of a batch each.
    """
    x, outputs = [torch.cat(views)] if one_batch else views, []
    for module in modules:
        x = [module(x_i) for x_i in x]
        outputs.append(list(x[0].chunk(len(views))) if one_batch else x)
    return outputs


class TwoViews(nn.Module, Generic[C]):
    """A backbone and a projector.  Outputs: "z" (n, 2, D), the projections of both views."""

    views = 2
    one_batch = False  # True: both views are one batch, with common batch statistics; False: a batch each

    def __init__(self, config: C, backbone: nn.Module, projector: nn.Module, kernels: Impl = "auto"):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone, self.projector = backbone, projector

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h, z = encode(views, self.backbone, self.projector, one_batch=self.one_batch)
        return {"z": torch.stack(z, 1), "features": h[0].detach()}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass


class Contrastive(TwoViews[C]):
    """Both views in one batch, and NT-Xent with config.temperature."""

    one_batch = True
    min_batch = 2

    def ntxent(self, z: Tensor, *, labels: Tensor | None = None, decoupled: bool = False) -> Tensor:
        """fastssl.kernels.ntxent over the global batch, for z (n, 2, D) and labels (n,) of this rank."""
        z = z.transpose(0, 1).flatten(0, 1)  # (2 n, D): first view 0 of all images, then view 1
        return ntxent(
            z, self.config.temperature, labels=labels, decoupled=decoupled, group=dist.group(), impl=self.kernels
        )


class WithPredictor(TwoViews[C]):
    """TwoViews and a predictor.  Outputs: "z", and "p" (n, 2, D), the predictions from both views."""

    def __init__(
        self, config: C, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, kernels: Impl = "auto"
    ):
        super().__init__(config, backbone, projector, kernels)
        self.predictor = predictor

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h, z, p = encode(views, self.backbone, self.projector, self.predictor)
        return {"z": torch.stack(z, 1), "p": torch.stack(p, 1), "features": h[0].detach()}


class WithMomentumEncoder(WithPredictor[C]):
    """WithPredictor and `target`, a momentum encoder: copies of backbone and projector that each step moves towards
    them.  Outputs: "p", and "z" (n, 2, D), the projections of both views by `target`.

    The momentum goes from config.momentum to config.momentum_end by half a cosine over the run.
    """

    def __init__(self, config: C, backbone: nn.Module, projector: nn.Module, predictor: nn.Module, kernels: Impl):
        super().__init__(config, backbone, projector, predictor, kernels)
        self.target = frozen_copy(backbone, projector)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        h, _, p = encode(views, self.backbone, self.projector, self.predictor)
        with torch.no_grad():
            (z,) = encode(views, self.target)
        return {"p": torch.stack(p, 1), "z": torch.stack(z, 1), "features": h[0].detach()}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        momentum = cosine(self.config.momentum, self.config.momentum_end, progress)
        ema_(self.target, [self.backbone, self.projector], momentum, found_inf=found_inf, impl=self.kernels)
