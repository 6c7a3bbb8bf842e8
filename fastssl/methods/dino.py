"""DINO: the student's softmax over prototypes, for every crop, learns the teacher's for the large crops.
https://arxiv.org/abs/2104.14294

The teacher is a momentum encoder.  Its outputs are centred by a moving average of the mean over the global batch and
sharpened by a low temperature, which together prevent collapse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Count, Fraction, Positive, PositiveInt
from fastssl.kernels import Impl
from fastssl.kernels.soft_cross_entropy import soft_cross_entropy
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    prototypes: PositiveInt = 65536
    dims: tuple[PositiveInt, ...] = (2048, 2048, 256)  # of the head's MLP, with GELU
    temperature: Positive = 0.1  # the student's
    teacher_temperature: Positive = 0.04
    teacher_temperature_end: Positive = 0.04  # reached linearly over `teacher_epochs` (ViT, 300 epochs: 0.07 over 30)
    teacher_epochs: Count = 0
    momentum: Fraction = 0.996
    momentum_end: Fraction = 1.0  # reached by half a cosine over the run
    center_momentum: Fraction = 0.9
    freeze_epochs: Count = 1  # first epochs in which the prototypes and their optimizer state are not updated
    norm: bool = False  # batch norm in the head
    large_crops: PositiveInt = 2  # the first views of the recipe, which the teacher encodes

    def init_backbone(self, backbone: nn.Module) -> None:
        token = getattr(getattr(backbone, "body", None), "cls_token", None)
        if token is not None:  # timm initialises it with std 1e-6
            nn.init.trunc_normal_(token, std=0.02)

    def build(self, backbone: nn.Module, context: Context) -> DINO:
        return DINO(self, backbone, context.kernels)


class Head(nn.Module):
    def __init__(self, dim: int, config: Config):
        super().__init__()
        self.mlp = parts.mlp(dim, *config.dims, norm=config.norm, act=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = parts.Prototypes(config.dims[-1], config.prototypes)
        # the norm that nn.Linear gives; the effective learning rate depends on it
        self.prototypes.weight.data *= 3**-0.5

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        return self.prototypes(F.normalize(self.mlp(x), dim=-1), frozen)


class DINO(nn.Module):
    views = None  # any number of crops
    mean_loss = True
    evaluated = "target.0"  # the teacher's backbone, as by the authors

    def __init__(self, config: Config, backbone: nn.Module, kernels: Impl):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.backbone = backbone
        self.head = Head(backbone.dim, config)
        self.target = parts.frozen_copy(self.backbone, self.head)
        parts.disable_drop_path_(self.target)
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.freeze_epochs = {r"^head\.prototypes\.": config.freeze_epochs}

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        large_crops, frozen = self.config.large_crops, batch.epoch < self.config.freeze_epochs
        h = parts.multi_crop(self.backbone, views, large_crops)
        student = self.head(h.flatten(0, 1), frozen).unflatten(0, h.shape[:2])
        with torch.no_grad():
            teacher = self.target(torch.cat(views[:large_crops])).unflatten(0, (large_crops, -1)).transpose(0, 1)
        return {"student": student, "teacher": teacher, "features": h[:, 0].detach()}

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        temperatures = self.config.temperature, self.teacher_temperature(batch.epoch)
        student, teacher = out["student"].unbind(1), out["teacher"].unbind(1)
        pairs = [
            soft_cross_entropy(s, t, *temperatures, center=self.center, impl=self.kernels)
            for i, t in enumerate(teacher)
            for j, s in enumerate(student)
            if i != j
        ]
        return {"loss": sum(pairs) / len(pairs)}

    def graph_key(self, epoch: int) -> tuple:
        return epoch < self.config.freeze_epochs, self.teacher_temperature(epoch)

    def teacher_temperature(self, epoch: int) -> float:
        c = self.config
        progress = min(1.0, epoch / max(c.teacher_epochs - 1, 1)) if c.teacher_epochs else 1.0
        return c.teacher_temperature + (c.teacher_temperature_end - c.teacher_temperature) * progress

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        momentum = parts.cosine(self.config.momentum, self.config.momentum_end, progress)
        parts.ema_(self.target, [self.backbone, self.head], momentum, found_inf=found_inf, impl=self.kernels)
        mean = dist.mean(out["teacher"].mean((0, 1)))
        parts.assign_(self.center, self.center.lerp(mean, 1 - self.config.center_momentum), found_inf)
