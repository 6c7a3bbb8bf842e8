"""timm's models as backbones, and the options of their constructors."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.config import Backbone
from fastssl.parsing import did_you_mean


class Timm(nn.Module):
    """A timm model without its classifier, in the attribute `body`."""

    def __init__(self, name: str, spec: Backbone) -> None:
        super().__init__()
        self.spec = spec
        plain = Backbone()
        for key in ("stem", "norm", "width", "zero_init_residual", "init", "sobel", "frozen"):
            if getattr(spec, key) != getattr(plain, key):
                raise ValueError(f"backbone.{key}={getattr(spec, key)!r} does not apply to timm's {name}: remove it")
        self.body = timm_model(name, spec, **timm_defaults(name))
        positions.use_dino_resampling_(self.body)
        self.dim = getattr(self.body, "head_hidden_size", self.body.num_features)
        self.stages = tuple(f["num_chs"] for f in self.body.feature_info)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        return self.body.forward_intermediates(x, intermediates_only=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# Arguments of timm.create_model that are not backbone.options, with the reason
NOT_OPTIONS = {
    "num_classes": "a backbone has no classifier",
    "in_chans": "use backbone.in_channels",
    "device": "the network is moved to the device later",
    "dtype": "use optim.precision",
    "features_only": "forward_stages gives the features of all stages",
    **dict.fromkeys(
        ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        "use backbone.pretrained",
    ),
    **dict.fromkeys(("scriptable", "exportable", "no_jit"), "it does not change the network"),
}


def timm_signature(name: str) -> list[str]:
    """Names of the constructor arguments of timm's model `name` that can be backbone.options."""
    import timm

    with torch.device("meta"):
        kind = type(timm.create_model(name))
    return [key for key in inspect.signature(kind).parameters if key not in NOT_OPTIONS]


def timm_defaults(name: str) -> dict:
    """Our defaults of options: transformers accept crops of any size (for multi-crop or 32 pixels)."""
    return {"dynamic_img_size": True} if "dynamic_img_size" in timm_signature(name) else {}


def timm_model(name: str, spec: Backbone, **defaults) -> nn.Module:
    """timm's model without a classifier, with `spec.options`, and `defaults` for other options.  ValueError for an
    unknown option or a value that timm does not accept."""
    import timm

    for key, value in spec.options.items():
        if key in NOT_OPTIONS:
            raise ValueError(f"backbone.options.{key}: {NOT_OPTIONS[key]}")
        if not _is_data(value):
            raise ValueError(
                f"backbone.options.{key}={value!r} cannot be written to config.json: it must be a number, a string, a "
                "bool, None or a list of these"
            )
    arguments = {"num_classes": 0, "in_chans": spec.in_channels, **defaults, **spec.options}
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        if not spec.options:
            raise
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in spec.options:
            known = timm_signature(name)
            hint = did_you_mean(unknown[1], known)
            raise ValueError(
                f"backbone.options: timm's {name} has no argument {unknown[1]!r}{hint} (arguments: {', '.join(known)})"
            ) from None
        raise ValueError(
            f"timm failed to build {name} with backbone.options={spec.options}: {type(error).__name__}: {error}"
        ) from None


def _is_data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, str | int | float | bool)
