"""A .pth for torchvision's ResNets and for thinner ones that its class can build."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from fastssl import backbones, files
from fastssl.config import STEMS, Backbone
from fastssl.weights.export.common import unsupported


def write(state: dict[str, Tensor], spec: Backbone, path: Path, run: dict | None) -> str:
    if spec.name not in backbones.RESNETS:
        unsupported(spec, "torchvision")
    recipe = _recipe(spec)
    with files.atomic_write(path) as temporary:
        torch.save(state, temporary)
    return f"{recipe}\nnet.load_state_dict(torch.load({str(path)!r}))"


def _recipe(spec: Backbone) -> str:
    lines, norm, argument = ["import torch, torchvision"], "torch.nn.BatchNorm2d", ""
    if spec.norm == "gn":
        lines = ["import math, torch, torchvision", "norm = lambda c: torch.nn.GroupNorm(math.gcd(32, c // 2), c)"]
        norm, argument = "norm", "norm_layer=norm"
    if hasattr(torchvision.models, spec.name) and spec.width == 64:
        lines += [f"net = torchvision.models.{spec.name}({argument})"]
    else:  # torchvision's class with stages of other lengths and widths
        block, blocks, *_ = backbones.RESNETS[spec.name]
        lines += [
            f"from torchvision.models.resnet import {block.__name__}, ResNet",
            f"net = ResNet({', '.join(filter(None, [block.__name__, str(list(blocks)), argument]))})",
        ]
        if spec.width != 64:
            lines += [
                f"net.inplanes, net.bn1 = {spec.width}, {norm}({spec.width})",
                f"for i, blocks in enumerate({list(blocks)}):",
                f"    stage = net._make_layer({block.__name__}, {spec.width} << i, blocks, stride=2 if i else 1)",
                '    setattr(net, f"layer{i + 1}", stage)',
            ]
    if (spec.stem, spec.in_channels, spec.width) != ("imagenet", 3, 64):
        lines += [first_convolution(spec)]
    if spec.stem != "imagenet":
        lines += ["net.maxpool = torch.nn.Identity()"]
    if spec.stem == "cifar_norelu":
        lines += ["net.relu = torch.nn.Identity()  # after the first norm; the blocks have their own"]
    return "\n".join([*lines, "net.fc = torch.nn.Identity()"])


def first_convolution(spec: Backbone) -> str:
    """Code that gives `net` the first convolution of `spec`."""
    kernel, stride, padding = STEMS[spec.stem]
    return (
        f"net.conv1 = torch.nn.Conv2d({spec.in_channels}, {spec.width}, {kernel}, stride={stride}, "
        f"padding={padding}, bias=False)"
    )
