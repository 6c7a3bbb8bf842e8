"""MoCo v3: MoCo with a predictor and without a queue; the negatives are the keys of the global batch.
https://arxiv.org/abs/2104.02057

The momentum encoder is updated after the optimizer step, with the momentum that the original takes at the start of the
next step; the keys are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Fraction, Positive, PositiveInt
from fastssl.kernels import infonce
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs


@dataclass(frozen=True)
class Config:
    temperature: Positive = 1.0  # ViT: 0.2
    dims: tuple[PositiveInt, ...] = (4096, 256)  # of the projector; ViT: (4096, 4096, 256)
    predictor_dim: PositiveInt = 4096  # hidden width
    predictor_norm: bool = False  # batch norm after the predictor's last layer, too; ViT: True
    momentum: Fraction = 0.99
    momentum_end: Fraction = 1.0  # reached by half a cosine over the run
    norm: bool = True  # batch norm in the heads
    # ViT: True.  The patch projection stays random, which makes training stable, and position embeddings are fixed
    freeze_patch_embed: bool = False

    def init_backbone(self, backbone: nn.Module) -> None:
        if self.freeze_patch_embed:
            body = parts.vision_transformer(backbone)
            parts.fixed_positions_(body, columns_first=False)
            authors_init_(body)
            body.patch_embed.requires_grad_(False)

    def build(self, backbone: nn.Module, context: Context) -> MoCoV3:
        dim, norm = self.dims[-1], self.norm
        projector = parts.projector(backbone.dim, *self.dims, norm=norm, last_affine=False)
        predictor = parts.mlp(
            dim,
            self.predictor_dim,
            dim,
            norm=norm,
            last_norm=norm and self.predictor_norm,
            last_affine=False,
            bias=not norm,
            last_bias=not norm,
        )
        return MoCoV3(self, backbone, projector, predictor, context.kernels)


@torch.no_grad()
def authors_init_(body: nn.Module) -> None:
    """As in the authors' vits.py: Xavier for all linear layers (query, key and value separately) and for the patch
    projection as one linear layer; zero biases; a class token of std 1e-6."""
    for name, layer in body.named_modules():
        if isinstance(layer, nn.Linear):
            fan_out, fan_in = layer.weight.shape
            bound = math.sqrt(6 / ((fan_out // 3 if name.endswith("qkv") else fan_out) + fan_in))
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.normal_(body.cls_token, std=1e-6)
    projection = body.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.flatten(1))
    nn.init.zeros_(projection.bias)


class MoCoV3(parts.WithMomentumEncoder[Config]):
    min_batch = 2
    total_steps = math.inf  # set to the run's number of steps

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        (q_0, q_1), (k_0, k_1) = out["p"].unbind(1), out["z"].detach().unbind(1)
        t = self.config.temperature
        losses = [infonce(q, k, None, t, group=dist.group(), impl=self.kernels) for q, k in ((q_0, k_1), (q_1, k_0))]
        return {"loss": 2 * t * sum(losses)}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        # at the progress of the next step, as in the original
        super().after_step(out, batch, progress + 1 / self.total_steps, found_inf)
