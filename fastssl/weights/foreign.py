"""Checkpoints of other projects: which copy of the network is which, and keys that differ by more than a prefix.

Keys of torchvision or timm after a prefix need nothing from this file (MoCo, SimSiam, SwAV, Barlow Twins, VICReg, DINO,
MAE, solo-learn, VISSL's `trunk._feature_blocks.`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.config import Backbone

# A copy of the network with one of these names in its prefix is the teacher or the student of another copy.
TEACHER = (
    {"teacher", "target", "ema", "encoder_k", "key_encoder", "teacher_backbone"}
    | {"momentum_backbone", "backbone_momentum"}  # lightly, solo-learn
    | {"momentum_encoder"}  # MoCo v3
    | {"target_net", "target_encoder", "target_network", "target_network_state_dict"}  # BYOLs
    | {"state_dict_ema", "model_ema", "ema_model"}  # timm, torchvision
)
STUDENT = {"student", "student_backbone"}


def priority(prefix: str) -> int:
    """The copy with the lowest value is evaluated by default: MoCo's query encoder, DINO's teacher."""
    names = set(prefix.split("."))
    return 2 if names & STUDENT else 1 if names & TEACHER else 0


Which = Literal["student", "teacher"]


def select_copies(prefixes: list[str], which: Which) -> list[str]:
    """The copies that are the "student" or the "teacher", by the names in their prefixes.  Where only the other one has
    such a name, the rest are meant (MoCo's `encoder_q` beside `encoder_k`)."""
    mine, other = (STUDENT, TEACHER) if which == "student" else (TEACHER, STUDENT)

    def has_name(prefix: str, names: set) -> bool:
        return bool(names & set(prefix.split(".")))

    chosen = [p for p in prefixes if has_name(p, mine)]
    if not chosen and any(has_name(p, other) for p in prefixes):
        chosen = [p for p in prefixes if not has_name(p, other)]
    return chosen


def matching_layouts(keys: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """For each layout that changes any of `keys`: its name, and every key with our name of it."""
    for layout, rename in LAYOUTS.items():
        names = rename(keys)
        if any(old != new for old, new in names.items()):
            yield layout, names


def check_variant(file: str, checkpoint: Any) -> None:
    """ValueError for a network with our keys that computes something else.  OpenMMLab's files contain their config."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    text = " ".join(str(meta.get(key, "")) for key in ("config", "cfg")) if isinstance(meta, dict) else ""
    for pattern, what in (
        (r"style\s*[=:]\s*['\"]caffe", "style='caffe' strides in the 1x1 convolution, our ResNets in the 3x3"),
        (r"ConvWS", "its convolutions standardise their weights, ours do not"),
    ):
        if re.search(pattern, text):
            raise ValueError(f"{file} is refused: its keys fit and its outputs would be wrong ({what})")


def check_stem(file: str, layout: str | None, stem: str) -> None:
    """ValueError where the keys show that no ReLU follows the stem's norm, and the backbone has one."""
    if layout == NO_RELU and stem != "cifar_norelu":
        raise ValueError(
            f"{file} is refused for stem {stem!r}: it is a ResNet whose children were put into an "
            "nn.Sequential (lightly's ResNetGenerator), which left out the ReLU after the stem's norm; "
            "give stem='cifar_norelu' (--stem cifar_norelu)"
        )


def check_num_heads(file: str, table: Tensor, net: nn.Module, spec: Backbone) -> None:
    """ValueError for a vision transformer whose number of heads is not known, because projects differ in it.

    Fixed sine-cosine positions are those of MoCo v3 and MAE.  MoCo v3's authors, MMSelfSup and solo-learn give ViT-Ti
    and ViT-S 12 heads, timm 3 and 6, with equal keys and shapes."""
    dim = table.shape[-1]
    heads = getattr(getattr(net.blocks[0], "attn", None), "num_heads", 12) if hasattr(net, "blocks") else 12
    if dim not in (192, 384) or heads == 12 or "num_heads" in spec.options or table.ndim != 3:
        return
    if positions.is_sincos(table):
        raise ValueError(
            f"{file} has the fixed positions of MoCo v3 and MAE. With {dim} channels, MoCo v3's authors, "
            f"MMSelfSup and solo-learn have 12 heads, timm's {spec.name} has {heads}, and the file does "
            f"not say which: give num_heads=12 or num_heads={heads} (--option num_heads=12, or "
            "backbone.options.num_heads=12)"
        )


def by_patterns(*rules: tuple[str, str | Callable]) -> Callable[[Iterable[str]], dict[str, str]]:
    """A function from keys to their new names: each rule (regular expression, replacement) is applied in turn."""

    def renamed(key: str) -> str:
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        return key

    return lambda keys: {key: renamed(key) for key in keys}


def _children(relu: bool, keys: list[str]) -> dict[str, str]:
    """Keys of nn.Sequential(*list(resnet.children())[:-1]), where modules have numbers.

    The four stages begin at 4 in torchvision's ResNet and at 3 without its max-pool.  They begin at 2 in lightly's
    ResNet, whose ReLU is a function and therefore missing in the nn.Sequential."""
    out = {key: key for key in keys}
    for key in keys:
        if not (match := re.fullmatch(r"(|.*\.)(\d)\.0\.conv1\.weight", key)):
            continue
        prefix, first = match[1], int(match[2])
        if f"{prefix}{first - 1}.0.conv1.weight" in out or first not in ((3, 4) if relu else (2,)):
            continue
        names = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
        for old in keys:
            number, _, rest = old.removeprefix(prefix).partition(".")
            if old.startswith(prefix) and number in names:
                out[old] = f"{prefix}{names[number]}." + re.sub(r"^(\d+)\.shortcut\.", r"\1.downsample.", rest)
    return out


NO_RELU = "numbered children without the stem's ReLU"
LAYOUTS: dict[str, Callable[[list[str]], dict[str, str]]] = {
    "numbered children": partial(_children, True),  # of torchvision's ResNet: lightly's examples, PyTorch-BYOL
    NO_RELU: partial(_children, False),  # of lightly's ResNet, in its CIFAR benchmarks
    "shortcut for downsample": by_patterns((r"(layer\d\.\d+\.)shortcut\.", r"\1downsample.")),  # lightly's ResNet
    "OpenMMLab group norm": by_patterns((r"(^|\.)gn(\d)\.", r"\1bn\2.")),
    "OpenMMLab ViT": by_patterns(
        (r"(^|\.)layers\.(\d+)\.ffn\.layers\.0\.0\.", r"\1layers.\2.mlp.fc1."),
        (r"(^|\.)layers\.(\d+)\.ffn\.layers\.1\.", r"\1layers.\2.mlp.fc2."),
        (r"(^|\.)layers\.(\d+)\.ln(\d)\.", r"\1blocks.\2.norm\3."),
        (r"(^|\.)layers\.(\d+)\.(attn|mlp)\.", r"\1blocks.\2.\3."),
        (r"(^|\.)ln1\.(weight|bias)$", r"\1norm.\2"),
        (r"(^|\.)patch_embed\.projection\.", r"\1patch_embed.proj."),
    ),
    "torchvision ViT": by_patterns(
        (r"(^|\.)conv_proj\.", r"\1patch_embed.proj."),
        (r"(^|\.)class_token$", r"\1cls_token"),
        (r"(^|\.)encoder\.pos_embedding$", r"\1pos_embed"),
        (r"(^|\.)encoder\.ln\.", r"\1norm."),
        (r"(^|\.)encoder\.layers\.encoder_layer_(\d+)\.", r"\1blocks.\2."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    ),
}
