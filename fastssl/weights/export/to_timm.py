"""A .pth for timm's network of the same name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastssl import backbones, files
from fastssl.config import Backbone
from fastssl.weights.export.common import unsupported
from fastssl.weights.export.to_torchvision import first_convolution


def write(state: dict[str, Tensor], spec: Backbone, path: Path, run: dict | None) -> str:
    name, options = timm_model(spec)
    arguments = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": 0, **options}.items())
    lines = ["import timm, torch", f"net = timm.create_model({name!r}, {arguments})"]
    if spec.stem != "imagenet":
        lines += [first_convolution(spec), "net.maxpool = torch.nn.Identity()"]
    if spec.stem == "cifar_norelu":
        lines += ["net.act1 = torch.nn.Identity()"]
    with files.atomic_write(path) as temporary:
        torch.save(state, temporary)
    return "\n".join([*lines, f"net.load_state_dict(torch.load({str(path)!r}))"])


def timm_model(spec: Backbone) -> tuple[str, dict]:
    """timm's name for this network and create_model's options; its ResNets have torchvision's keys."""
    import timm

    name = spec.name.removeprefix("timm/")
    if not timm.is_model(name) or spec.width != 64:
        unsupported(spec, "timm", f" of width {spec.width}")
    options: dict = {"in_chans": spec.in_channels} if spec.in_channels != 3 else {}
    options |= backbones.timm_defaults(name) | spec.options
    if spec.norm == "gn":
        options["norm_layer"] = "groupnorm"
    if name == "resnet50" and spec.norm == "gn":
        name = "resnet50_gn"
        del options["norm_layer"]
    return name, options
