"""MAE (masked autoencoder): a decoder reconstructs the pixels of masked patches.  https://arxiv.org/abs/2111.06377

The encoder gets only the visible patches.  A mask depends only on seed, epoch and sample, so it is the same on any
number of ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.config import Count, Fraction, PositiveInt
from fastssl.kernels import philox
from fastssl.loader import Batch
from fastssl.methods import parts
from fastssl.trainer import Context, Outputs

STREAM = 0x4D4145  # stream of the counter-based generator; the views use small numbers


@dataclass(frozen=True)
class Config:
    mask_ratio: Fraction = 0.75  # fraction of the patches that is masked
    decoder_dim: PositiveInt = 512
    decoder_depth: Count = 8
    decoder_heads: PositiveInt = 16
    norm_pixels: bool = True  # normalise the target of each patch by its mean and variance

    def init_backbone(self, backbone: nn.Module) -> None:
        body = parts.vision_transformer(backbone)
        parts.fixed_positions_(body, columns_first=True)
        nn.init.xavier_uniform_(body.patch_embed.proj.weight.data.flatten(1))
        if body.cls_token is not None:
            nn.init.normal_(body.cls_token, std=0.02)
        xavier_(body)

    def build(self, backbone: nn.Module, context: Context) -> MAE:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"method.mask_ratio={self.mask_ratio} must be between 0 and 1")
        return MAE(self, backbone, context.seed)


class MAE(nn.Module):
    views = 1
    exact_views = True  # they are the targets, too
    mean_loss = True

    def __init__(self, config: Config, backbone: nn.Module, seed: int):
        super().__init__()
        from timm.models.vision_transformer import Block

        body = parts.vision_transformer(backbone)
        self.config, self.backbone, self.seed = config, backbone, seed
        self.patch = body.patch_embed.patch_size[0]
        self.embed = nn.Linear(body.embed_dim, config.decoder_dim)
        # three dimensions, as in the original, so that the pattern "ndim<=1" does not exclude it from weight decay
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.decoder_dim), std=0.02))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder = nn.Sequential(
            *[
                Block(config.decoder_dim, config.decoder_heads, qkv_bias=True, norm_layer=norm)
                for _ in range(config.decoder_depth)
            ]
        )
        self.head = nn.Sequential(norm(config.decoder_dim), nn.Linear(config.decoder_dim, 3 * self.patch**2))
        for part in (self.embed, self.decoder, self.head):
            xavier_(part)

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        target = patchify(views[0].float(), self.patch)
        if self.config.norm_pixels:
            target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        visible, masked = self.draw_mask(batch.index, batch.epoch, target.shape[1])
        latent = self.encode(views[0], visible)
        pred = self.decode(latent, visible, masked, views[0].shape[-2:])
        return {"pred": pred, "target": take_patches(target, masked), "features": latent[:, 0].detach()}

    def draw_mask(self, index: Tensor, epoch: int, patches: int) -> tuple[Tensor, Tensor]:
        """Indices (n, kept) of the visible and (n, patches - kept) of the masked patches of each sample."""
        patch = torch.arange(patches, device=index.device)
        order = philox.philox4x32(patch, STREAM, index[:, None], epoch, self.seed)[0].argsort(dim=1, stable=True)
        kept = int(patches * (1 - self.config.mask_ratio))
        if not 0 < kept < patches:
            raise ValueError(
                f"method.mask_ratio={self.config.mask_ratio} leaves {kept} of {patches} patches of {self.patch} "
                "pixels: change it, or use larger views or a network with smaller patches"
            )
        return order[:, :kept], order[:, kept:]

    def encode(self, x: Tensor, visible: Tensor) -> Tensor:
        body = self.backbone.body
        x = body._pos_embed(body.patch_embed(x))
        prefix = body.num_prefix_tokens
        x = torch.cat([x[:, :prefix], take_patches(x[:, prefix:], visible)], 1)
        return body.norm(body.blocks(body.norm_pre(x)))

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.embed(latent)
        prefix = x.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(*masked.shape, -1)
        rows, columns = (side // self.patch for side in size)
        table = positions.sincos(rows, columns, x.shape[2], columns_first=True, device=x.device)
        order = torch.cat([visible, masked], 1)  # need not be sorted: attention does not depend on the order of tokens
        x = torch.cat([x, mask_tokens], 1) + nn.functional.pad(table[order], (0, 0, prefix, 0)).to(x.dtype)
        return self.head(self.decoder(x)[:, -masked.shape[1] :])

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (out["pred"] - out["target"].detach()).square().mean()}

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        pass


def xavier_(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def patchify(x: Tensor, p: int) -> Tensor:
    """(n, C, H, W) -> (n, patches, C p p): the pixels of patches of p x p, in rows from the top left."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)


def take_patches(x: Tensor, indices: Tensor) -> Tensor:
    """(n, L, D) -> (n, k, D): the patches `indices` (n, k) of each sample."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))
