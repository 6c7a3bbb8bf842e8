"""The operations of a View by torchvision and kornia, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.augment import View


def blur_size(v: View) -> int:
    """Pixels of the blur's kernel, a tenth of the view's as in SimCLR (https://arxiv.org/abs/2002.05709)."""
    return max(3, v.size // 10 | 1)


def torchvision_view(transforms: ModuleType, v: View, to_float: Callable) -> Callable:
    """transforms: torchvision.transforms, or its v2; `to_float`: the operation before the normalisation."""
    jitter, blur = transforms.ColorJitter(*v.jitter), transforms.GaussianBlur(blur_size(v), v.blur_sigma)
    drawn = [
        *([transforms.RandomApply([jitter], v.jitter_p)] if v.jitter_p else []),
        *([transforms.RandomGrayscale(v.gray)] if v.gray else []),
        *([transforms.RandomApply([blur], v.blur)] if v.blur else []),
    ]
    crop = transforms.RandomResizedCrop(v.size, v.scale, antialias=True)
    flip = transforms.RandomHorizontalFlip(v.flip)
    return transforms.Compose([crop, flip, *drawn, to_float, transforms.Normalize(v.mean, v.std)])


def kornia_views(views: Sequence[View], device: torch.device | str) -> Callable[[Tensor], list[Tensor]]:
    """A function of uint8 images (B, 3, H, W) on the device, which are all views like the first one."""
    import kornia.augmentation as K

    v, side = views[0], blur_size(views[0])
    blur = [K.RandomGaussianBlur((side, side), v.blur_sigma, p=v.blur)] if v.blur else []
    one: Any = K.AugmentationSequential(
        K.RandomResizedCrop((v.size, v.size), v.scale),
        K.RandomHorizontalFlip(p=v.flip),
        K.ColorJitter(*v.jitter, p=v.jitter_p),
        K.RandomGrayscale(p=v.gray),
        *blur,
        K.Normalize(torch.tensor(v.mean), torch.tensor(v.std)),
        data_keys=["input"],
    ).to(device)
    return lambda images: [one(images.float() / 255) for _ in views]
