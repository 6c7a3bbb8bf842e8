"""RandAugment (https://arxiv.org/abs/1909.13719) on a batch on the device, each sample with operations of its own.

The fourteen operations and their strengths are torchvision v2's on float images in [0, 1] (nearest neighbour, black
outside); samples that drew the same operation are worked on together.  Letters: n samples, S side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import below, uniform
from . import reference
from .extra import Random, require

STRENGTHS = 30  # magnitudes are parts of it


@dataclass(frozen=True)
class RandAugment:
    """`ops` of the fourteen operations for each sample, drawn with replacement; magnitude 0 to 30, its sign drawn where
    an operation has two directions."""

    ops: int = 2
    magnitude: float = 9
    waits: ClassVar[bool] = True

    def __post_init__(self):
        require(isinstance(self.ops, int) and 1 <= self.ops <= 16, self, "ops", "is a number from 1 to 16")
        require(0 <= self.magnitude <= STRENGTHS, self, "magnitude", f"is 0 to {STRENGTHS}")

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor:
        words = random.words(2 * self.ops).view(-1, self.ops, 2)
        operations = list(OPERATIONS.values())
        for turn in range(self.ops if len(x) else 0):
            code = below(words[:, turn, 0], len(operations))
            sign = torch.where(uniform(words[:, turn, 1]) < 0.5, -1.0, 1.0).float()
            order, counts = code.argsort(stable=True), code.bincount(minlength=len(operations)).tolist()
            made = [
                op(x[rows], self.magnitude / STRENGTHS, sign[rows])
                for op, rows in zip(operations, order.split(counts))
                if len(rows)
            ]
            x = x.index_copy(0, order, torch.cat(made))
        return x


def _sample(x: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Nearest pixel at (gx, gy), (n, S, S) in pixels from the centre; black outside."""
    return F.grid_sample(x, torch.stack([gx, gy], -1) / (x.shape[-1] / 2), mode="nearest", align_corners=False)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    d = torch.arange(x.shape[-1], device=x.device) - (x.shape[-1] - 1) / 2
    return d.expand(len(x), x.shape[-1], -1), d[:, None].expand(len(x), -1, x.shape[-1])


def shear_x(x: Tensor, part: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _sample(x, gx + (0.3 * part * sign)[:, None, None] * (gy + x.shape[-1] / 2), gy)


def shear_y(x: Tensor, part: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _sample(x, gx, gy + (0.3 * part * sign)[:, None, None] * (gx + x.shape[-1] / 2))


def _shift(x: Tensor, part: float, sign: Tensor) -> Tensor:
    return (int(150 / 331 * x.shape[-1] * part) * sign)[:, None, None]


def translate_x(x: Tensor, part: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _sample(x, gx - _shift(x, part, sign), gy)


def translate_y(x: Tensor, part: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _sample(x, gx, gy - _shift(x, part, sign))


def rotate(x: Tensor, part: float, sign: Tensor) -> Tensor:
    a = math.radians(30 * part) * sign[:, None, None]
    gx, gy = _centred(x)
    return _sample(x, a.cos() * gx - a.sin() * gy, a.sin() * gx + a.cos() * gy)


def _factor(part: float, sign: Tensor) -> Tensor:
    return (1 + 0.9 * part * sign)[:, None, None]


def _in_place(op: Callable) -> Callable:
    def run(x: Tensor, part: float, sign: Tensor) -> Tensor:
        x = x.clone()
        op(x, _factor(part, sign))
        return x

    return run


def sharpness(x: Tensor, part: float, sign: Tensor) -> Tensor:
    """Blended with a 3x3 blur (centre 5, neighbours 1) inside; the border stays."""
    size, factor = x.shape[-1], _factor(part, sign)[..., None]
    if size <= 2:
        return x
    inner = x[..., 1:-1, 1:-1]
    blurred = 4 * inner
    for i in range(3):
        for j in range(3):
            blurred = blurred + x[..., i : size - 2 + i, j : size - 2 + j]
    out = x.clone()
    out[..., 1:-1, 1:-1] = inner * factor + blurred / 13 * (1 - factor)
    return out.clamp_(0, 1)


def posterize(x: Tensor, part: float, sign: Tensor) -> Tensor:
    levels = 2 ** round(8 - 4 * part)
    return (x * levels).floor().clamp(0, levels - 1) / levels


def solarize(x: Tensor, part: float, sign: Tensor) -> Tensor:
    return torch.where(x >= 1 - part, 1 - x, x)


def autocontrast(x: Tensor, part: float, sign: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, x, (x - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


def equalize(x: Tensor, part: float, sign: Tensor) -> Tensor:
    """Of each channel's histogram in 256 levels."""
    level = (x * 255.999).long().clamp(0, 255).flatten(2)
    row = torch.arange(3 * len(x), device=x.device).view(-1, 3, 1)
    count = (row * 256 + level).flatten().bincount(minlength=3 * len(x) * 256).view(-1, 3, 256)
    total = count.cumsum(2)
    above = (torch.arange(256, device=x.device) * (count > 0)).amax(2, keepdim=True)
    step = (level.shape[2] - count.gather(2, above)) // 255  # all but the highest level that occurs
    table = ((total - count + step // 2) // step.clamp(min=1)).clamp(0, 255)
    out = torch.where(step > 0, table.gather(2, level), level)
    return (out / 255).view_as(x)


OPERATIONS = {
    "Identity": lambda x, part, sign: x,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": _in_place(reference.brightness),
    "Color": _in_place(reference.saturation),
    "Contrast": _in_place(reference.contrast),
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
}
