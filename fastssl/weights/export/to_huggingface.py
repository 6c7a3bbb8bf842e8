"""A folder that timm loads, with a model card, ready to upload to Hugging Face."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastssl import files
from fastssl.config import Backbone
from fastssl.weights.export.common import image_size, normalization
from fastssl.weights.export.model_card import model_card
from fastssl.weights.export.to_timm import timm_model
from fastssl.weights.source import metadata


def write(state: dict[str, Tensor], spec: Backbone, path: Path, run: dict | None) -> str:
    name, options = timm_model(spec)
    if spec.stem != "imagenet":
        raise ValueError(
            f"a Hugging Face folder names a network that timm builds, and timm has no {name} with "
            f"stem={spec.stem!r}: export with --to torchvision, timm or safetensors"
        )
    import timm

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **options)
    if {k: v.shape for k, v in net.state_dict().items()} != {k: v.shape for k, v in state.items()}:
        raise ValueError(f"timm {timm.__version__} builds another {name} than this one: export to safetensors")
    mean, std = normalization(run)
    size = image_size(run) or net.pretrained_cfg["input_size"][-1]
    if getattr(getattr(net, "patch_embed", None), "strict_img_size", False):
        size = net.pretrained_cfg["input_size"][-1]
    cfg = {
        "input_size": [spec.in_channels, size, size],
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 0,
        "first_conv": None,
        "classifier": None,
    }
    config = {"architecture": name, "num_classes": 0, "num_features": net.num_features, "pretrained_cfg": cfg}
    if options:
        config["model_args"] = options
    files.write_safetensors(path / "model.safetensors", state, metadata(spec))
    recipe = f"import timm\nnet = timm.create_model({'local-dir:' + str(path)!r}, pretrained=True)"
    files.write_json(path / "config.json", config, indent=2)
    with files.atomic_write(path / "README.md") as temporary:
        temporary.write_text(model_card(path / "model.safetensors", name, run))
    return recipe
