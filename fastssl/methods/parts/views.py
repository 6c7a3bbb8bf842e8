"""Networks applied to the views of a batch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


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
