"""Small commands for weights and networks: `fastssl publish`, `fastssl params` and `fastssl upgrade`.

Each function does the work, each command below it reads arguments and prints.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl import backbones, config, files, weights
from fastssl.config import STEMS, Backbone
from fastssl.parsing import Parser
from fastssl.trainer import Context
from fastssl.weights import export

# What resumes a training and is no weight, by the first name of its keys; other optimizer states have numbers for keys.
TRAINING = {
    "optimizer",
    "optimizers",
    "optimizer_states",
    "optimizer_state_dict",
    "scaler",
    "amp",
    "lr_scheduler",
    "lr_schedulers",
    "scheduler",
    "loops",
    "callbacks",
    "param_schedulers",
    "message_hub",
    "meta",
}
CONTAINERS = {"state_dict", "model"}  # dictionaries that checkpoints wrap all weights in


def publish(source: str | Path, folder: str | Path | None = None, name: str | None = None) -> tuple[Path, str]:
    """Write all weights of a run or a checkpoint, without the optimizer, to NAME-<8 hex digits>.safetensors; returns
    the file and the SHA-256 of its bytes, whose beginning is in its name."""
    file, state = weights.read(source)
    kept = {key: value for key, value in state.items() if key.split(".")[0] not in TRAINING}
    if len(heads := {key.split(".")[0] for key in kept}) == 1 and heads <= CONTAINERS:
        kept = {key.partition(".")[2]: value for key, value in kept.items()}
    if not kept:
        raise ValueError(f"{file} holds no weights to publish")
    bad = [key for key, value in kept.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{file}: {bad[0]} holds NaN or infinity; that training diverged")
    run, spec = weights.run_config(source), weights.spec_of(source)
    meta = weights.metadata(spec) if spec else {"format": "pt"}
    if run:
        meta["fastssl.config"] = json.dumps({**run, "data": {**run["data"], **_basenames(run["data"])}})
    name = name or (run["name"].replace("/", "_") if run else re.sub(r"-[0-9a-f]{8}$", "", Path(source).stem))
    folder = Path(folder or (source if Path(source).is_dir() else Path(source).parent))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.publishing"
    try:
        # copies: a network that was registered twice shares memory, which the format does not know
        files.write_safetensors({k: v.clone().contiguous() for k, v in kept.items()}, temporary, meta)
        digest = files.sha256(temporary)
        path = folder / f"{name}-{digest[:8]}.safetensors"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path, digest


def _basenames(data: dict) -> dict:
    """Paths of this machine are nobody else's business."""
    return {key: Path(data[key]).name for key in ("train", "test", "bank") if data.get(key)}


def publish_main(argv: list[str] | None = None) -> int:
    about = "Write a run's weights, without the optimizer, to a file that has the beginning of its SHA-256 in its name."
    parser = Parser("fastssl publish", description=about)
    parser.add_argument("source", metavar="RUN_OR_FILE", help="run or checkpoint folder, .safetensors, .pt or .pth")
    parser.add_argument("--out", metavar="FOLDER", help="default: where the source is")
    parser.add_argument("--name", help="default: the run's or the file's")
    args = parser.parse_args(argv)

    def work() -> None:
        path, digest = publish(args.source, args.out, args.name)
        print(f"wrote {path}\nSHA-256 {digest}")

    return _run("publish", work)


def count(module: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def flops(backbone: nn.Module, size: int) -> int:
    """Of one forward pass of one image: 2 for a multiplication and its addition, in convolutions and matrix products
    alone, as papers count (some print half of it, as "MACs")."""
    at = next(backbone.parameters()).device
    training = backbone.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, backbone.spec.in_channels, size, size, device=at))
    backbone.train(training)
    return counter.get_total_flops()


def params(
    target: str,
    overrides: list[str] = (),
    *,
    size: int | None = None,
    samples: int | None = None,
    spec: Backbone | None = None,
) -> list[tuple[str, str]]:
    """Rows of the table for a config file or a backbone's name.  Nothing is allocated: the network is built without
    memory, so that any size fits."""
    run = config.load(target, overrides) if target.endswith(".py") else None
    spec = run.backbone if run else spec or Backbone(name=target)
    with torch.device("meta"):
        backbone = backbones.build(spec, run and run.method)
        rows = [("backbone", spec.name), *_parameters("backbone", backbone)]
        if run:
            samples = samples or _samples(run)
            classes = list(map(str, range(1000)))
            method = run.method.build(backbone, Context(samples, run.optim.batch, classes, kernels=run.speed.kernels))
            stored = sum(b.numel() * b.element_size() for b in method.buffers())
            rows += [
                ("method", type(run.method).__module__.rpartition(".")[2]),
                *_parameters("method", method),
                (f"method's buffers at {samples:,} samples", f"{stored / 2**20:.2f} MiB"),
            ]
    sizes = [size] if size else sorted({v.size for v in run.data.views}, reverse=True) if run else [_size(backbone)]
    for side in sizes:
        amount = flops(backbone, side)
        rows += [
            (
                f"backbone's forward, one image of {side} x {side}",
                f"{amount / 1e9:.3f} GFLOPs ({amount / 2e9:.3f} GMACs)",
            )
        ]
    return rows


def _samples(run: config.Run) -> int:
    """Of the training set's data card; ImageNet's where there is none yet."""
    card = Path(run.data.train).with_suffix(".json")
    return json.loads(card.read_text())["samples"] if card.is_file() else 1_281_167


def _parameters(name: str, module: nn.Module) -> list[tuple[str, str]]:
    total, trained = count(module)
    return [
        (f"{name}'s parameters", f"{total:,} ({total / 1e6:.2f} M)"),
        (f"{name}'s trained parameters", f"{trained:,} ({trained / 1e6:.2f} M)"),
    ]


def _size(backbone: nn.Module) -> int:
    timm_cfg = getattr(getattr(backbone, "body", None), "pretrained_cfg", None)
    return timm_cfg["input_size"][-1] if timm_cfg else 224 if backbone.spec.stem == "imagenet" else 32


def params_main(argv: list[str] | None = None) -> int:
    parser = Parser("fastssl params", description="Count the parameters of a network and its FLOPs.")
    parser.add_argument("target", metavar="CONFIG|BACKBONE", help="a config file, or a name such as resnet50")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the config")
    parser.add_argument("--size", type=int, help="side of the images; default: the config's views, or the network's")
    parser.add_argument("--samples", type=int, help="some methods hold a bank; default: the data card's, or ImageNet's")
    parser.add_argument("--stem", choices=tuple(STEMS), default=None)
    parser.add_argument("--norm", choices=("bn", "gn"), default=None)
    parser.add_argument("--width", type=int)
    parser.add_argument("--in-channels", type=int, dest="in_channels")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of timm's model, such as num_heads=12; may be given several times",
    )
    args = parser.parse_intermixed_args(argv)

    def work() -> None:
        given = {k: getattr(args, k) for k in ("stem", "norm", "width", "in_channels") if getattr(args, k) is not None}
        is_config = args.target.endswith(".py")
        if is_config and (given or args.option):
            first = next(iter([*given, "options.NAME"]))
            raise ValueError(f"{args.target} names its backbone: give backbone.{first}=... instead")
        if not is_config and args.overrides:
            raise ValueError(f"{args.overrides[0]!r} replaces a setting of a config, and {args.target} is a backbone")
        spec = None if is_config else Backbone(name=args.target, **given)
        for option in args.option:
            config.set_override(spec, f"options.{option}")
        rows = params(args.target, args.overrides, size=args.size, samples=args.samples, spec=spec)
        width = max(len(label) for label, _ in rows)
        print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))

    return _run("params", work)


def upgrade(old: str | Path, new: str | Path, spec: Backbone | None = None) -> str:
    """Write an old flat state dict in today's form and say what changed.

    With `spec` the backbone alone goes to a .safetensors that describes itself, checked tensor by tensor.  Without it
    the file keeps its keys but DataParallel's `module.` and, as OpenSelfSup's upgrade, the heads."""
    old, new = Path(old), Path(new)
    if new.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{new} must end in .safetensors or .pth")
    if new.exists():
        raise ValueError(f"{new} exists already")
    if spec:
        if new.suffix != ".safetensors":
            raise ValueError(f"{new} must end in .safetensors, which has room for the description of {spec.name}")
        backbone = backbones.build(spec)
        report = weights.load_backbone(old, backbone)
        export.write(backbone, new, "safetensors")
        return str(report)
    _, state = weights.read(old)
    inner = {key: value for key, value in state.items() if key.split(".")[0] not in TRAINING}
    if len(first := {key.split(".")[0] for key in inner}) == 1 and first <= CONTAINERS:
        inner = {key.partition(".")[2]: value for key, value in inner.items()}
    plain = {key.removeprefix("module."): value for key, value in inner.items()}
    kept: dict[str, Tensor] = {k: v.clone().contiguous() for k, v in plain.items() if not k.startswith("head")}
    if not kept:
        raise ValueError(f"{old} holds nothing but heads")
    with files.atomic_write(new) as temporary:
        if new.suffix == ".safetensors":
            files.write_safetensors(kept, temporary, {"format": "pt"})
        else:
            torch.save({"state_dict": kept, "author": "fastssl"}, temporary)
    dropped = [key for key in plain if key not in kept]
    return f"{len(kept)} tensors from {old}" + (f"; heads left out: {', '.join(dropped)}" if dropped else "")


def upgrade_main(argv: list[str] | None = None) -> int:
    parser = Parser("fastssl upgrade", description="Write an old flat state dict in today's form.")
    parser.add_argument("old")
    parser.add_argument("new", help=".safetensors, or .pth for {'state_dict': ...}")
    export.add_backbone_options(parser)
    args = parser.parse_args(argv)
    return _run(
        "upgrade", lambda: print(f"{upgrade(args.old, args.new, export.spec_from(args, None))}\nwrote {args.new}")
    )


def _run(command: str, work) -> int:
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"fastssl {command}: {error}", file=sys.stderr)
        return 2
    return 0
