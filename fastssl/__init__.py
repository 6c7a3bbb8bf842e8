"""Self-supervised pretraining of image backbones.  From Python (docs/python.md):

    run = fastssl.load("configs/mine/r50.py", ["optim.lr=0.6"])
    trainer = fastssl.fit(run)
    x, y = fastssl.features(trainer)

`import fastssl` is fast: each name is imported on its first use.
"""

import importlib
import sys
from typing import Any

_FROM = {
    "load": "config",
    "Run": "config",
    "Backbone": "config",
    "Data": "config",
    "Optim": "config",
    "Speed": "config",
    "Log": "config",
    "fit": "api",
    "features": "api",
    "convert": "api",
}
_MODULES = ("config", "hooks", "methods", "views")

__all__ = ["__version__", *_FROM, *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastssl")
    if name in _FROM:
        return getattr(importlib.import_module(f"fastssl.{_FROM[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fastssl.{name}")
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
