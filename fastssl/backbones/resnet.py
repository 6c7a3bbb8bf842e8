"""The ResNet family of torchvision, with its names and state-dict keys, and smaller networks (resnet10, width=16).

https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from fastssl.config import STEMS, Backbone

# name: block, blocks per stage, groups, width per group
RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 1, 64),  # not in torchvision: for smoke runs on a CPU
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), 1, 128),
}


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least two channels each; a group of one channel would remove its mean in each image."""
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


class ResNet(nn.Module):
    """torchvision's ResNet without fc, with equal keys, initialisation and outputs; `width` scales all channels."""

    def __init__(self, spec: Backbone) -> None:
        super().__init__()
        self.spec = spec
        block, blocks, groups, group_width = RESNETS[spec.name]
        if spec.options:
            raise ValueError(
                f"backbone.options={spec.options} are arguments of timm's models, but {spec.name!r} is torchvision's: "
                f"set backbone.name='timm/{spec.name}', or use backbone.width, stem, norm, ... instead"
            )
        if spec.width != 64 and (groups, group_width) != (1, 64):
            raise ValueError(f"backbone.width={spec.width}: the width of {spec.name} is fixed; leave backbone.width=64")
        norm = {"bn": nn.BatchNorm2d, "gn": group_norm, "frozen": FrozenBatchNorm2d}[spec.norm]
        if not 0 <= spec.frozen < 5:
            raise ValueError(
                f"backbone.frozen={spec.frozen} must be 0 to 4, the number of stages to freeze; the stem is "
                "the first stage"
            )
        self.sobel = Sobel() if spec.sobel else nn.Identity()
        self.conv1 = _stem(spec)
        self.bn1 = norm(spec.width)
        self.relu = nn.Identity() if spec.stem == "cifar_norelu" else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if spec.stem == "imagenet" else nn.Identity()
        make = partial(block, groups=groups, base_width=group_width, norm_layer=norm)
        channels = spec.width
        for i, count in enumerate(blocks):
            planes = spec.width << i
            out = planes * block.expansion
            setattr(self, f"layer{i + 1}", _stage(make, channels, planes, out, count, 2 if i else 1, norm))
            channels = out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dim = channels
        self.stages = (spec.width, *(channels >> i for i in (3, 2, 1, 0)))
        self._init(spec.zero_init_residual)
        for part in self._frozen():
            part.requires_grad_(False)

    def _init(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode=self.spec.init, nonlinearity="relu")
            elif zero_init_residual and isinstance(m, BasicBlock | Bottleneck):
                nn.init.zeros_((m.bn2 if isinstance(m, BasicBlock) else m.bn3).weight)

    def _frozen(self) -> list[nn.Module]:
        stages = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3]][: self.spec.frozen]
        return [part for stage in stages for part in stage]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the stem (after ReLU, before the max-pool) and of layer1 to layer4, with `stages`
        channels."""
        maps = [self.relu(self.bn1(self.conv1(self.sobel(x))))]
        maps.append(self.layer1(self.maxpool(maps[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.avgpool(self.forward_stages(x)[-1]).flatten(1)


class Sobel(nn.Module):
    """(B, 3, H, W) -> (B, 2, H, W): horizontal and vertical gradient of the mean over channels (DeepCluster)."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.mean(1, keepdim=True), self.filters.to(x.dtype), padding=1)


def _stem(spec: Backbone) -> nn.Conv2d:
    kernel, stride, padding = STEMS[spec.stem]
    return nn.Conv2d(2 if spec.sobel else spec.in_channels, spec.width, kernel, stride, padding, bias=False)


def _stage(
    make: partial[nn.Module],
    channels: int,
    planes: int,
    out: int,
    count: int,
    stride: int,
    norm: Callable[[int], nn.Module],
) -> nn.Sequential:
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), norm(out))
    return nn.Sequential(make(channels, planes, stride, shortcut), *(make(out, planes) for _ in range(count - 1)))
