"""MoCo v1 and v2: InfoNCE with keys of a momentum encoder; the negatives are a queue of the keys of earlier batches.
https://arxiv.org/abs/1911.05722  https://arxiv.org/abs/2003.04297

Momentum encoder and queue are updated once per optimizer step, after it; the original updates the encoder at the start
of the next forward, with the same keys.  The momentum encoder sees the images redistributed over the ranks at random
(shuffled batch norm); with one rank this changes nothing, as in the original.  `symmetric` is solo-learn's MoCo v2+.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Count, Fraction, Positive, PositiveInt
from fastssl.kernels import Impl, enqueue_, infonce
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 0.2
    dims: tuple[PositiveInt, ...] = (2048, 128)  # v2; v1: (128,)
    queue: Count = 65536  # keys of earlier batches (of each view, if symmetric)
    symmetric: bool = False  # each view is a query for the other; the loss is the mean of both directions
    momentum: Fraction = 0.999
    momentum_end: Fraction = 0.999  # reached by half a cosine over the run
    shuffle: bool = True  # shuffled batch norm
    norm: bool = False  # batch norm in the projector, as in SimCLR
    init: Literal["torch", "openselfsup"] = "torch"  # of the projector; "openselfsup": Kaiming

    def build(self, backbone: nn.Module, context: Context) -> MoCo:
        parts.check_queue(self.queue, context.batch)
        parts.check_shuffle(self.shuffle, backbone)
        projector = parts.projector(backbone.dim, *self.dims, norm=self.norm)
        if self.init == "openselfsup":
            parts.kaiming_(projector)
        return MoCo(self, backbone, projector, context.kernels)


class MoCo(parts.TwoViews[Config]):
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, projector: nn.Module, kernels: Impl):
        super().__init__(config, backbone, projector, kernels)
        self.target = parts.frozen_copy(backbone, projector)
        pairs = 2 if config.symmetric else 1  # (query view, key view)
        self.register_buffer("queue", parts.random_directions(pairs, config.queue, config.dims[-1]))
        self.register_buffer("pointers", torch.zeros(pairs, dtype=torch.int64))

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        query_views, key_views = (views, views[::-1]) if self.config.symmetric else (views[:1], views[1:])
        h, q = parts.encode(query_views, self.backbone, self.projector)
        with torch.no_grad():
            k = [self.keys(x) for x in key_views]
        return {"q": torch.stack(q, 1), "k": torch.stack(k, 1), "features": h[0].detach()}

    def keys(self, x: Tensor) -> Tensor:
        shuffle = parts.Shuffle(len(x), x.device, self.config.shuffle)
        return shuffle.unshuffle(self.target(shuffle.shuffle(x)))

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        # q, k: (B, pairs, D); queue: (pairs, K, D)
        losses = [
            infonce(q, k, queue, self.config.temperature, impl=self.kernels)
            for q, k, queue in zip(out["q"].unbind(1), out["k"].detach().unbind(1), self.queue)
        ]
        return {"loss": sum(losses) / len(losses)}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        momentum = parts.cosine(self.config.momentum, self.config.momentum_end, progress)
        parts.ema_(self.target, [self.backbone, self.projector], momentum, found_inf=found_inf, impl=self.kernels)
        for k, queue, pointer in zip(dist.gather(out["k"]).unbind(1), self.queue, self.pointers):
            # scales k to unit length; queue and pointer are views of the buffers
            enqueue_(queue, pointer, k.contiguous(), found_inf=found_inf, impl=self.kernels)
