"""The augmentations of the published linear protocols.

Each is a function of the evaluation view that returns a View, which kernels/augment cuts, and `finish(x, index, epoch,
seed)`, which does the rest to the normalised images x (B, 3, S, S).  Random numbers depend on the sample's number, the
epoch and the seed, as in the views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastssl.eval.common import finetuning
from fastssl.kernels.augment import View
from fastssl.kernels.philox import below, philox4x32, uniform

# AlexNet's colour noise (https://papers.nips.cc/paper/4824, section 4.1) with OpenSelfSup's strength; of RGB in [0, 1]
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LIGHTING = 0.1
STREAM = 2**32 - 1  # Philox stream of the numbers drawn here; that of a view is its position in the recipe
Augmentation = tuple[View, Callable[..., Tensor]]


def resized(view: View) -> Augmentation:
    """A random-resized crop and a flip."""
    return finetuning.training_view(view), lambda x, *_: x


def jittered(view: View) -> Augmentation:
    """As `resized`, then jitter of brightness, contrast and saturation, and colour noise.  OpenSelfSup adds the noise
    before the normalisation; here it is divided by the standard deviation and added afterwards."""
    jitter = replace(finetuning.training_view(view), jitter=(0.4, 0.4, 0.4, 0.0), jitter_p=1.0)

    def finish(x: Tensor, *key) -> Tensor:
        noise = lighting(*key)
        return x + (noise / noise.new_tensor(view.std))[:, :, None, None].to(x.dtype)

    return jitter, finish


def window(view: View) -> Augmentation:
    """Resize(256), CenterCrop(256), RandomCrop(224) and flip, for 224 pixels; 8/7 of any other size."""
    side = round(view.size * 8 / 7)
    larger = replace(view, size=side, resize=side)
    return larger, lambda x, *key: random_window(x, view.size, *key)


AUGMENT = {"resized": resized, "jittered": jittered, "window": window}


def random_words(index: Tensor, epoch: int, seed: int) -> tuple[Tensor, ...]:
    return philox4x32(torch.zeros_like(index), STREAM, index, epoch, seed)


def lighting(index: Tensor, epoch: int, seed: int) -> Tensor:
    """float64 (B, 3), added to RGB in [0, 1]: the principal components of ImageNet's colours times N(0, 0.1)."""
    u = [(uniform(word) + 2.0**-33) for word in random_words(index, epoch, seed)]  # never 0
    radius = [(-2 * torch.log(v)).sqrt() for v in u[:2]]
    angle = [2 * torch.pi * v for v in u[2:]]
    normal = torch.stack([radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos()], 1)
    scale = torch.tensor(EIGENVALUES, dtype=normal.dtype, device=normal.device)
    return LIGHTING * (normal * scale) @ torch.tensor(EIGENVECTORS, dtype=normal.dtype, device=normal.device).T


def random_window(x: Tensor, size: int, index: Tensor, epoch: int, seed: int) -> Tensor:
    """RandomCrop(size) and a flip of half of the images (B, 3, side, side)."""
    top, left, flip, _ = random_words(index, epoch, seed)
    positions, step = x.shape[-1] - size + 1, torch.arange(size, device=x.device)
    row = below(top, positions)[:, None] + step
    column = below(left, positions)[:, None] + torch.where(uniform(flip)[:, None] < 0.5, size - 1 - step, step)
    sample, channel = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    out = x[sample[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None, :]]
    return out.contiguous(memory_format=torch.channels_last)
