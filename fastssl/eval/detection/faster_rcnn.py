"""torchvision's Faster R-CNN with a feature pyramid on our ResNets."""

from __future__ import annotations

import copy
import re
from typing import Literal

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from fastssl.backbones import ResNet

CHANNELS = 256  # of the pyramid


def build(
    backbone: ResNet,
    classes: int,
    *,
    bn: Literal["sync", "frozen"],
    min_size: tuple[int, ...],
    max_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid on layer1 to layer4 of a copy of `backbone`.  Images are resized
    to a short side drawn from `min_size`, the last of them in evaluation mode."""
    torch.manual_seed(seed)
    net = copy.deepcopy(backbone)
    if bn == "frozen":
        freeze(net)
    layers, norm = {f"layer{i}": str(i - 1) for i in range(1, 5)}, nn.BatchNorm2d if bn == "sync" else None
    body = BackboneWithFPN(net, layers, list(net.stages[1:]), CHANNELS, norm_layer=norm)
    return FasterRCNN(body, classes + 1, min_size=min_size, max_size=max_size, image_mean=mean, image_std=std)


def freeze(module: nn.Module) -> None:
    """Replace every batch norm by torchvision's frozen one, whose output is that of evaluation mode."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze(child)


def without_decay(model: nn.Module) -> dict[str, dict]:
    """optim.paramwise that exempts norms, as detectron2's WEIGHT_DECAY_NORM = 0 does (biases of others decay)."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    names = [
        f"{name}.{parameter}"
        for name, m in model.named_modules()
        if isinstance(m, kinds)
        for parameter, _ in m.named_parameters(recurse=False)
    ]
    return {f"^({'|'.join(map(re.escape, names))})$": {"weight_decay": 0.0}} if names else {}
