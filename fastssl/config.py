"""The run, as typed data.  A config file is Python with `get_config() -> Run`; `load` adds `a.b=value` overrides.

`Data` and `Optim` change results, `Speed` must not (tests/test_engine.py; batch norm alone sees `micro_batch`).
An unknown name is answered by the nearest.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Kernel, stride and padding of a ResNet's first convolution; a max-pool follows ImageNet's alone.  "cifar_pad2" is
# solo-learn's, "cifar_norelu" has no ReLU after its norm, as lightly's nn.Sequential(*ResNetGenerator().children()).
STEMS = {"imagenet": (7, 2, 3), "cifar": (3, 1, 1), "cifar_pad2": (3, 1, 2), "cifar_norelu": (3, 1, 1)}


@dataclass
class Backbone:
    name: str = "resnet50"  # torchvision ResNet family, or any timm model
    stem: str = "imagenet"  # "cifar": 3x3 stride 1, no max-pool; its variants are solo-learn's and lightly's
    norm: str = "bn"  # "bn", "gn", "frozen": batch norm that keeps the statistics and scales of `pretrained`
    width: int = 64  # channels of the first stage (torchvision ResNets)
    zero_init_residual: bool = False
    in_channels: int = 3
    sobel: bool = False  # two fixed gradient filters on the gray image take the place of colour (ResNets)
    frozen: int = 0  # stages that keep the weights and statistics of `pretrained`: 1 is the stem, 2 the first stage too
    pretrained: str | None = None  # file, run folder, or "torchvision" / "timm"
    options: dict = field(default_factory=dict)  # more arguments of timm.create_model: {"drop_path_rate": 0.1}


@dataclass
class Data:
    train: str = ""  # .beton to pretrain on
    test: str | None = None  # labelled .beton: queries of the kNN monitor and the probe
    bank: str | None = None  # labelled .beton whose features are the kNN bank; None: the training file
    views: tuple = ()  # recipe: tuple of fastssl.kernels.views.View
    eval_view: Any = None  # View for evaluation; None: centre crop at the size of view 0


@dataclass
class Optim:
    name: str = "sgd"  # "sgd", "adamw", "lars"
    lr: float = 0.03
    batch: int = 256  # global: all ranks and micro-batches together
    epochs: int = 200
    steps: int | None = None  # stop after so many optimizer steps instead of `epochs`
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    weight_decay_end: float | None = None  # cosine to this over the run (ViT recipes); None: constant
    schedule: str = "cosine"  # "cosine", "cosine_epoch" (OpenSelfSup's staircase), "step", "constant"
    warmup_epochs: float = 0.0  # linear, per step
    warmup_ratio: float = 1e-4  # of the first step's lr to lr
    lr_end: float = 0.0  # of the cosine's last lr to lr
    milestones: tuple[float, ...] = ()  # epochs at which "step" multiplies by gamma
    gamma: float = 0.1
    base_batch: int | None = None  # linear scaling: lr is given for this batch and used times batch / base_batch
    dampening: float = 0.0
    nesterov: bool = False
    eta: float = 1e-3  # LARS: trust coefficient (solo-learn: 0.02)
    clip_lr: bool = False  # LARS: a tensor's lr is min(trust ratio, lr) (solo-learn)
    lr_in_momentum: bool = True  # LARS: lr inside the momentum buffer (OpenSelfSup), or outside (solo-learn)
    precision: str = "fp32"  # "fp32", "bf16", "fp16"; normalisation and statistics stay fp32
    clip: float = 0.0  # gradient norm; 0 does not clip
    paramwise: dict[str, dict] = field(default_factory=dict)  # regex -> options, all matches apply, later wins


@dataclass
class Speed:
    zero: int = 0  # ZeRO stage 0 to 3
    micro_batch: int | None = None  # images per rank and pass; None: the whole share of the batch
    workers: int | None = None  # decoding threads per rank; None: the cores of the node shared by its ranks
    resident: bool = False  # hold the decoded training set on the device
    channels_last: bool = True
    compile: bool = False
    kernels: str = "auto"  # "auto", "reference", "triton"


@dataclass
class Log:
    root: str = "work_dirs"  # the run folder is root/<config path>
    every: int = 50  # steps between printed lines
    keep: int = 2  # newest checkpoints kept
    checkpoint_epochs: float = 10  # between checkpoints; 0: only at the end
    checkpoint_steps: int | None = None  # between checkpoints in optimizer steps, instead
    knn_epochs: int = 0  # between kNN evaluations; 0: never
    probe: bool = False  # online linear probe
    collapse_every: int = 50  # steps between collapse measures; 0: never
    tensorboard: bool = True


@dataclass
class Run:
    method: Any  # a method's Config
    backbone: Backbone = field(default_factory=Backbone)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    log: Log = field(default_factory=Log)
    hooks: tuple = ()  # more observers, see hooks.py
    seed: int = 0
    deterministic: bool = False
    sync_bn: bool = False
    deepspeed: dict = field(default_factory=dict)  # passed through to DeepSpeed, over our own settings
    name: str = ""  # set by load(): the run folder below log.root


def quickstart() -> Path:
    """The config that is trained when none is named; configs/ of the checkout is installed as fastssl.configs."""
    return Path(importlib.util.find_spec("fastssl.configs").origin).parent / "quickstart.py"


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The `Run` of a config file with `a.b=value` overrides applied and checked."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.parent.glob("**/*.py")], 1)
        raise ValueError(f"no config file {path}{_hint(near)}")
    spec = importlib.util.spec_from_file_location("fastssl_config_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config() -> Run")
    run = module.get_config()
    if not isinstance(run, Run):
        raise ValueError(f"get_config() of {path} returned {type(run).__name__}, not fastssl.config.Run")
    run.name = run.name or _run_name(path)
    for override in overrides:
        set_override(run, override)
    validate(run)
    return run


def _run_name(path: Path) -> str:
    """configs/simclr/r50.py -> simclr/r50, wherever the configs folder lies."""
    parts = path.with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    else:
        parts = parts[-1:]
    return "/".join(parts)


def set_override(run: Run, text: str) -> None:
    """Apply one `a.b=value`; the value is a Python literal or a bare string, checked against the field's type."""
    key, eq, value = text.partition("=")
    if not eq:
        raise ValueError(f"override {text!r} is not of the form a.b=value")
    names = key.split(".")
    target: Any = run
    for name in names[:-1]:
        inside = isinstance(target, dict) and name in target
        target = target[name] if inside else getattr(target, _known(target, name, key))
    name = names[-1]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    if isinstance(target, dict):
        target[name] = parsed
        return
    _known(target, name, key)
    hint = typing.get_type_hints(type(target)).get(name, Any)
    parsed = _coerce(parsed, hint, key)
    object.__setattr__(target, name, parsed)  # a method's Config may be frozen


def _known(target: Any, name: str, key: str) -> str:
    if not dataclasses.is_dataclass(target):
        raise ValueError(f"{key}: {type(target).__name__} has no settings below it")
    names = [f.name for f in dataclasses.fields(target)]
    if name not in names:
        raise ValueError(f"{key}: unknown setting {name!r}{_hint(difflib.get_close_matches(name, names, 1))} "
                         f"({type(target).__name__} has {', '.join(names)})")
    return name


def _hint(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type, or a ValueError that names both; ints pass as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option, key)
            except ValueError:
                continue
    elif hint is type(None) and value is None:
        return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    elif (origin or hint) is tuple and isinstance(value, list | tuple):
        if args and args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"{key}: wants {len(args)} values, got {value!r}")
        element = (lambda i: args[0 if args[-1] is Ellipsis else i]) if args else (lambda i: Any)
        return tuple(_coerce(v, element(i), key) for i, v in enumerate(value))
    elif (origin or hint) is dict and isinstance(value, dict):
        return value
    elif isinstance(hint, type) and isinstance(value, hint) and not isinstance(value, bool):  # True is no 1
        return value
    raise ValueError(f"{key}: wants {getattr(hint, '__name__', hint)}, got {value!r}")


_CHOICES = {
    "optim.name": ("sgd", "adamw", "lars"),
    "optim.schedule": ("cosine", "cosine_epoch", "step", "constant"),
    "optim.precision": ("fp32", "bf16", "fp16"),
    "speed.zero": (0, 1, 2, 3),
    "speed.kernels": ("auto", "reference", "triton"),
    "backbone.stem": tuple(STEMS),
    "backbone.norm": ("bn", "gn", "frozen"),
}

_READ_BY = {  # options of Optim that only some choices read: anything else than the default is an error beside others
    **dict.fromkeys(("momentum", "dampening", "nesterov"), ("name", ("sgd", "lars"))),
    **dict.fromkeys(("eta", "clip_lr", "lr_in_momentum"), ("name", ("lars",))),
    **dict.fromkeys(("betas", "eps"), ("name", ("adamw",))),
    **dict.fromkeys(("milestones", "gamma"), ("schedule", ("step",))),
    "lr_end": ("schedule", ("cosine", "cosine_epoch")),
}


def validate(run: Run) -> None:
    """Check types and choices of every section; files and shapes are checked where they are opened."""
    for section in ("backbone", "data", "optim", "speed", "log", "method"):
        part = getattr(run, section)
        if not dataclasses.is_dataclass(part):
            raise ValueError(f"{section} must be a dataclass, got {part!r}")
        hints = typing.get_type_hints(type(part))
        for f in dataclasses.fields(part):
            value = _coerce(getattr(part, f.name), hints.get(f.name, Any), f"{section}.{f.name}")
            object.__setattr__(part, f.name, value)
    for key, choices in _CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
            raise ValueError(f"{key}={value!r} is none of {', '.join(map(str, choices))}{_hint(near)}")
    for key in ("optim.lr", "optim.batch", "optim.epochs", "log.every"):
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} must be positive")
    for key in ("optim.steps", "speed.micro_batch"):
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value is not None and value < 1:
            raise ValueError(f"{key}={value!r} must be at least 1, or None")
    for name in ("weight_decay", "momentum"):
        value = getattr(run.optim, name)
        if not 0 <= value < (1 if name == "momentum" else math.inf):
            raise ValueError(f"optim.{name}={value!r} must be at least 0" + ", below 1" * (name == "momentum"))
    for name in ("warmup_ratio", "lr_end"):
        value = getattr(run.optim, name)
        if not 0 <= value <= 1:
            raise ValueError(f"optim.{name}={value!r} is a part of lr: at least 0, at most 1")
    for f in dataclasses.fields(Optim):
        key, readers = _READ_BY.get(f.name, (None, ()))
        value, choice = getattr(run.optim, f.name), key and getattr(run.optim, key)
        if key and choice not in readers and value != f.default:
            raise ValueError(f"optim.{f.name}={value!r} has no effect with optim.{key}={choice!r}, only with "
                             f"{' and '.join(map(repr, readers))}: set optim.{key}, or optim.{f.name}={f.default!r}")
    if not run.data.views:
        raise ValueError("data.views is empty: give a recipe, for example views.simclr(224)")


def dump(run: Run) -> dict:
    """The resolved config as plain JSON data; `method` carries its module so that a run folder names its method."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kind = type(value)
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return fields if kind.__module__ == __name__ else {"type": f"{kind.__module__}.{kind.__name__}", **fields}
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value if isinstance(value, str | int | float | bool | None) else repr(value)

    return plain(run)


def dumps(run: Run) -> str:
    return json.dumps(dump(run), indent=2)
