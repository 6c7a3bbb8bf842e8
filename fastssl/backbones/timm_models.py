"""Any timm model as a backbone, and the options that its constructor takes."""

from __future__ import annotations

import difflib
import inspect
import re

import torch
from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.config import Backbone


class Timm(nn.Module):
    """A timm model without its classifier, as `body`: timm's own modules may be called `stages`."""

    def __init__(self, name: str, spec: Backbone) -> None:
        super().__init__()
        self.spec = spec
        plain = Backbone()
        for key in ("stem", "norm", "width", "zero_init_residual", "init", "sobel", "frozen"):
            if getattr(spec, key) != getattr(plain, key):
                raise ValueError(f"backbone.{key}={getattr(spec, key)!r} does not apply to timm's {name}; leave it out")
        self.body = timm_model(name, spec, **timm_defaults(name))
        positions.use_dino_resampling_(self.body)
        self.dim = getattr(self.body, "head_hidden_size", self.body.num_features)
        self.stages = tuple(f["num_chs"] for f in self.body.feature_info)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        return self.body.forward_intermediates(x, intermediates_only=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# Arguments of timm.create_model that Backbone has under other names, or that do not describe the network.
NOT_OPTIONS = {
    "num_classes": "a backbone has no classifier",
    "in_chans": "use backbone.in_channels",
    "device": "the network is moved later",
    "dtype": "use optim.precision",
    "features_only": "a backbone gives all its stages",
    **dict.fromkeys(
        ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        "use backbone.pretrained",
    ),
    **dict.fromkeys(("scriptable", "exportable", "no_jit"), "it does not change the network"),
}


def timm_signature(name: str) -> list[str]:
    """What the class of timm's model `name` takes."""
    import timm

    with torch.device("meta"):
        kind = type(timm.create_model(name))
    return [key for key in inspect.signature(kind).parameters if key not in NOT_OPTIONS]


def timm_defaults(name: str) -> dict:
    """Options that we choose where the user does not: transformers take crops of any size (multi-crop, 32 px)."""
    return {"dynamic_img_size": True} if "dynamic_img_size" in timm_signature(name) else {}


def timm_model(name: str, spec: Backbone, **defaults) -> nn.Module:
    """timm's model without a classifier, with `spec.options` over `defaults`; an option that it does not know, or a
    value that it does not accept, is a ValueError."""
    import timm

    for key, value in spec.options.items():
        if key in NOT_OPTIONS:
            raise ValueError(f"backbone.options.{key}: {NOT_OPTIONS[key]}")
        if not _is_data(value):
            raise ValueError(
                f"backbone.options.{key}={value!r} cannot be written to config.json: give a number, a "
                "string, a bool or a list of them"
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
            near = difflib.get_close_matches(unknown[1], known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"backbone.options: timm's {name} has no argument {unknown[1]!r}{hint} (it has {', '.join(known)})"
            ) from None
        raise ValueError(
            f"timm does not build {name} with backbone.options={spec.options}: {type(error).__name__}: {error}"
        ) from None


def _is_data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, str | int | float | bool)
