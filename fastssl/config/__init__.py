"""The run, as typed data.  A config file is Python with `get_config() -> Run`; `load` adds `a.b=value` overrides.

`Data` and `Optim` change results, `Speed` must not (tests/test_engine.py; batch norm alone sees `micro_batch`).
An unknown name is answered by the nearest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastssl.config import file as configfile
from fastssl.config import names as named
from fastssl.config import settings

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
    init: str = "fan_out"  # Kaiming initialisation of convolutions: torchvision's, or "fan_in" (OpenSelfSup; ResNets)
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
    views: tuple = ()  # recipe: tuple of fastssl.kernels.augment.View
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
    lars_denominator: str = "openselfsup"  # |g| + wd |w|; "larc": + 1e-8 (apex, SwAV, MMSelfSup, solo-learn); "sum":
    # |g + wd w| (SimCLR, BYOL, MoCo v3, Barlow Twins, VICReg of their authors)
    lr_in_momentum: bool = True  # LARS: lr inside the momentum buffer (OpenSelfSup), or outside (solo-learn)
    precision: str = "fp32"  # "fp32", "bf16", "fp16"; normalisation and statistics stay fp32
    clip: float = 0.0  # gradient norm; 0 does not clip
    clip_each: bool = False  # `clip` bounds the gradient of every tensor by itself (DINO), not that of all together
    paramwise: dict[str, dict] = field(default_factory=dict)  # regex -> options, all matches apply, later wins


@dataclass
class Speed:
    zero: int = 0  # ZeRO stage 0 to 3
    micro_batch: int | None = None  # images per rank and pass; None: the whole share of the batch
    workers: int | None = None  # decoding threads per rank; None: the cores of the node shared by its ranks
    resident: bool = False  # hold the decoded training set on the device
    channels_last: bool = True
    compile: bool = False
    graph: str = "auto"  # the whole step as a CUDA graph: "on", "off", "auto" (on where it has been measured)
    kernels: str = "auto"  # "auto", "reference", "triton"


@dataclass
class Log:
    root: str = "work_dirs"  # the run folder is root/<config path>
    every: int = 50  # steps between printed lines
    keep: int = 2  # newest checkpoints kept; -1: all
    keep_every: float = 0  # epochs; their checkpoints are written and stay beside the newest; 0: none
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
    """The `Run` of a config file with `a.b=value` overrides applied and checked.

    Its folder is on sys.path, first while the file runs and last afterwards: a module beside it can be imported.
    ValueError of one line for every mistake; where the file raised, with its name, line and the error.
    """
    path = Path(path)
    if not path.is_file():
        near = [*path.parent.glob("*.py"), *path.parent.parent.glob("*/*.py")]  # not deeper: data may lie there
        raise ValueError(f"no config file {path}{settings.hint(path, near)}")
    run = configfile.call(path, "get_config")
    if not isinstance(run, Run):
        raise ValueError(f"get_config() of {path} returned {type(run).__name__}, not fastssl.config.Run")
    run.name = run.name or _run_name(path)
    # a setting that replaces others goes first: `method.momentum=0.9 method=byol` sets BYOL's momentum
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):
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
    """Apply one `a.b=value`, checked against the field's type (settings.assign); `method=byol` and
    `data.views=moco_v2` take a name, or a call such as "swav(96, small=48)"."""
    key, _, value = text.partition("=")
    if key == "method":
        run.method = named.method(value)
    elif key == "data.views":
        run.data.views = named.recipe(value, run.data.views, key)
    elif key == "data.eval_view" and value.lower() != "none":
        views = named.recipe(value, run.data.views, key)
        if len(views) != 1:
            raise ValueError(f"{key}={value}: wants one view and this recipe has {len(views)}; try center(224, 256)")
        run.data.eval_view = views[0]
    else:
        settings.assign(run, text)


_CHOICES = {
    "optim.name": ("sgd", "adamw", "lars"),
    "optim.schedule": ("cosine", "cosine_epoch", "step", "constant"),
    "optim.lars_denominator": ("openselfsup", "larc", "sum"),
    "optim.precision": ("fp32", "bf16", "fp16"),
    "speed.zero": (0, 1, 2, 3),
    "speed.kernels": ("auto", "reference", "triton"),
    "speed.graph": ("auto", "on", "off"),
    "backbone.stem": tuple(STEMS),
    "backbone.init": ("fan_out", "fan_in"),
    "backbone.norm": ("bn", "gn", "frozen"),
}

_READ_BY = {  # options of Optim that only some choices read: anything else than the default is an error beside others
    **dict.fromkeys(("momentum", "dampening", "nesterov"), ("name", ("sgd", "lars"))),
    **dict.fromkeys(("eta", "clip_lr", "lr_in_momentum", "lars_denominator"), ("name", ("lars",))),
    **dict.fromkeys(("betas", "eps"), ("name", ("adamw",))),
    **dict.fromkeys(("milestones", "gamma"), ("schedule", ("step",))),
    "lr_end": ("schedule", ("cosine", "cosine_epoch")),
}


def validate(run: Run) -> None:
    """Check names, types and choices of every section, and name the run if it has no name; files and shapes are
    checked where they are opened."""
    from fastssl.kernels.augment import View  # seconds: torch

    _check_names(run, "")
    _check_method(run.method)
    for kind in (Backbone, Data, Optim, Speed, Log, type(run.method)):
        section = "method" if kind is type(run.method) else kind.__name__.lower()
        part = getattr(run, section)
        if not isinstance(part, kind):
            raise ValueError(f"{section} must be {kind.__name__}(...), got {part!r}")
        if section != "method":
            _check_names(part, section + ".")
        hints = settings.hints(type(part))
        for f in dataclasses.fields(part):
            value = settings.coerce(getattr(part, f.name), hints[f.name], f"{section}.{f.name}")
            object.__setattr__(part, f.name, value)
    for key in ("hooks", "seed", "deterministic", "sync_bn", "deepspeed", "name"):
        setattr(run, key, settings.coerce(getattr(run, key), settings.hints(Run)[key], key))
    for i, view in enumerate(run.data.views):
        if not isinstance(view, View):
            raise ValueError(f"data.views.{i} must be a View, got {view!r}; recipes are tuples, joined by +")
    if not isinstance(run.data.eval_view, View | None):
        raise ValueError(
            f"data.eval_view must be one View or None, got {run.data.eval_view!r}: of a recipe its first, "
            "views.center(224)[0]"
        )
    for key, choices in _CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise ValueError(f"{key}={value!r} is none of {known}{settings.hint(value, choices)}")
    for key in ("optim.lr", "optim.batch", "optim.epochs", "log.every"):
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{key}={value!r} must be positive")
    for key in ("optim.steps", "speed.micro_batch", "log.checkpoint_steps"):
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value is not None and value < 1:
            raise ValueError(f"{key}={value!r} must be at least 1, or None")
    if run.log.keep != -1 and run.log.keep < 1:
        raise ValueError(f"log.keep={run.log.keep} must be at least 1, or -1 to keep every checkpoint")
    for name in ("weight_decay", "momentum"):
        value = getattr(run.optim, name)
        if not 0 <= value < (1 if name == "momentum" else math.inf):
            raise ValueError(f"optim.{name}={value!r} must be at least 0" + ", below 1" * (name == "momentum"))
    for name in ("warmup_ratio", "lr_end"):
        value = getattr(run.optim, name)
        if not 0 <= value <= 1:
            raise ValueError(f"optim.{name}={value!r} is a part of lr: at least 0, at most 1")
    for section in ("backbone", "optim", "speed", "log"):
        for name, value in vars(getattr(run, section)).items():
            for number in value if isinstance(value, tuple) else (value,):
                low = -1 if name == "keep" else 0
                if isinstance(number, int | float) and not low <= number < math.inf:
                    raise ValueError(f"{section}.{name}={value!r} must be at least {low} and finite")
    for f in dataclasses.fields(Optim):
        key, readers = _READ_BY.get(f.name, (None, ()))
        value, choice = getattr(run.optim, f.name), key and getattr(run.optim, key)
        if key and choice not in readers and value != f.default:
            raise ValueError(
                f"optim.{f.name}={value!r} has no effect with optim.{key}={choice!r}, only with "
                f"{' and '.join(map(repr, readers))}: set optim.{key}, or optim.{f.name}={f.default!r}"
            )
    if run.optim.clip_each and not run.optim.clip:
        raise ValueError("optim.clip_each=True clips every tensor's gradient to optim.clip, which is 0: set optim.clip")
    if not run.data.views:
        raise ValueError("data.views is empty: give a recipe, for example views.simclr(224)")
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must be 0 or more")
    run.name = run.name or _default_name(run)


def _check_names(part: Any, prefix: str) -> None:
    """`run.optim.lrr = 1` in a config file would otherwise be a new attribute that nothing reads."""
    for name in vars(part).keys() - set(settings.names(part)):
        known = settings.names(part)
        raise ValueError(
            f"{prefix}{name}: unknown setting {name!r}{settings.hint(name, known)} "
            f"({type(part).__name__} has {', '.join(known)})"
        )


def _check_method(method: Any) -> None:
    """A method is given by its Config, a dataclass with build(backbone, ...)."""
    if inspect.ismodule(method):
        raise ValueError(
            f"method is the module {method.__name__}: give its Config, {method.__name__.rpartition('.')[2]}.Config(...)"
        )
    if isinstance(method, type):
        raise ValueError(
            f"method is the class {method.__module__}.{method.__name__}: give an instance, {method.__name__}(...)"
        )
    if not dataclasses.is_dataclass(method):
        raise ValueError(f"method must be a method's Config, a dataclass with build(backbone, ...), got {method!r}")
    if not callable(getattr(method, "build", None)):
        raise ValueError(
            f"method: {type(method).__name__} has no build(backbone, *, samples, classes, batch, kernels) "
            "that returns the method; see docs/extending.md"
        )


def _default_name(run: Run) -> str:
    """Of a Run made in Python: method/backbone_data, e.g. simclr/resnet50_mine."""
    kind = type(run.method)
    method = kind.__module__.rpartition(".")[2] if kind.__name__ == "Config" else kind.__name__.lower()
    return f"{method}/{run.backbone.name.replace('/', '_')}_{Path(run.data.train).stem}".removesuffix("_")


def dump(run: Any) -> Any:
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
        if isinstance(value, str | int | float | bool | None):
            return value
        if inspect.isroutine(value) or isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address differs in the next process

    return plain(run)


def with_defaults(dumped: Any, now: Any) -> Any:
    """A dumped value with the fields that its class `type(now)` has got since, at their defaults."""
    if dataclasses.is_dataclass(now) and isinstance(dumped, dict):
        filled = dict(dumped)
        for f in dataclasses.fields(now):
            if f.name in dumped:
                filled[f.name] = with_defaults(dumped[f.name], getattr(now, f.name))
            elif f.default is not dataclasses.MISSING:
                filled[f.name] = dump(f.default)
            elif f.default_factory is not dataclasses.MISSING:
                filled[f.name] = dump(f.default_factory())
        return filled
    if isinstance(now, list | tuple) and isinstance(dumped, list) and len(dumped) == len(now):
        return [with_defaults(a, b) for a, b in zip(dumped, now)]
    return dumped
