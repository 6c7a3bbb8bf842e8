"""Backbone networks, built from a `config.Backbone`.  A backbone is a module with these attributes:

- spec: its `config.Backbone`; dim: its number of features; stages: the number of channels of each stage
- forward(x): pooled features (B, dim); forward_stages(x): list of the feature maps of all stages

ResNets are in resnet.py, timm's models in timm_models.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastssl.backbones.memory_format import Conv2d, channels_last_
from fastssl.backbones.residual import use_autocast_dtype_
from fastssl.backbones.resnet import RESNETS, ResNet
from fastssl.backbones.timm_models import Timm, timm_defaults, timm_model, timm_signature
from fastssl.config import Backbone, checks
from fastssl.parsing import did_you_mean


def build(spec: Backbone, method: object = None) -> nn.Module:
    """The backbone that `spec` describes, with initial weights; weights.load_backbone loads `spec.pretrained`.

    A name in RESNETS is torchvision's network; any other name, also "timm/resnet50", is timm's.  `method`: a method's
    Config, whose optional init_backbone(backbone) may set initial weights and freeze parts.
    """
    checks.check_section("backbone", spec, Backbone)
    backbone = _build(spec)
    if hasattr(method, "init_backbone"):
        method.init_backbone(backbone)
    return backbone


def _build(spec: Backbone) -> nn.Module:
    if spec.name in RESNETS:
        return ResNet(spec)
    import timm  # takes seconds; most runs are ResNets

    name = spec.name.removeprefix("timm/")
    if not timm.is_model(name):
        hint = did_you_mean(name, [*RESNETS, *timm.list_models()])
        known = f"{', '.join(RESNETS)}, timm's models, and your own after fastssl --import FILE"
        raise ValueError(f"unknown backbone {spec.name!r}{hint} (known: {known})")
    return Timm(name, spec)


def check_sizes(spec: Backbone, sizes: Iterable[int]) -> None:
    """ValueError if timm's network does not accept square images of one of `sizes`, found by a forward on the meta
    device.

    Nothing is checked for ResNets, which accept all sizes, and for unknown names, for which `build` raises.
    """
    import timm

    name = spec.name.removeprefix("timm/")
    if spec.name in RESNETS or not timm.is_model(name):
        return
    with torch.device("meta"):
        model = timm_model(name, spec, **timm_defaults(name)).eval()
        for size in sorted(set(sizes)):
            try:
                with torch.no_grad():
                    model(torch.zeros(1, spec.in_channels, size, size))
            except NotImplementedError:  # an operation has no meta kernel: not checked
                return
            except (AssertionError, RuntimeError) as error:
                patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
                dynamic = "dynamic_img_size" in timm_signature(name)
                reason = f"needs multiples of {patch[0]}" if patch and dynamic else "does not accept this size"
                raise ValueError(f"views of {size} pixels: {name} {reason} ({str(error)[:200]})") from None


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode; afterwards every submodule has its previous mode (a frozen batch norm stays
    in evaluation mode)."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
