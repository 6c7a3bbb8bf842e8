"""Config files: Python with `get_config() -> Run`, and `a.b=value` overrides from the command line."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from fastssl.config import names, python_file, settings, typos
from fastssl.config.checks import validate
from fastssl.config.sections import Run
from fastssl.parsing import did_you_mean


def quickstart() -> Path:
    """The config that is trained where none is given."""
    return Path(str(importlib.resources.files("fastssl.configs"))) / "quickstart.py"


def check(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> None:
    """ValueError for the mistakes of a config file and its overrides that need not be looked for by running the file:
    it is missing, a name is misspelt, a value impossible.  Takes milliseconds, and `load` seconds (torch)."""
    path = Path(path)
    if not path.is_file():
        nearby = [*path.parent.glob("*.py"), *path.parent.parent.glob("*/*.py")]  # not deeper, where data may be
        raise ValueError(f"no config file {path}{did_you_mean(str(path), map(str, nearby))}")
    typos.check(path, overrides)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The checked `Run` of a config file, with `a.b=value` overrides.

    The folder of the file is the first on sys.path while it runs and the last afterwards, so that it can import modules
    from there.  ValueError with a message of one line for every mistake; for an exception in the file it has file and
    line.
    """
    path = Path(path)
    check(path, overrides)
    run = python_file.call(path, "get_config")
    if not isinstance(run, Run):
        raise ValueError(f"get_config() of {path} returned {type(run).__name__}, not fastssl.config.Run")
    run.name = run.name or run_name(path)
    for override in names.in_order(overrides):
        set_override(run, override)
    validate(run)
    return run


def run_name(path: str | Path) -> str:
    """configs/simclr/r50.py -> simclr/r50, for a folder configs anywhere; other/r50.py -> r50."""
    parts = Path(path).with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    else:
        parts = parts[-1:]
    return "/".join(parts)


def set_override(run: Run, text: str) -> None:
    """Apply one `a.b=value`, checked against the type of the field.  `method=byol` and `data.views=moco_v2` take a name
    or a call such as "swav(96, small=48)"."""
    key, _, value = text.partition("=")
    if key == "method":
        run.method = names.method(value)
    elif key == "data.views":
        run.data.views = names.recipe(value, run.data.views, key)
    elif key == "data.eval_view" and value.lower() != "none":
        views = names.recipe(value, run.data.views, key)
        if len(views) != 1:
            raise ValueError(f"{key}={value}: takes one view and this recipe has {len(views)}; try center(224, 256)")
        run.data.eval_view = views[0]
    else:
        settings.assign(run, text)
