"""RandAugment (https://arxiv.org/abs/1909.13719) on a batch on the device, with separate draws for each sample.

The fourteen operations and their strengths are torchvision v2's on float images in [0, 1] (nearest neighbour, black
outside); samples that drew the same operation are processed together.  Shapes: n samples, S side.
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

MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class RandAugment:
    """`ops` of the fourteen operations for each sample, drawn with replacement; magnitude 0 to 30, with a random sign
    for operations that have two directions."""

    ops: int = 2
    magnitude: float = 9
    waits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(isinstance(self.ops, int) and 1 <= self.ops <= 16, self, "ops", "must be from 1 to 16")
        require(0 <= self.magnitude <= MAX_MAGNITUDE, self, "magnitude", f"must be from 0 to {MAX_MAGNITUDE}")

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor:
        words = random.words(2 * self.ops).view(-1, self.ops, 2)
        operations = list(OPERATIONS.values())
        for i in range(self.ops if len(x) else 0):
            code = below(words[:, i, 0], len(operations))
            sign = torch.where(uniform(words[:, i, 1]) < 0.5, -1.0, 1.0).float()
            order, counts = code.argsort(stable=True), code.bincount(minlength=len(operations)).tolist()
            made = [
                op(x[rows], self.magnitude / MAX_MAGNITUDE, sign[rows])
                for op, rows in zip(operations, order.split(counts))
                if len(rows)
            ]
            x = x.index_copy(0, order, torch.cat(made))
        return x


def _nearest(x: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Nearest pixel at (gx, gy), (n, S, S) in pixels from the centre; black outside."""
    return F.grid_sample(x, torch.stack([gx, gy], -1) / (x.shape[-1] / 2), mode="nearest", align_corners=False)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    d = torch.arange(x.shape[-1], device=x.device) - (x.shape[-1] - 1) / 2
    return d.expand(len(x), x.shape[-1], -1), d[:, None].expand(len(x), -1, x.shape[-1])


def shear_x(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _nearest(x, gx + (0.3 * strength * sign)[:, None, None] * (gy + x.shape[-1] / 2), gy)


def shear_y(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _nearest(x, gx, gy + (0.3 * strength * sign)[:, None, None] * (gx + x.shape[-1] / 2))


def _shift(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    return (int(150 / 331 * x.shape[-1] * strength) * sign)[:, None, None]


def translate_x(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _nearest(x, gx - _shift(x, strength, sign), gy)


def translate_y(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    gx, gy = _centred(x)
    return _nearest(x, gx, gy - _shift(x, strength, sign))


def rotate(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    a = math.radians(30 * strength) * sign[:, None, None]
    gx, gy = _centred(x)
    return _nearest(x, a.cos() * gx - a.sin() * gy, a.sin() * gx + a.cos() * gy)


def _factor(strength: float, sign: Tensor) -> Tensor:
    return (1 + 0.9 * strength * sign)[:, None, None]


def _in_place(op: Callable) -> Callable:
    def run(x: Tensor, strength: float, sign: Tensor) -> Tensor:
        x = x.clone()
        op(x, _factor(strength, sign))
        return x

    return run


def sharpness(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Blends with a 3x3 blur (centre 5, neighbours 1); border pixels do not change."""
    size, factor = x.shape[-1], _factor(strength, sign)[..., None]
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


def posterize(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    levels = 2 ** round(8 - 4 * strength)
    return (x * levels).floor().clamp(0, levels - 1) / levels


def solarize(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    return torch.where(x >= 1 - strength, 1 - x, x)


def autocontrast(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, x, (x - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


def equalize(x: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Equalizes each channel's histogram of 256 levels."""
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
    "Identity": lambda x, strength, sign: x,
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
