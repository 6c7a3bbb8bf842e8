"""The augmentations of the published linear protocols.

Each is a function of the evaluation view that returns a View, which kernels/augment cuts, and None or `finish(x, index,
epoch, seed)`, which does the rest to the normalised images x (B, 3, S, S).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastssl.eval.common import finetuning
from fastssl.kernels.augment import View
from fastssl.kernels.augment.extra import Lighting
from fastssl.kernels.philox import below, philox4x32, uniform

STREAM = 2**32 - 1  # Philox stream of the numbers drawn here; that of a view is its position in the recipe
Augmentation = tuple[View, Callable[..., Tensor] | None]


def resized(view: View) -> Augmentation:
    """A random-resized crop and a flip."""
    return finetuning.training_view(view), None


def jittered(view: View) -> Augmentation:
    """As `resized`, then jitter of brightness, contrast and saturation, and colour noise."""
    training = finetuning.training_view(view)
    return replace(training, jitter=(0.4, 0.4, 0.4, 0.0), jitter_p=1.0, extra=(Lighting(0.1),)), None


def window(view: View) -> Augmentation:
    """Resize(256), CenterCrop(256), RandomCrop(224) and flip, for 224 pixels; 8/7 of any other size."""
    side = round(view.size * 8 / 7)
    larger = replace(view, size=side, resize=side)
    return larger, lambda x, *key: random_window(x, view.size, *key)


AUGMENT = {"resized": resized, "jittered": jittered, "window": window}


def random_window(x: Tensor, size: int, index: Tensor, epoch: int, seed: int) -> Tensor:
    """RandomCrop(size) and a flip of half of the images (B, 3, side, side), by (sample, epoch, seed)."""
    top, left, flip, _ = philox4x32(torch.zeros_like(index), STREAM, index, epoch, seed)
    positions, step = x.shape[-1] - size + 1, torch.arange(size, device=x.device)
    row = below(top, positions)[:, None] + step
    column = below(left, positions)[:, None] + torch.where(uniform(flip)[:, None] < 0.5, size - 1 - step, step)
    sample, channel = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    out = x[sample[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None, :]]
    return out.contiguous(memory_format=torch.channels_last)
