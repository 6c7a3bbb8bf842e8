"""Augmentation recipes: tuples of `View`, one for each view of an image.  A View is data; kernels/augment applies it.

The numbers are those of OpenSelfSup's configs for 224 pixels.  solo-learn's recipes for CIFAR-10 are the same
operations with bicubic crops: simclr(32, interpolation="bicubic", **CIFAR10).  Keyword arguments of a recipe are fields
of View and change all its views: simclr(224, extra=(Lighting(0.1), Erase(p=0.25))).
"""

from dataclasses import replace
from typing import TypedDict

from fastssl.files.datacard import DataCard
from fastssl.kernels.augment import View
from fastssl.kernels.augment.extra import Erase, Lighting, Random, Transform
from fastssl.kernels.augment.randaugment import RandAugment


class Normalization(TypedDict):
    """Of pixels in [0, 1]: (x - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10: Normalization = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CIFAR100: Normalization = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


def _views(*views: View, **changes) -> tuple[View, ...]:
    return tuple(replace(view, **changes) for view in views)


def simclr(size: int = 224, **changes) -> tuple[View, ...]:
    """Two views with strong colour jitter (solo-learn's "symmetric")."""
    view = View(size, flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2, blur=0.5)
    return _views(view, view, **changes)


def moco_v1(size: int = 224, **changes) -> tuple[View, ...]:
    """Two views: random grayscale, then colour jitter with probability 1."""
    return npid(size, **changes) * 2


def moco_v2(size: int = 224, **changes) -> tuple[View, ...]:
    """Two views with moderate colour jitter, also for SimSiam (solo-learn's "symmetric_weak" has scale=(0.08, 1))."""
    view = View(size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5)
    return _views(view, view, **changes)


def byol(
    size: int = 224, *, blur: tuple[float, float] = (1.0, 0.1), solarize: tuple[float, float] = (0.0, 0.2), **changes
) -> tuple[View, ...]:
    """Two views with different probabilities of blur and solarization; also for Barlow Twins, VICReg, and (with
    bilinear crops) MoCo v3.  solo-learn's "asymmetric", which has blur=(0, 0) at 32 pixels."""
    view = View(size, interpolation="bicubic", flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2)
    return _views(*(replace(view, blur=b, solarize=s) for b, s in zip(blur, solarize)), **changes)


def swav(
    size: int = 224,
    *,
    crops: int = 2,
    small: int = 96,
    small_crops: int = 6,
    scale: tuple[float, float] = (0.14, 1.0),
    small_scale: tuple[float, float] = (0.05, 0.14),
    **changes,
) -> tuple[View, ...]:
    """Multi-crop: `crops` large views, then `small_crops` views of `small` pixels."""
    view = simclr(size)[0]
    large, local = replace(view, scale=scale), replace(view, size=small, scale=small_scale)
    return _views(*[large] * crops, *[local] * small_crops, **changes)


def dino(
    size: int = 224,
    *,
    small: int = 96,
    small_crops: int = 8,
    scale: tuple[float, float] = (0.4, 1.0),
    small_scale: tuple[float, float] = (0.05, 0.4),
    **changes,
) -> tuple[View, ...]:
    """Multi-crop: BYOL's two views, then `small_crops` views of `small` pixels (blur 0.5, no solarization)."""
    large = byol(size, scale=scale)
    local = replace(large[0], size=small, scale=small_scale, blur=0.5)
    return _views(*large, *[local] * small_crops, **changes)


def mae(size: int = 224, **changes) -> tuple[View, ...]:
    """One view: crop and flip."""
    return _views(View(size, scale=(0.2, 1.0), interpolation="bicubic", flip=0.5), **changes)


def npid(size: int = 224, **changes) -> tuple[View, ...]:
    """One view, as in MoCo v1."""
    return _views(
        View(
            size,
            scale=(0.2, 1.0),
            flip=0.5,
            jitter=(0.4, 0.4, 0.4, 0.4),
            jitter_p=1.0,
            gray=0.2,
            order=("gray", "jitter", "blur", "solarize"),
        ),
        **changes,
    )


def rotation(size: int = 224, **changes) -> tuple[View, ...]:
    """Four views: the same crop rotated by 0, 90, 180 and 270 degrees; the label is the index of the view."""
    return _views(*(View(size, flip=0.5, quarter_turns=k, stream=0) for k in range(4)), **changes)


def patches(size: int = 64, *, resize: int = 292, window: int = 255, **changes) -> tuple[View, ...]:
    """Nine views for relative location: patches of `size` pixels at random positions in the cells of a 3x3 grid over
    one crop of `window` pixels, row by row; view 4 is the centre."""
    return _views(
        *(View(size, crop="patch", resize=resize, window=window, cell=cell, gray=0.66, stream=0) for cell in range(9)),
        **changes,
    )


def deepcluster(size: int = 224, **changes) -> tuple[View, ...]:
    """One view, also for ODC, with rotations of up to 2 degrees and any change of hue."""
    return _views(View(size, flip=0.5, rotate=2.0, jitter=(0.4, 0.4, 1.0, 0.5), jitter_p=1.0, gray=0.2), **changes)


def supervised(size: int = 224, **changes) -> tuple[View, ...]:
    """One view for supervised training and linear probes: random resized crop and flip."""
    return _views(View(size, flip=0.5), **changes)


def padded(size: int = 32, *, pad: int = 4, **changes) -> tuple[View, ...]:
    """One view for supervised training on CIFAR: crop of the padded image, and flip."""
    return _views(View(size, crop="random", pad=pad, flip=0.5), **changes)


def center(size: int = 224, resize: int | None = None, **changes) -> tuple[View, ...]:
    """One deterministic view for evaluation: Resize(resize) of the short side, then CenterCrop(size).

    Without `resize` there is only the crop.  ImageNet's protocol is center(224, 256), CIFAR-10's center(32).
    """
    return _views(View(size, crop="center", resize=resize), **changes)


def default_view(training: View, card: DataCard | None = None) -> View:
    """The centre crop at the size of a training view, with its normalisation.

    Square images of one size are shown whole; others are resized to 8/7 of the size on the short side (256 for 224).
    """
    sides = {card.min_side, card.max_height, card.max_width} if card else {None}
    same = len(sides) == 1 and None not in sides
    resize = None if sides == {training.size} else training.size if same else round(training.size * 8 / 7)
    (view,) = center(training.size, resize)
    return replace(view, mean=training.mean, std=training.std)
