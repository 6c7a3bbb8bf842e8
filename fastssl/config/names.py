"""Methods and recipes by their names on the command line: `method=byol`, `data.views="swav(96, small=48)"`.

fastssl.methods and fastssl.views, which import fastssl.config, are imported here by name when a setting needs them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from fastssl.config import settings
from fastssl.parsing import did_you_mean


def in_order(overrides: Iterable[str]) -> list[str]:
    """Sections before their settings: `method.momentum=0.9 method=byol` sets BYOL's momentum."""
    return sorted(overrides, key=lambda text: text.partition("=")[0].count("."))


def config_of(name: str) -> type:
    return importlib.import_module(f"fastssl.methods.{name}").Config


def method(text: str, config_of: Callable[[str], type | None] = config_of) -> Any:
    """The Config of the method that `text` names, with the arguments that it gives; None where `config_of` has none."""
    name, args, options = _call(text, "method")
    known = importlib.import_module("fastssl.methods").names()
    if name not in known:
        raise ValueError(f"method={name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    kind = config_of(name)
    return kind and _construct(kind, name, args, options, "method")


def recipe(text: str, like: tuple, key: str) -> tuple:
    """The recipe of fastssl.views that `text` names; size, mean and std are those of like[0] where it gives none."""
    name, args, options = _call(text, key)
    known = {
        n: f
        for n, f in vars(importlib.import_module("fastssl.views")).items()
        if inspect.isfunction(f) and n[0] != "_" and "size" in inspect.signature(f).parameters
    }
    check_recipe(text, known, key)
    kept = {f: getattr(like[0], f) for f in ("size", "mean", "std")} if like else {}
    if args:
        kept.pop("size", None)
    return _construct(known[name], name, args, {**kept, **options}, key)


def check_recipe(text: str, known: Iterable[str], key: str) -> None:
    name, _, _ = _call(text, key)
    if name not in known:
        raise ValueError(f"{key}={name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")


def _call(text: str, key: str) -> tuple[str, tuple, dict]:
    """The text `name` or `name(1, a=2)` -> name, positional and keyword arguments."""
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, (), {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
            return (
                node.func.id,
                tuple(ast.literal_eval(a) for a in node.args),
                {k.arg: ast.literal_eval(k.value) for k in node.keywords},
            )
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    raise ValueError(f"{key}={text}: give a name, or name(argument=value, ...) with plain values")


def _construct(make: Callable, name: str, args: tuple, options: dict, key: str) -> Any:
    try:
        return make(*args, **options)
    except TypeError as error:
        wrong = next((k for k in options if repr(k) in str(error)), None)
        known = list(inspect.signature(make).parameters)
        if "changes" in known:
            known += settings.names(importlib.import_module("fastssl.views").View)
        raise ValueError(f"{key}={name}(...): {error}" + (did_you_mean(wrong, known) if wrong else "")) from error
