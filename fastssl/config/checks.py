"""Checks of a run before anything is built."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from fastssl.config import settings
from fastssl.config.sections import Backbone, Data, Log, Optim, Run, Speed
from fastssl.config.zero import check_zero

SECTIONS = {"backbone": Backbone, "data": Data, "optim": Optim, "speed": Speed, "log": Log}
# Settings of Optim that have an effect only with some values of another one; with others they must have the default.
NEEDS = {
    **dict.fromkeys(("momentum", "dampening", "nesterov"), ("name", ("sgd", "lars"))),
    **dict.fromkeys(("eta", "clip_lr", "lr_in_momentum", "lars_denominator"), ("name", ("lars",))),
    **dict.fromkeys(("betas", "eps"), ("name", ("adamw",))),
    **dict.fromkeys(("milestones", "gamma"), ("schedule", ("step",))),
    "residual_in_fp32": ("precision", ("bf16", "fp16")),
    "lr_end": ("schedule", ("cosine", "cosine_epoch")),
}


def validate(run: Run) -> None:
    """Check the names, types, choices and ranges of all settings, and set `run.name` if it is empty.  Files and shapes
    are checked where they are read.  ValueError with the setting, its value and what it may be."""
    _check_names(run, "")
    _check_method(run.method)
    for name, kind in {**SECTIONS, "method": type(run.method)}.items():
        check_section(name, getattr(run, name), kind)
    for key in ("hooks", "seed", "deterministic", "sync_bn", "timeout_s", "deepspeed", "name"):
        setattr(run, key, settings.coerce(getattr(run, key), settings.field_types(Run)[key], key))
    _check_views(run.data)
    check_keep(run.log)
    _check_effect(run.optim)
    check_zero(run)
    if run.optim.clip_each and not run.optim.clip:
        raise ValueError("optim.clip_each=True clips every tensor's gradient to optim.clip, which is 0: set optim.clip")
    if not run.data.views:
        raise ValueError("data.views is empty: give a recipe, for example views.simclr(224)")
    run.name = run.name or _default_name(run)


def check_section(name: str, section: Any, kind: type[Any]) -> None:
    """Check the types and choices of all fields and convert the values, such as lists to tuples."""
    if not isinstance(section, kind):
        raise ValueError(f"{name} must be {kind.__name__}(...), got {section!r}")
    if name != "method":
        _check_names(section, f"{name}.")
    types = settings.field_types(kind)
    for f in dataclasses.fields(section):
        value = settings.coerce(getattr(section, f.name), types[f.name], f"{name}.{f.name}")
        object.__setattr__(section, f.name, value)


def _check_views(data: Data) -> None:
    from fastssl.kernels.augment import View  # takes seconds: torch

    for i, view in enumerate(data.views):
        if not isinstance(view, View):
            raise ValueError(f"data.views.{i} must be a View, got {view!r}; recipes are tuples, joined by +")
    if not isinstance(data.eval_view, View | None):
        raise ValueError(f"data.eval_view must be one View or None, got {data.eval_view!r}; try views.center(224)[0]")


def check_keep(log: Log) -> None:
    if log.keep != -1 and log.keep < 1:
        raise ValueError(f"log.keep={log.keep} must be at least 1, or -1 to keep every checkpoint")


def _check_effect(optim: Optim) -> None:
    """ValueError for a setting that has no effect with this optimizer or schedule."""
    defaults = Optim()
    for name, (key, readers) in NEEDS.items():
        value, default, choice = getattr(optim, name), getattr(defaults, name), getattr(optim, key)
        if choice not in readers and value != default:
            raise ValueError(
                f"optim.{name}={value!r} has no effect with optim.{key}={choice!r}, only with "
                f"{' and '.join(map(repr, readers))}: set optim.{key}, or optim.{name}={default!r}"
            )


def _check_names(part: Any, prefix: str) -> None:
    """ValueError for an attribute that is not a setting, such as `run.optim.lrr = 1` in a config file."""
    for name in vars(part).keys() - set(settings.names(part)):
        raise settings.unknown(part, name, prefix + name)


def _check_method(method: Any) -> None:
    """ValueError for anything but a method's Config, a dataclass with build(backbone, context)."""
    name = getattr(method, "__name__", "")
    if inspect.ismodule(method):
        raise ValueError(f"method is the module {name}: give its Config, {name.rpartition('.')[2]}.Config(...)")
    if isinstance(method, type):
        raise ValueError(f"method is the class {method.__module__}.{name}: give an instance, {name}(...)")
    if not dataclasses.is_dataclass(method):
        raise ValueError(f"method must be a method's Config, a dataclass with build(backbone, ...), got {method!r}")
    if not callable(getattr(method, "build", None)):
        raise ValueError(f"method: {type(method).__name__} has no build(backbone, context); see docs/extending.md")


def _default_name(run: Run) -> str:
    """The name of a Run without a config file: method/backbone_data, such as simclr/resnet50_mine."""
    kind = type(run.method)
    method = kind.__module__.rpartition(".")[2] if kind.__name__ == "Config" else kind.__name__.lower()
    return f"{method}/{run.backbone.name.replace('/', '_')}_{Path(run.data.train).stem}".removesuffix("_")
