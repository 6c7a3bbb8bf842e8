"""Images, views and batches for the tests of kernels/augment."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.kernels.augment import View

RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHAPES = [(48, 64), (64, 48), (40, 40), (33, 90), (57, 41), (32, 32), (120, 100), (47, 31)]
STRONG: dict[str, Any] = {"flip": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "gray": 0.2, "blur": 0.5}
WEAK: dict[str, Any] = {
    "flip": 0.5,
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "jitter_p": 0.8,
    "gray": 0.2,
    "interpolation": "bicubic",
}

ONE_OP = {
    "crop_bilinear": View(32),
    "crop_bicubic": View(32, interpolation="bicubic"),
    "crop_odd": View(27),
    "upsample": View(61),
    "crop_one_pixel": View(1),
    "flip": View(24, flip=0.5),
    "rotate": View(32, rotate=20.0),
    "rotate_far": View(24, rotate=180.0),
    "gray": View(24, gray=0.5),
    "blur": View(33, blur=0.7),
    "blur_wide": View(9, blur=1.0, blur_sigma=(0.05, 4.0)),
    "solarize": View(24, solarize=0.5),
    "brightness": View(24, jitter=(0.8, 0, 0, 0), jitter_p=1.0),
    "contrast": View(24, jitter=(0, 0.8, 0, 0), jitter_p=1.0),
    "saturation": View(24, jitter=(0, 0, 0.8, 0), jitter_p=1.0),
    "hue": View(24, jitter=(0, 0, 0, 0.5), jitter_p=1.0),
    "jitter": View(24, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8),
    "jitter_strong": View(24, jitter=(2.0, 2.0, 2.0, 0.5), jitter_p=1.0),
    "quarter_turn": View(24, flip=0.5, quarter_turns=1),
    "half_turn": View(24, quarter_turns=2),
    "three_quarters": View(24, quarter_turns=3),
    "center": View(24, crop="center", resize=28),
    "center_bicubic": View(24, crop="center", resize=29, interpolation="bicubic"),
    "center_cut": View(31, crop="center"),
    "center_padded": View(97, crop="center"),
    "squash": View(24, crop="squash"),
    "random": View(24, crop="random"),
    "random_resized_first": View(24, crop="random", resize=36),
    "random_padded": View(32, crop="random", pad=4),
    "random_reflected": View(32, crop="random", pad=4, pad_mode="reflect"),
    "patch": View(10, crop="patch", resize=50, window=45, cell=5, gray=0.5),
    "order": View(
        24,
        jitter=(0.4,) * 4,
        jitter_p=1.0,
        gray=0.5,
        blur=0.5,
        solarize=0.5,
        order=("solarize", "jitter", "blur", "gray"),
    ),
}


class Case(NamedTuple):
    """A batch to time: images of one size, and their views."""

    batch: int
    height: int
    width: int
    views: tuple[View, ...]


BENCH = {
    "simclr_32": Case(512, 32, 32, (View(32, interpolation="bicubic", **STRONG),) * 2),
    "simclr_64": Case(256, 64, 64, (View(64, **STRONG),) * 2),
    "simclr_224": Case(256, 375, 500, (View(224, **STRONG),) * 2),
    "simclr_224_of_256": Case(256, 256, 341, (View(224, **STRONG),) * 2),
    "byol_224": Case(256, 375, 500, (View(224, blur=1.0, **WEAK), View(224, blur=0.1, solarize=0.2, **WEAK))),
    "swav": Case(
        64, 375, 500, (View(224, scale=(0.14, 1.0), **STRONG),) * 2 + (View(96, scale=(0.05, 0.14), **STRONG),) * 6
    ),
    "rotation_224": Case(128, 375, 500, tuple(View(224, flip=0.5, quarter_turns=k, stream=0) for k in range(4))),
    "patches_64": Case(
        128,
        375,
        500,
        tuple(View(64, crop="patch", resize=292, window=255, cell=k, gray=0.66, stream=0) for k in range(9)),
    ),
    "deepcluster_224": Case(
        256, 375, 500, (View(224, flip=0.5, rotate=2.0, jitter=(0.4, 0.4, 1.0, 0.5), jitter_p=1.0, gray=0.2),)
    ),
    "center_224": Case(256, 375, 500, (View(224, crop="center", resize=256),)),
    "dinov2_518": Case(32, 640, 800, (View(518, **STRONG),) * 2),
}


def scenes(shapes: Iterable[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """uint8 (h, w, 3) images with edges, gradients, saturated and gray areas."""
    rng = np.random.default_rng(seed)
    out = []
    for h, w in shapes:
        y, x = np.mgrid[0:h, 0:w]
        ramp = np.stack([y * 255 / h, x * 255 / w, (y + x) * 255 / (h + w)], -1)
        blocks = rng.integers(0, 256, (8, 8, 3))[y * 8 // h, x * 8 // w]
        im = np.where(((y // 7 + x // 5) % 3 == 0)[..., None], blocks, ramp)
        im[: h // 8] = im[: h // 8, :, :1]  # gray pixels have no hue
        im[:, -max(1, w // 10) :] = rng.choice([0, 255], (h, max(1, w // 10), 3))
        out.append(im.astype(np.uint8))
    return out


def pack(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """pixels, sizes and index of a list of images; images are followed by noise that no view may read."""
    max_pixels = max(im.shape[0] * im.shape[1] for im in images)
    pixels = torch.randint(0, 256, (len(images), max_pixels, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    for row, im in zip(pixels, images):
        row[: im.shape[0] * im.shape[1]] = torch.from_numpy(im.copy()).view(-1, 3)
    sizes = torch.tensor([im.shape[:2] for im in images], dtype=torch.int32)
    return pixels, sizes, torch.arange(100, 100 + len(images))
