"""Parameter groups by regular expressions (`Optim.paramwise`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from fastssl.config import Optim
from fastssl.parsing import did_you_mean

# Pattern for all norms and biases, instead of a regular expression: names such as `downsample.1` do not show a norm
NORM_AND_BIAS = "ndim<=1"
KEYS = (
    "lr",
    "lr_mult",
    "momentum",
    "momentum_mult",
    "weight_decay",
    "weight_decay_mult",
    "lars_exclude",
    "schedule",
    "freeze_epochs",
)


def frozen(optim: Optim, epochs: dict[str, float]) -> Optim:
    """A copy of `optim` that freezes the parameters of each pattern in `epochs` for that number of first epochs, unless
    its `paramwise` says otherwise."""
    frozen = {pattern: {"freeze_epochs": n} for pattern, n in epochs.items() if n}
    merged = {key: {**frozen.get(key, {}), **optim.paramwise.get(key, {})} for key in {**frozen, **optim.paramwise}}
    return replace(optim, paramwise=merged)


@dataclass
class Group:
    params: list[Tensor]
    patterns: tuple[str, ...]  # that match the parameters, in the order in which they apply
    options: dict  # of the optimizer's group, before the schedule
    schedule: str | None  # "constant": no lr schedule (SimSiam's predictor)
    freeze_epochs: float  # first epochs without updates of parameters and optimizer state (DINO's prototypes)


def matches(pattern: str, name: str, parameter: Tensor) -> bool:
    if pattern == NORM_AND_BIAS:
        return parameter.ndim <= 1
    return re.search(pattern, name) is not None


def group_parameters(named: Iterable[tuple[str, Tensor]], optim: Optim, lr: float) -> list[Group]:
    """The trainable parameters in groups of equal options, in order of appearance.

    All matching patterns apply; for each option the last one counts.  Options with `_mult` multiply the value of
    `optim`.  ValueError for a pattern that matches no parameter, which is a typo or a layer that no longer exists.
    """
    for pattern, options in optim.paramwise.items():
        _check(pattern, options, optim)
    named = [(name, p) for name, p in named if p.requires_grad]
    if not named:
        raise ValueError("the method has no trainable parameter")
    groups: dict[tuple, Group] = {}
    unused = set(optim.paramwise)
    for name, p in named:
        patterns = tuple(pattern for pattern in optim.paramwise if matches(pattern, name, p))
        unused.difference_update(patterns)
        if patterns not in groups:
            groups[patterns] = Group([], patterns, *_resolve(patterns, optim, lr))
        groups[patterns].params.append(p)
    if unused:
        names = [name for name, _ in named]
        raise ValueError(
            f"optim.paramwise pattern {sorted(unused)[0]!r} matches no parameter; "
            f"names of parameters are, for example, {', '.join(names[:2] + names[-2:])}"
        )
    return list(groups.values())


def _check(pattern: str, options: dict, optim: Optim) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"optim.paramwise pattern {pattern!r} is not a regular expression: {error}") from None
    for key, value in options.items():
        where = f"optim.paramwise[{pattern!r}][{key!r}]"
        if key not in KEYS:
            raise ValueError(f"{where}: unknown option{did_you_mean(key, KEYS)} (options: {', '.join(KEYS)})")
        if key == "schedule":
            valid = value == "constant"
        elif key == "lars_exclude":
            valid = isinstance(value, bool)
        else:
            valid = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not valid:
            valid_values = {"schedule": "'constant'", "lars_exclude": "True or False"}.get(key, "a number >= 0")
            raise ValueError(f"{where}={value!r} must be {valid_values}")
        if key.startswith("momentum") and optim.name == "adamw":
            raise ValueError(f"{where}: adamw has no momentum; optim.betas applies to all parameters")


def _resolve(patterns: tuple[str, ...], optim: Optim, lr: float) -> tuple[dict, str | None, float]:
    base = {"lr": lr, "weight_decay": optim.weight_decay}
    if optim.name != "adamw":
        base["momentum"] = optim.momentum
    if optim.name == "lars":
        base["lars_exclude"] = False
    options, schedule, freeze_epochs = dict(base), None, 0.0
    for pattern in patterns:
        for key, value in optim.paramwise[pattern].items():
            if key == "schedule":
                schedule = value
            elif key == "freeze_epochs":
                freeze_epochs = value
            elif key.endswith("_mult"):
                options[key[:-5]] = base[key[:-5]] * value
            elif key in base:
                options[key] = value  # lars_exclude has no effect without LARS and is dropped
    return options, schedule, freeze_epochs


def describe_groups(groups: list[Group]) -> str:
    """A table of the groups for the terminal: patterns, numbers of tensors and parameters, options."""
    rows = [("patterns", "tensors", "parameters", "options")]
    for g in groups:
        options = ", ".join(f"{k} {v:g}" for k, v in g.options.items() if k != "lars_exclude")
        options += ", no LARS" * g.options.get("lars_exclude", False) + ", constant lr" * (g.schedule == "constant")
        options += f", frozen for {g.freeze_epochs:g} epochs" * bool(g.freeze_epochs)
        count = sum(p.numel() for p in g.params)
        rows.append((" + ".join(g.patterns) or "(no pattern)", str(len(g.params)), f"{count:,}", options))
    a, b, c = (max(len(row[i]) for row in rows) for i in range(3))
    return "\n".join(f"{row[0]:<{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]}" for row in rows)
