"""What the exporters share: which tool has which network, and the images that a run trained with."""

from __future__ import annotations

from typing import Literal, NoReturn

from fastssl import backbones
from fastssl.config import Backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where no run names others


Target = Literal["torchvision", "timm", "safetensors", "detectron2", "huggingface"]


def default_target(spec: Backbone) -> Target:
    """A target that has the network: torchvision, timm, or safetensors where no other tool has it."""
    return "safetensors" if spec.sobel else "torchvision" if spec.name in backbones.RESNETS else "timm"


def unsupported(spec: Backbone, to: str, detail: str = "") -> NoReturn:
    raise ValueError(f"{to} has no {spec.name}{detail}: export with --to {default_target(spec)}, or --to safetensors")


def normalization(run: dict | None) -> tuple[tuple, tuple]:
    """Mean and standard deviation of the channels, with values in [0, 1]."""
    return tuple(_view(run).get("mean", MEAN)), tuple(_view(run).get("std", STD))


def image_size(run: dict | None) -> int | None:
    """Side of the images that the run trained with; None if unknown."""
    return _view(run).get("size")


def _view(run: dict | None) -> dict:
    data = (run or {}).get("data", {})
    return data.get("eval_view") or (data.get("views") or [{}])[0]
