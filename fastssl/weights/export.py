"""Writing a backbone for other tools, each with the Python that loads it: `fastssl export RUN --to TARGET`.

"torchvision", "timm": a .pth of their network of that name; thin ResNets are built by torchvision's class.
"safetensors": any backbone, with its description.  "detectron2": a .pkl under its names.  "huggingface": a folder that
timm loads, with a model card, ready to upload.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fastssl import backbones, config, files, weights
from fastssl.backbones import positions
from fastssl.config import STEMS, Backbone
from fastssl.parsing import Parser

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, where no run says what it trained with


def write(
    backbone: nn.Module, path: str | Path, to: str | None = None, *, run: dict | None = None, steps: int | None = None
) -> str:
    """Write the backbone's tensors and return the Python that loads them.

    `to`: of WRITERS; None: torchvision for its ResNets, timm for any other.  `run`: its config.json, and `steps`: how
    many of its steps were made, from which come the size, mean and std of the images, and the model card.
    """
    to = to or default_target(backbone.spec)
    if to not in WRITERS:
        raise ValueError(f"export to {to!r}: known are {', '.join(WRITERS)}")
    path, spec = Path(path), backbone.spec
    state = {k: v.detach().cpu().contiguous() for k, v in getattr(backbone, "body", backbone).state_dict().items()}
    if spec.norm == "frozen":  # elsewhere it is batch norm like any other
        spec = dataclasses.replace(spec, norm="bn")
        state |= {
            re.sub("running_mean$", "num_batches_tracked", k): torch.tensor(0)
            for k in state
            if k.endswith("running_mean")
        }
    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty: this backbone is partitioned by ZeRO-3; export from its run folder")
    if spec.sobel and to != "safetensors":
        raise ValueError(f"{to} has no network that begins with Sobel filters: export to safetensors")
    if to in ("timm", "huggingface"):
        spec, state = _at_size(backbone, spec, state, _size(run))
    if run:
        run = {**run, "steps_done": steps}
    lines = [WRITERS[to][1](state, spec, path, run)]
    if run and to != "detectron2":
        mean, std = _normalisation(run)
        lines += [
            f"mean, std = {mean}, {std}  # of the channels of its images, in [0, 1]; trained at "
            f"{_size(run)} x {_size(run)} pixels"
        ]
    return "\n".join(lines)


def default_target(spec: Backbone) -> str:
    """A target that has the network: torchvision, timm, or safetensors where no other tool has it."""
    return "safetensors" if spec.sobel else "torchvision" if spec.name in backbones.RESNETS else "timm"


def _refuse(spec: Backbone, to: str, why: str):
    raise ValueError(f"{to} has no {spec.name}{why}: export with --to {default_target(spec)}, or --to safetensors")


def _at_size(backbone: nn.Module, spec: Backbone, state: dict[str, Tensor], size: int | None):
    """A vision transformer as it is at the size that it was trained at: with a table of positions of that size, and
    the option that tells timm."""
    body = getattr(backbone, "body", None)
    if not isinstance(size, int) or not positions.is_resampling(body):
        return spec, state
    old, patch = tuple(body.patch_embed.grid_size), body.patch_embed.patch_size
    new = (size // patch[0], size // patch[1])
    if new == old or size % patch[0] or size % patch[1]:
        return spec, state
    table = positions.resample(state["pos_embed"], old, new).contiguous()
    return dataclasses.replace(spec, options={**spec.options, "img_size": size}), {**state, "pos_embed": table}


def _torchvision(state: dict[str, Tensor], spec: Backbone, path: Path, run) -> str:
    if spec.name not in backbones.RESNETS:
        _refuse(spec, "torchvision", "")
    recipe = _torchvision_recipe(spec)
    with files.atomic_write(path) as temporary:
        torch.save(state, temporary)
    return f"{recipe}\nnet.load_state_dict(torch.load({str(path)!r}))"


def _torchvision_recipe(spec: Backbone) -> str:
    norm = "torch.nn.BatchNorm2d"
    lines = ["import torch, torchvision"]
    if spec.norm == "gn":
        lines = ["import math, torch, torchvision", "norm = lambda c: torch.nn.GroupNorm(math.gcd(32, c // 2), c)"]
        norm = "norm"
    given = f"norm_layer={norm}" if spec.norm == "gn" else ""
    if hasattr(torchvision.models, spec.name) and spec.width == 64:
        lines += [f"net = torchvision.models.{spec.name}({given})"]
    else:  # torchvision's class with stages of other lengths and widths
        block, blocks, *_ = backbones.RESNETS[spec.name]
        lines += [
            f"from torchvision.models.resnet import {block.__name__}, ResNet",
            f"net = ResNet({', '.join(filter(None, [block.__name__, str(list(blocks)), given]))})",
        ]
        if spec.width != 64:
            lines += [
                f"net.inplanes, net.bn1 = {spec.width}, {norm}({spec.width})",
                f"for i, blocks in enumerate({list(blocks)}):",
                f"    stage = net._make_layer({block.__name__}, {spec.width} << i, blocks, stride=2 if i else 1)",
                '    setattr(net, f"layer{i + 1}", stage)',
            ]
    if (spec.stem, spec.in_channels, spec.width) != ("imagenet", 3, 64):
        lines += [_first_convolution(spec)]
    if spec.stem != "imagenet":
        lines += ["net.maxpool = torch.nn.Identity()"]
    if spec.stem == "cifar_norelu":
        lines += ["net.relu = torch.nn.Identity()  # after the first norm; the blocks have their own"]
    return "\n".join([*lines, "net.fc = torch.nn.Identity()"])


def _first_convolution(spec: Backbone) -> str:
    kernel, stride, padding = STEMS[spec.stem]
    return (
        f"net.conv1 = torch.nn.Conv2d({spec.in_channels}, {spec.width}, {kernel}, stride={stride}, "
        f"padding={padding}, bias=False)"
    )


def _timm(state: dict[str, Tensor], spec: Backbone, path: Path, run) -> str:
    name, options = _timm_model(spec)
    arguments = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": 0, **options}.items())
    lines = ["import timm, torch", f"net = timm.create_model({name!r}, {arguments})"]
    if spec.stem != "imagenet":
        lines += [_first_convolution(spec), "net.maxpool = torch.nn.Identity()"]
    if spec.stem == "cifar_norelu":
        lines += ["net.act1 = torch.nn.Identity()"]
    with files.atomic_write(path) as temporary:
        torch.save(state, temporary)
    return "\n".join([*lines, f"net.load_state_dict(torch.load({str(path)!r}))"])


def _timm_model(spec: Backbone) -> tuple[str, dict]:
    """timm's name for this network and create_model's options; its ResNets have torchvision's keys."""
    import timm

    name = spec.name.removeprefix("timm/")
    if not timm.is_model(name) or spec.width != 64:
        _refuse(spec, "timm", f" of width {spec.width}")
    options: dict = {"in_chans": spec.in_channels} if spec.in_channels != 3 else {}
    options |= backbones.timm_defaults(name) | spec.options
    if spec.norm == "gn":
        options["norm_layer"] = "groupnorm"
    if name == "resnet50" and spec.norm == "gn":
        name = "resnet50_gn"
        del options["norm_layer"]
    return name, options


def _safetensors(state: dict[str, Tensor], spec: Backbone, path: Path, run) -> str:
    with files.atomic_write(path) as temporary:
        files.write_safetensors(state, temporary, weights.metadata(spec))
    return (
        "from fastssl import backbones, weights  # without fastssl, safetensors.torch.load_file reads the tensors\n"
        f"net = backbones.build(weights.spec_of({str(path)!r}))\nweights.load_backbone({str(path)!r}, net)"
    )


def detectron2_names(keys) -> dict[str, str]:
    """torchvision's names of a ResNet's tensors -> detectron2's."""
    rules = (
        (r"^(?!layer)", "stem."),
        (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
        (r"\bbn(\d)", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
    )
    out = {}
    for key in keys:
        out[key] = key
        for pattern, new in rules:
            out[key] = re.sub(pattern, new, out[key])
    return out


class _Pickler(pickle.Pickler):
    """Arrays by numpy's public names, which numpy 1 and 2 share: the readers are often old environments."""

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _detectron2(state: dict[str, Tensor], spec: Backbone, path: Path, run) -> str:
    depth = re.fullmatch(r"resne(?:x)?t(\d+)(?:_(\d+)x(\d+)d)?", spec.name)
    if not depth or int(depth[1]) < 18 or (spec.stem, spec.width, spec.in_channels) != ("imagenet", 64, 3):
        what = f" with stem={spec.stem!r}, width={spec.width}, in_channels={spec.in_channels}" if depth else ""
        _refuse(spec, "detectron2", f"{what} (its ResNets and ResNeXts are ImageNet's)")
    names = detectron2_names(state)
    model = {names[key]: value.numpy() for key, value in state.items()}
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        _Pickler(f, protocol=4).dump({"model": model, "__author__": "fastssl", "matching_heuristics": True})
    mean, std = ([round(255 * v, 3) for v in values] for values in _normalisation(run))
    resnets = {"DEPTH": int(depth[1]), "STRIDE_IN_1X1": False, "NORM": "GN" if spec.norm == "gn" else "SyncBN"}
    if depth[2]:
        resnets |= {"NUM_GROUPS": int(depth[2]), "WIDTH_PER_GROUP": int(depth[3])}
    if int(depth[1]) < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    lines = [
        "MODEL:",
        f'  WEIGHTS: "{path}"',
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        *(f"    {key}: {value}" for key, value in resnets.items()),
        "INPUT:",
        '  FORMAT: "RGB"',
    ]
    return "\n".join(lines)


def _huggingface(state: dict[str, Tensor], spec: Backbone, path: Path, run) -> str:
    name, options = _timm_model(spec)
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
    mean, std = _normalisation(run)
    size = _size(run) or net.pretrained_cfg["input_size"][-1]
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
    with files.atomic_write(path / "model.safetensors") as temporary:
        files.write_safetensors(state, temporary, weights.metadata(spec))
    recipe = f"import timm\nnet = timm.create_model({'local-dir:' + str(path)!r}, pretrained=True)"
    texts = {"config.json": json.dumps(config, indent=2) + "\n", "README.md": card(path, name, run)}
    for file, text in texts.items():
        with files.atomic_write(path / file) as temporary:
            temporary.write_text(text)
    return recipe


CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- self-supervised-learning
---
# {title}

A backbone without a classifier; its output are pooled features.
{training}
Written by fastssl {version}. SHA-256 of model.safetensors: `{digest}`.

## How to use it

Images are normalised by mean {mean} and standard deviation {std}.

```python
import timm

net = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:OWNER/NAME"
features = net.eval()(images)
```

Licence and accuracy: not stated by whoever exported it.
"""


def card(path: Path, name: str, run: dict | None) -> str:
    """A model card: what the weights are, how they were made and how to load them, and nothing that nobody measured."""
    title, training = name, ""
    if run:
        method = run["method"]["type"].split(".")[-2]
        title = f"{name}, {method}"
        rows = {"method": method} | {f"method.{k}": v for k, v in run["method"].items() if k != "type"}
        length = "steps" if run["optim"].get("steps") else "epochs"  # a run of few steps ends long before its epochs
        rows |= {
            f"optim.{k}": run["optim"][k]
            for k in ("name", "lr", "batch", length, "weight_decay", "schedule", "precision")
        }
        if run.get("steps_done") is not None:
            rows |= {"steps made": run["steps_done"]}
        rows |= {"image size": _size(run), "data": Path(run["data"]["train"]).name, "seed": run["seed"]}
        table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
        training = f"\n## How it was trained\n\n| | |\n|---|---|\n{table}\n"
    mean, std = _normalisation(run)
    digest = files.sha256(path / "model.safetensors")
    return CARD.format(
        title=title, training=training, version=version("fastssl"), digest=digest, mean=list(mean), std=list(std)
    )


def _view(run: dict | None) -> dict:
    data = (run or {}).get("data", {})
    return data.get("eval_view") or (data.get("views") or [{}])[0]


def _normalisation(run: dict | None) -> tuple[tuple, tuple]:
    return tuple(_view(run).get("mean", MEAN)), tuple(_view(run).get("std", STD))


def _size(run: dict | None) -> int | None:
    return _view(run).get("size")


WRITERS: dict[str, tuple[str, Callable]] = {  # target: default file name, writer
    "torchvision": ("backbone.pth", _torchvision),
    "timm": ("backbone_timm.pth", _timm),
    "safetensors": ("backbone.safetensors", _safetensors),
    "detectron2": ("backbone_detectron2.pkl", _detectron2),
    "huggingface": ("huggingface", _huggingface),
}


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", metavar="NAME", help="for weights that do not say what they are")
    plain = Backbone("resnet50")
    parser.add_argument("--stem", choices=tuple(STEMS), help=f"of a ResNet; default: {plain.stem}")
    parser.add_argument("--norm", choices=("bn", "gn", "frozen"), help=f"of a ResNet; default: {plain.norm}")
    parser.add_argument("--width", type=int, help=f"channels of a ResNet's first stage; default: {plain.width}")
    parser.add_argument("--in-channels", type=int, dest="in_channels", help=f"default: {plain.in_channels}")
    parser.add_argument(
        "--sobel",
        action="store_true",
        default=None,
        help="the network sees gradients (DeepCluster); default: if the weights' first convolution has two channels",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of timm's model, such as num_heads=12; may be given several times",
    )


def spec_from(args: argparse.Namespace, target: str | None) -> Backbone | None:
    """The architecture that a run or our own export names, else that of --backbone and its options."""
    options = ("stem", "norm", "width", "in_channels", "sobel")
    given = {key: getattr(args, key) for key in options if getattr(args, key) is not None}
    known = weights.spec_of(target) if target else None
    if known and (args.backbone or given or args.option):
        raise ValueError(
            f"{target} names its backbone ({known.name}): leave out --backbone, --stem, --norm, --width, "
            "--in-channels, --sobel and --option"
        )
    if (given or args.option) and not args.backbone:
        first = next(iter([*given, "option"])).replace("_", "-")
        raise ValueError(f"--{first} describes a backbone: give its --backbone NAME, too")
    if args.backbone in backbones.RESNETS and target and not {"sobel", "in_channels"} & set(given):
        given["sobel"] = weights.has_sobel(target)
    if known or not args.backbone:
        return known
    spec = Backbone(name=args.backbone, **given)
    for option in args.option:
        config.set_override(spec, f"options.{option}")
    return spec


def main(argv: list[str] | None = None) -> int:
    """`fastssl export RUN_OR_WEIGHTS --to TARGET`"""
    parser = Parser("fastssl export", description="Write a backbone for other tools.")
    parser.add_argument("run", metavar="RUN_OR_WEIGHTS", help="run or checkpoint folder, .safetensors, .pt or .pth")
    parser.add_argument("--to", choices=tuple(WRITERS), help="default: torchvision for a ResNet, timm for any other")
    parser.add_argument("--out", help="default: backbone.pth, backbone.safetensors, ... in the run's folder")
    parser.add_argument(
        "--which",
        choices=("student", "teacher"),
        help="the trained network or its moving average; default: what the method evaluates",
    )
    parser.add_argument("--prefix", help="another copy in the file, e.g. target.0.")
    add_backbone_options(parser)
    args = parser.parse_args(argv)
    try:
        spec = spec_from(args, args.run)
        if spec is None:
            raise ValueError(
                f"what the backbone in {args.run} is stands nowhere: it is no run folder and no export of "
                "ours; give --backbone NAME"
            )
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        to = args.to or default_target(spec)
        out = args.out or folder / WRITERS[to][0]
        backbone = backbones.build(spec)
        report = weights.load_backbone(args.run, backbone, prefix=args.prefix, which=args.which)
        print(report)
        step = re.search(r"step_(\d+)", Path(report.file).parent.name)
        recipe = write(backbone, out, to, run=weights.run_config(args.run), steps=step and int(step[1]))
        print(f"wrote {out}; load it with\n\n{recipe}")
    except (ValueError, OSError) as error:
        print(f"fastssl export: {error}", file=sys.stderr)
        return 2
    return 0
