"""Checkpoints of other projects: which copy of the network is whose, and keys that differ by more than a prefix.

A prefix before torchvision's or timm's keys needs nothing from here (MoCo, SimSiam, SwAV, Barlow Twins, VICReg, DINO,
MAE, solo-learn, VISSL's `trunk._feature_blocks.`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# Of several complete copies of a network, those below such a name are averages of another or learn from one.
TEACHER = {
    "teacher", "target", "ema", "encoder_k", "key_encoder",
    "teacher_backbone", "momentum_backbone", "backbone_momentum",  # lightly, solo-learn
    "momentum_encoder", "target_net", "target_encoder", "target_network", "target_network_state_dict",  # MoCo v3, BYOLs
    "state_dict_ema", "model_ema", "ema_model",  # timm, torchvision
}  # fmt: skip
STUDENT = {"student", "student_backbone"}


def rank(prefix: str) -> int:
    """Which copy is evaluated by default, the lowest first: MoCo's query, DINO's teacher."""
    names = set(prefix.split("."))
    return 2 if names & STUDENT else 1 if names & TEACHER else 0


def choose(prefixes: list[str], which: str) -> list[str]:
    """Those of a file's complete copies that are its "student" or its "teacher".  A name says which, or, beside a copy
    that it says to be the other, its absence (MoCo's `encoder_q` beside `encoder_k`)."""
    mine, other = (STUDENT, TEACHER) if which == "student" else (TEACHER, STUDENT)

    def named(prefix: str, names: set) -> bool:
        return bool(names & set(prefix.split(".")))

    chosen = [p for p in prefixes if named(p, mine)]
    if not chosen and any(named(p, other) for p in prefixes):
        chosen = [p for p in prefixes if not named(p, other)]
    return chosen


def renamed(keys: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """For each layout that changes any of `keys`: its name, and every key with what it is called here."""
    for layout, rename in LAYOUTS.items():
        names = rename(keys)
        if any(old != new for old, new in names.items()):
            yield layout, names


def refuse(file: str, checkpoint) -> None:
    """An error for a network that has our keys and other arithmetic; OpenMMLab files carry their config's text."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    text = " ".join(str(meta.get(key, "")) for key in ("config", "cfg")) if isinstance(meta, dict) else ""
    for pattern, what in (
        (r"style\s*[=:]\s*['\"]caffe", "style='caffe' strides in the 1x1 convolution, our ResNets in the 3x3"),
        (r"ConvWS", "its convolutions standardise their weights, ours do not"),
    ):
        if re.search(pattern, text):
            raise ValueError(f"{file} is refused: its keys fit and its outputs would be wrong ({what})")


def _by_patterns(*rules: tuple[str, str]) -> Callable[[list[str]], dict[str, str]]:
    compiled = [(re.compile(pattern), new) for pattern, new in rules]

    def rename(keys: list[str]) -> dict[str, str]:
        out = {}
        for key in keys:
            out[key] = key
            for pattern, new in compiled:
                out[key] = pattern.sub(new, out[key])
        return out

    return rename


def _children(keys: list[str]) -> dict[str, str]:
    """nn.Sequential(*list(resnet.children())[:-1]): modules are numbers.  The four stages begin at 4 in torchvision's
    ResNet and at 2 in lightly's own, whose ReLU and pooling are no modules."""
    out = {key: key for key in keys}
    for key in keys:
        if not (match := re.fullmatch(r"(|.*\.)[24]\.0\.conv1\.weight", key)):
            continue
        prefix = match[1]
        first = 2 if f"{prefix}2.0.conv1.weight" in out else 4
        names = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
        for old in keys:
            number, _, rest = old.removeprefix(prefix).partition(".")
            if old.startswith(prefix) and number in names:
                out[old] = f"{prefix}{names[number]}." + re.sub(r"^(\d+)\.shortcut\.", r"\1.downsample.", rest)
    return out


LAYOUTS: dict[str, Callable[[list[str]], dict[str, str]]] = {
    "numbered children": _children,  # lightly's examples, PyTorch-BYOL
    "shortcut for downsample": _by_patterns((r"(layer\d\.\d+\.)shortcut\.", r"\1downsample.")),  # lightly's ResNet
    "OpenMMLab group norm": _by_patterns((r"(^|\.)gn(\d)\.", r"\1bn\2.")),
    "OpenMMLab ViT": _by_patterns(
        (r"(^|\.)layers\.(\d+)\.ffn\.layers\.0\.0\.", r"\1layers.\2.mlp.fc1."),
        (r"(^|\.)layers\.(\d+)\.ffn\.layers\.1\.", r"\1layers.\2.mlp.fc2."),
        (r"(^|\.)layers\.(\d+)\.ln(\d)\.", r"\1blocks.\2.norm\3."),
        (r"(^|\.)layers\.(\d+)\.(attn|mlp)\.", r"\1blocks.\2.\3."),
        (r"(^|\.)ln1\.(weight|bias)$", r"\1norm.\2"),
        (r"(^|\.)patch_embed\.projection\.", r"\1patch_embed.proj."),
    ),
    "torchvision ViT": _by_patterns(
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
