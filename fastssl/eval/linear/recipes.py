"""The settings of the published linear protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastssl.config import Optim
from fastssl.optim import lr_multiplier


@dataclass(frozen=True)
class Recipe:
    lr: float  # for `batch`
    epochs: int
    batch: int = 256
    layers: tuple[str, ...] | None = ("last",)  # None: all maps
    milestones: tuple[float, ...] = ()  # epochs where the rate falls to a tenth; none: a cosine by epochs
    weight_decay: float = 0.0
    nesterov: bool = False
    lars: bool = False
    norm: bool = False  # batch norm over all ranks without affine, per channel of the pooled map
    augment: Literal["resized", "jittered", "window"] = "resized"
    # "selected_on" of the row that papers report: "none", the last epoch, or "test", the best one
    published: Literal["none", "test"] = "none"


RECIPES = {
    "moco": Recipe(30.0, 100, milestones=(60, 80), published="test"),
    "multi": Recipe(
        0.01, 90, layers=None, milestones=(30, 60, 90), weight_decay=1e-4, nesterov=True, norm=True, augment="jittered"
    ),
    "places205": Recipe(
        0.01, 28, layers=None, milestones=(7, 14, 21), weight_decay=1e-4, nesterov=True, norm=True, augment="window"
    ),
    "lars": Recipe(1.6, 90, batch=4096, lars=True, published="test"),
}


def rate_factor(recipe: Recipe, epoch: int) -> float:
    """What the learning rate is multiplied by in an epoch."""
    optim = Optim(schedule="step" if recipe.milestones else "cosine_epoch", gamma=0.1, milestones=recipe.milestones)
    return lr_multiplier(optim, epoch * 1000, 1000, recipe.epochs * 1000)  # 1000: milestones may fall into an epoch
