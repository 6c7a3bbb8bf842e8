"""A run as JSON data."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from fastssl.config import sections

# Modules of classes in older dumps, and where the classes are now
MOVED = {"fastssl.kernels.views.": "fastssl.kernels.augment."}
# Fields of classes in older dumps, and their names now
RENAMED = {
    "fastssl.methods.byol.Config": {"predictor": "predictor_dim"},
    "fastssl.methods.deepcluster.Config": {"pca": "pca_dim"},
    "fastssl.methods.deepclusterv2.Config": {"large": "large_crops"},
    "fastssl.methods.densecl.Config": {"dense": "dense_weight"},
    "fastssl.methods.dino.Config": {"large": "large_crops"},
    "fastssl.methods.lejepa.Config": {"weight": "sigreg_weight", "end": "t_max", "large": "large_crops"},
    "fastssl.methods.mae.Config": {
        "mask": "mask_ratio",
        "decoder": "decoder_dim",
        "depth": "decoder_depth",
        "heads": "decoder_heads",
    },
    "fastssl.methods.mocov3.Config": {"predictor": "predictor_dim"},
    "fastssl.methods.nnclr.Config": {"predictor": "predictor_dim"},
    "fastssl.methods.odc.Config": {"least": "min_cluster_size", "every": "centroid_interval"},
    "fastssl.methods.simsiam.Config": {"predictor": "predictor_dim"},
    "fastssl.methods.swav.Config": {"large": "large_crops", "iterations": "sinkhorn_iterations"},
}
# Fields of sections that were bool in older dumps, and what False and True are now
BOOLEANS: dict[tuple[type, str], tuple[str, str]] = {(sections.Speed, "compile"): ("off", "on")}


def dump(run: Any) -> Any:
    """The config as JSON data; an object of any class but `config`'s own has its class as "type"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kind = type(value)
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            is_section = kind.__module__ == sections.__name__
            return fields if is_section else {"type": f"{kind.__module__}.{kind.__name__}", **fields}
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, set | frozenset):  # their order differs in every process
            return sorted((plain(v) for v in value), key=str)
        if isinstance(value, str | int | float | bool | None):
            return value
        if inspect.isroutine(value) or isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # without the address, which differs in every process

    return plain(run)


def with_defaults(dumped: Any, now: Any) -> Any:
    """The dump of an older version in the form of this one: fields that the class of `now` did not have get their
    defaults, and moved classes and renamed fields their present names."""
    if dataclasses.is_dataclass(now) and isinstance(dumped, dict):
        renamed = RENAMED.get(str(dumped.get("type")), {})
        dumped = {renamed.get(key, key): value for key, value in dumped.items()}
        filled = dict(dumped)
        for old, new in MOVED.items():
            if str(filled.get("type", "")).startswith(old):
                filled["type"] = new + filled["type"].removeprefix(old)
        for f in dataclasses.fields(now):
            if f.name in dumped:
                value, choices = dumped[f.name], BOOLEANS.get((type(now), f.name))
                value = choices[value] if choices and isinstance(value, bool) else value
                filled[f.name] = with_defaults(value, getattr(now, f.name))
            elif f.default is not dataclasses.MISSING:
                filled[f.name] = dump(f.default)
            elif f.default_factory is not dataclasses.MISSING:
                filled[f.name] = dump(f.default_factory())
        return filled
    if isinstance(now, list | tuple) and isinstance(dumped, list) and len(dumped) == len(now):
        return [with_defaults(a, b) for a, b in zip(dumped, now)]
    return dumped
