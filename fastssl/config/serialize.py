"""A run as JSON data."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from fastssl.config import sections

# Modules of classes in older dumps, and where the classes are now
MOVED = {"fastssl.kernels.views.": "fastssl.kernels.augment."}


def dump(run: Any) -> Any:
    """The config as JSON data; an object of any class but `config`'s own has its class as "type"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kind = type(value)
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return (
                fields
                if kind.__module__ == sections.__name__
                else {"type": f"{kind.__module__}.{kind.__name__}", **fields}
            )
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, str | int | float | bool | None):
            return value
        if inspect.isroutine(value) or isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # without the address, which differs in every process

    return plain(run)


def with_defaults(dumped: Any, now: Any) -> Any:
    """`dumped` with the fields that the class of `now` has gained since then, at their defaults, and with the present
    names of classes that have moved."""
    if dataclasses.is_dataclass(now) and isinstance(dumped, dict):
        filled = dict(dumped)
        for old, new in MOVED.items():
            if str(filled.get("type", "")).startswith(old):
                filled["type"] = new + filled["type"].removeprefix(old)
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
