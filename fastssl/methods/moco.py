"""MoCo v1 and v2: a query meets its key among a queue of older keys.
https://arxiv.org/abs/1911.05722  https://arxiv.org/abs/2003.04297

The momentum encoder and the queue move once per optimizer step, after it: the keys of step t come from the weights
that the original computes at the start of forward t.  Keys are dealt to the ranks at random before batch norm; on one
rank that changes nothing, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.kernels import infonce, push_
from fastssl.methods import parts


@dataclass(frozen=True)
class Config:
    temperature: float = 0.2
    dims: tuple[int, ...] = (2048, 128)  # v2; v1: (128,)
    queue: int = 65536
    momentum: float = 0.999
    momentum_end: float = 0.999  # reached by half a cosine over the run
    shuffle: bool = True  # shuffled batch norm
    norm: bool = False  # batch norm in the projector (SimCLR's neck)

    def build(self, backbone: nn.Module, *, batch: int, kernels: str = "auto", **_) -> MoCo:
        parts.need_queue(self.queue, batch)
        return MoCo(self, backbone, kernels)


class MoCo(nn.Module):
    views = 2

    def __init__(self, config: Config, backbone: nn.Module, kernels: str):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.projector = parts.mlp(backbone.dim, *config.dims, norm=config.norm, last_norm=config.norm,
                                   bias=not config.norm, last_bias=not config.norm)
        self.target = parts.frozen_copy(self.backbone, self.projector)
        self.register_buffer("queue", parts.random_directions(config.queue, config.dims[-1]))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, views: list[Tensor], batch) -> dict[str, Tensor]:
        x_q, x_k = views
        h = self.backbone(x_q)
        q = self.projector(h)
        with torch.no_grad():
            if self.config.shuffle:
                shuffle = parts.Shuffle(len(x_k), x_k.device)
                k = shuffle.collect(self.target(shuffle.deal(x_k)))
            else:
                k = self.target(x_k)
        return {"q": q, "k": k, "features": h.detach()}

    def loss(self, out: dict[str, Tensor], batch) -> dict[str, Tensor]:
        return {"loss": infonce(out["q"], out["k"].detach(), self.queue, self.config.temperature, impl=self.kernels)}

    def after_step(self, out: dict[str, Tensor], batch, progress: float) -> None:
        momentum = parts.cosine(self.config.momentum, self.config.momentum_end, progress)
        parts.ema_(self.target, [self.backbone, self.projector], momentum)
        push_(self.queue, self.pointer, dist.gather(out["k"]), impl=self.kernels)
