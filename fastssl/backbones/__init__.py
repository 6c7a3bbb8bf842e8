"""config.Backbone -> a module with .spec, .dim, .stages, forward(x) -> (B, dim) pooled and forward_stages(x) -> maps.

ResNets are in resnet.py, timm's models in timm_models.py.  Nothing here knows about self-supervision.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastssl.backbones.memory_format import Conv2d, channels_last_
from fastssl.backbones.resnet import RESNETS, ResNet
from fastssl.backbones.timm_models import Timm, timm_defaults, timm_model, timm_signature
from fastssl.config import Backbone

__all__ = [
    "RESNETS",
    "Conv2d",
    "ResNet",
    "Timm",
    "build",
    "channels_last_",
    "check_sizes",
    "evaluating",
    "timm_defaults",
    "timm_model",
    "timm_signature",
]


def build(spec: Backbone, method: object = None) -> nn.Module:
    """The backbone that `spec` describes, freshly initialised; weights.load_backbone loads `spec.pretrained` into it.

    A name in RESNETS is torchvision's network, any other is timm's, as is "timm/resnet50".  `method`: a method's
    Config; its init_backbone(backbone), where it has one, gives the initial values that it wants and freezes parts.
    """
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
        near = difflib.get_close_matches(name, [*RESNETS, *timm.list_models()], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backbone {spec.name!r}{hint} (known: {', '.join(RESNETS)} and timm's models)")
    return Timm(name, spec)


def check_sizes(spec: Backbone, sizes: Iterable[int]) -> None:
    """ValueError where timm's network does not take square images of a size (no multiple of the patch, another size
    than a fixed one): tried on the meta device, without memory.  ResNets take any; unknown names are left to build."""
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
            except NotImplementedError:  # an operation without a meta kernel: it is not checked
                return
            except (AssertionError, RuntimeError) as error:
                patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
                dynamic = "dynamic_img_size" in timm_signature(name)
                wants = f"needs multiples of {patch[0]}" if patch and dynamic else "does not take them"
                raise ValueError(f"views of {size} pixels: {name} {wants} ({str(error)[:200]})") from None


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode again afterwards (a frozen batch norm stays frozen)."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
