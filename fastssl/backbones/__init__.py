"""config.Backbone -> a module with .spec, .dim, .stages, forward(x) -> (B, dim) pooled and forward_stages(x) -> maps.

The torchvision ResNet family by its names and state-dict keys, thin and shallow ones too (resnet10, width=16), and any
timm model.  Nothing here knows about self-supervision.  Source of the ResNets: https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from fastssl.backbones import positions
from fastssl.config import STEMS, Backbone

# name: block, blocks per stage, groups, width of a group at 64 channels
RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 1, 64),  # not in torchvision: for smoke runs on a CPU
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), 1, 128),
}


def build(spec: Backbone, method=None) -> nn.Module:
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


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least two channels (one-channel groups would erase the channel's mean everywhere)."""
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


class ResNet(nn.Module):
    """torchvision's ResNet without fc: the same keys, initialisation and outputs; `width` scales all channels."""

    def __init__(self, spec: Backbone) -> None:
        super().__init__()
        self.spec = spec
        block, blocks, groups, group_width = RESNETS[spec.name]
        if spec.options:
            raise ValueError(
                f"backbone.options={spec.options} are arguments of timm's models, and {spec.name} is "
                f"built as in torchvision: name 'timm/{spec.name}', or use width, stem, norm, ..."
            )
        if spec.width < 1:
            raise ValueError(f"backbone.width={spec.width} must be positive")
        if spec.width != 64 and (groups, group_width) != (1, 64):
            raise ValueError(f"backbone.width={spec.width}: {spec.name} has its width in its name; leave 64")
        norm = {"bn": nn.BatchNorm2d, "gn": group_norm, "frozen": FrozenBatchNorm2d}.get(spec.norm)
        if norm is None:
            raise ValueError(f"backbone.norm={spec.norm!r} is none of 'bn', 'gn' and 'frozen'")
        if not 0 <= spec.frozen < 5:
            raise ValueError(
                f"backbone.frozen={spec.frozen}: a {spec.name} has five stages with its stem, of which 0 "
                "to 4 can stay as they are"
            )
        self.sobel = Sobel() if spec.sobel else nn.Identity()
        self.conv1 = _stem(spec)
        self.bn1 = norm(spec.width)
        self.relu = nn.Identity() if spec.stem == "cifar_norelu" else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if spec.stem == "imagenet" else nn.Identity()
        make = partial(block, groups=groups, base_width=group_width, norm_layer=norm)
        channels = spec.width
        for i, count in enumerate(blocks):
            planes = spec.width << i
            setattr(self, f"layer{i + 1}", _stage(make, channels, planes, count, 2 if i else 1, norm))
            channels = planes * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dim = channels
        self.stages = (spec.width, *(channels >> i for i in (3, 2, 1, 0)))
        self._init(spec.zero_init_residual)
        for part in self._frozen():
            part.requires_grad_(False)

    def _init(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode=self.spec.init, nonlinearity="relu")
            elif zero_init_residual and isinstance(m, BasicBlock | Bottleneck):
                nn.init.zeros_((m.bn2 if isinstance(m, BasicBlock) else m.bn3).weight)

    def _frozen(self) -> list[nn.Module]:
        stages = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3]][: self.spec.frozen]
        return [part for stage in stages for part in stage]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Maps of the stem (after ReLU, before the max-pool) and of stages 1 to 4; their channels are .stages."""
        maps = [self.relu(self.bn1(self.conv1(self.sobel(x))))]
        maps.append(self.layer1(self.maxpool(maps[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.avgpool(self.forward_stages(x)[-1]).flatten(1)


class Sobel(nn.Module):
    """(B, 3, H, W) -> (B, 2, H, W): horizontal and vertical gradient of the mean over channels (DeepCluster)."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.mean(1, keepdim=True), self.filters.to(x.dtype), padding=1)


def _stem(spec: Backbone) -> nn.Conv2d:
    if spec.stem not in STEMS:
        raise ValueError(f"backbone.stem={spec.stem!r} is none of {', '.join(STEMS)}")
    kernel, stride, padding = STEMS[spec.stem]
    return nn.Conv2d(2 if spec.sobel else spec.in_channels, spec.width, kernel, stride, padding, bias=False)


def _stage(make, channels: int, planes: int, count: int, stride: int, norm) -> nn.Sequential:
    out = planes * make.func.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), norm(out))
    return nn.Sequential(make(channels, planes, stride, shortcut), *(make(out, planes) for _ in range(count - 1)))


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
            except NotImplementedError:  # an operation without a meta kernel: nothing can be told
                return
            except (AssertionError, RuntimeError) as error:
                patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
                dynamic = "dynamic_img_size" in timm_signature(name)
                wants = f"needs multiples of {patch[0]}" if patch and dynamic else "does not take them"
                raise ValueError(f"views of {size} pixels: {name} {wants} ({str(error)[:200]})") from None


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


def _is_data(value) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, str | int | float | bool)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that stores its weight as a contiguous (O, H, W, I) Parameter and convolves with a channels_last view.

    DeepSpeed 0.19.8 crashes on parameters whose memory is not contiguous; cuDNN and oneDNN want this layout.  Its
    state dict holds the ordinary (O, I, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.permute(0, 3, 1, 2), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"]
        if weight.ndim == 4:  # ZeRO-3 leaves an empty placeholder outside its gathering context
            destination[prefix + "weight"] = weight.permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.ndim == 4:
            state_dict = {**state_dict, prefix + "weight": weight.permute(0, 2, 3, 1).contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def channels_last_(module: nn.Module) -> nn.Module:
    """Turn every plain nn.Conv2d of `module` into `Conv2d` above, in place; Parameters keep name and identity.

    Call it after initialisation and before wrapping.  Subclasses of nn.Conv2d (timm's weight standardisation) keep
    their own layout, which is slower and equally right.
    """
    for m in module.modules():
        if type(m) is nn.Conv2d:
            m.weight.data = m.weight.data.permute(0, 2, 3, 1).contiguous()
            m.__class__ = Conv2d
    return module


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
