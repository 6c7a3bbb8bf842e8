"""Heads: MLPs and their initialisation, prototypes, position embeddings of vision transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import zero
from fastssl.backbones import positions

RELU = partial(nn.ReLU, inplace=True)


def mlp(
    *dims: int,
    norm: bool = True,
    last_norm: bool = False,
    bias: bool = True,
    last_bias: bool = True,
    last_affine: bool = True,
    act: Callable[[], nn.Module] = RELU,
) -> nn.Sequential:
    """Linear layers of the widths `dims` with the activation `act` between them.

    `norm`: batch norm before each activation; `last_norm`: also after the last layer (`last_affine`: with scale and
    shift).  `bias`: of the linear layers; `last_bias`: of the last one.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if last_norm if last else norm:
            layers.append(nn.BatchNorm1d(b, affine=last_affine if last else True))
        if not last:
            layers.append(act())
    return nn.Sequential(*layers)


def projector(*dims: int, norm: bool, last_affine: bool = True) -> nn.Sequential:
    """SimCLR's projector: with `norm`, batch norm after every linear layer, none of which has a bias; without, an
    MLP."""
    return mlp(*dims, norm=norm, last_norm=norm, bias=not norm, last_bias=not norm, last_affine=last_affine)


def kaiming_(module: nn.Module) -> None:
    """Initialise linear layers as OpenSelfSup's heads and necks: Kaiming (fan_in, normal), zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def random_directions(*shape: int) -> Tensor:
    """Random unit vectors, the initial values of a queue."""
    return F.normalize(torch.randn(*shape), dim=-1)


class Prototypes(nn.Module):
    """Dot products with K prototypes, which are unit vectors: (..., D) -> (..., K).

    weight_norm: True normalises the weights in forward (DINO, solo-learn's SwAV); with False the method calls
    `normalize_` after each step, which overwrites the weights (the original SwAV).
    """

    def __init__(self, dim: int, count: int, weight_norm: bool = True):
        super().__init__()
        self.weight_norm = weight_norm
        self.weight = nn.Parameter(random_directions(count, dim))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen`: the weights get a gradient of zero, not none: ZeRO reduces every parameter on every step."""
        weight = self.directions()
        return F.linear(x, weight.detach() + 0.0 * weight if frozen else weight)

    def directions(self) -> Tensor:
        return F.normalize(self.weight, dim=1) if self.weight_norm else self.weight

    @torch.no_grad()
    def normalize_(self, found_inf: Tensor | None = None) -> None:
        """Normalise the weights, also the optimizer's copy under ZeRO, unless `found_inf` is nonzero."""
        with zero.gathered([self.weight]):
            unit = F.normalize(self.weight, dim=1)
            if found_inf is not None:
                unit = torch.where(found_inf != 0, self.weight, unit)
        zero.overwrite_(self.weight, unit)


def vision_transformer(backbone: nn.Module) -> nn.Module:
    """timm's model in `backbone`; ValueError unless it is a vision transformer with one table of position
    embeddings."""
    body = getattr(backbone, "body", None)
    if not all(hasattr(body, name) for name in ("patch_embed", "pos_embed", "blocks")):
        raise ValueError(
            f"backbone.name={backbone.spec.name!r} is not a vision transformer; "
            "use one of timm's, such as 'vit_small_patch16_224'"
        )
    return body


@torch.no_grad()
def fixed_positions_(body: nn.Module, *, columns_first: bool) -> None:
    """Set a vision transformer's position embeddings to fixed sines and cosines (0 for its class token)."""
    rows, columns = body.patch_embed.grid_size
    table = positions.sincos(rows, columns, body.embed_dim, columns_first=columns_first)
    prefix = body.pos_embed.shape[1] - rows * columns
    body.pos_embed.copy_(F.pad(table, (0, 0, prefix, 0))[None])
    body.pos_embed.requires_grad_(False)
