"""What modules of fastssl define, read from their source: importing the methods or the recipes would import torch."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fastssl.config import bounds, sections, settings

VIEW = "fastssl.kernels.augment.params"  # has the class View, to which recipes pass their keywords


class Callee(NamedTuple):
    """A class or function of fastssl: its name in Python's error about a keyword, and the keywords that it takes."""

    name: str
    parameters: list[str]


def file_of(module: str) -> Path | None:
    """The source file of a module of fastssl; None for any other name."""
    first, *rest = module.split(".")[1:] or [""]
    spec = importlib.util.find_spec(f"fastssl.{first}" if first else "fastssl")
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    path = Path(spec.origin)
    if not rest:
        return path
    below = path.parent.joinpath(*rest)
    files = (below.with_suffix(".py"), below / "__init__.py") if spec.submodule_search_locations else ()
    return next((file for file in files if file.is_file()), None)


@lru_cache
def tree_of(module: str) -> ast.Module | None:
    path = file_of(module) if module.split(".")[0] == "fastssl" else None
    return ast.parse(path.read_bytes()) if path else None


def members(module: str) -> list[str] | None:
    """The public names of a module of fastssl, its sub-modules included; None where it is not a module."""
    tree, path = tree_of(module), file_of(module)
    if tree is None or path is None:
        return None
    files = path.parent.iterdir() if path.name == "__init__.py" else ()
    inside = [p.stem for p in files if p.suffix == ".py" or (p / "__init__.py").exists()]
    exported = importlib.import_module("fastssl").__all__ if module == "fastssl" else ()
    if module == "fastssl":  # kernels, data_prep and configs are elsewhere
        inside += ["kernels", "data_prep", "configs"]
    names = [name for node in scope(tree.body) for name in bound(node)]
    return [name for name in dict.fromkeys([*inside, *names, *exported]) if name[0] != "_"]


def scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of a block, without those inside its functions and classes."""
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            stack += reversed(list(ast.iter_child_nodes(node)))


def bound(node: ast.AST) -> list[str]:
    """The names that a node defines."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        return [node.name] if node.name else []
    return [node.rest] if isinstance(node, ast.MatchMapping) and node.rest else []


def callee(target: str) -> Callee | None:
    """The class of settings, Config of a method or recipe that a dotted name means; None for anything else."""
    module, _, name = target.rpartition(".")
    if module in ("fastssl", "fastssl.config") and isinstance(kind := getattr(sections, name, None), type):
        return Callee(f"{name}.__init__", settings.names(kind))
    if module.startswith("fastssl.methods.") and name == "Config" and (made := method_config(module.split(".")[2])):
        return Callee("Config.__init__", settings.names(made))
    if module == "fastssl.views" and name in recipes():
        return Callee("View.__init__", recipes()[name])
    return None


@lru_cache
def method_config(name: str) -> type | None:
    """A dataclass with the fields of a method's Config, and without its functions; None where its source does more than
    annotate and give plain defaults."""
    tree = tree_of(f"fastssl.methods.{name}")
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None) if tree else None
    if found is None:
        return None
    fields: list[ast.stmt] = [statement for statement in found.body if isinstance(statement, ast.AnnAssign)]
    dataclass = ast.ImportFrom("dataclasses", [ast.alias("dataclass"), ast.alias("field")], 0)
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    light = copy.copy(found)
    light.body = fields or [ast.Pass()]
    module = ast.fix_missing_locations(ast.Module([future, dataclass, light], []))
    space: dict[str, Any] = {**vars(typing), **vars(bounds), "__name__": __name__}
    try:
        exec(compile(module, f"the settings of {name}", "exec"), space)
        space["Config"].__annotations__ = typing.get_type_hints(space["Config"], space, include_extras=True)
    except (NameError, AttributeError, TypeError, ValueError):
        return None
    return space["Config"]


@lru_cache
def recipes() -> dict[str, list[str]]:
    """The recipes of fastssl.views with the keywords that each takes: its own and the fields of View."""
    kernels, views = tree_of(VIEW), tree_of("fastssl.views")
    assert kernels and views, "both are modules of ours"
    view = next(n for n in kernels.body if isinstance(n, ast.ClassDef) and n.name == "View")
    fields = [s.target.id for s in view.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    found = {}
    for function in views.body:
        if isinstance(function, ast.FunctionDef) and function.name[0] != "_":
            own = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            if "size" in own and function.args.kwarg:
                found[function.name] = list(dict.fromkeys([*own, *fields]))
    return found
