"""Misspelt names and impossible values in a config file and its overrides, found in the text before torch is imported.

Running the file finds the same mistakes and all others with the same messages (tests/test_typos.py), but it imports
torch, which takes seconds.  What the text alone does not decide is not checked here.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastssl.config import checks, names, python_file, settings, source
from fastssl.config.sections import Run
from fastssl.parsing import did_you_mean

DYNAMIC = {"exec", "eval", "globals", "locals", "vars", "setattr", "__import__"}  # may define any name
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Import, ast.ImportFrom)


def check(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> None:
    """ValueError for a mistake that running the file would certainly find.  Nothing in it is executed."""
    try:
        file = _File(str(path), ast.parse(Path(path).read_bytes(), str(path)))
    except (SyntaxError, ValueError) as error:
        raise ValueError(python_file.explain(error, Path(path))) from error
    except (RecursionError, MemoryError):
        return  # running the file says so
    file.check_names()
    run = file.run()
    for text in names.in_order(overrides):
        _override(run, text)
    for name in checks.SECTIONS:
        if not any(text.partition("=")[0] == name for text in overrides):
            checks.check_section(name, getattr(run, name), checks.SECTIONS[name])
    checks.check_keep(run.log)
    if run.method is not None:
        checks.check_section("method", run.method, type(run.method))


class _File:
    """A config file.  `imported`: names that the file imports from fastssl -> dotted names: simclr ->
    fastssl.methods.simclr."""

    def __init__(self, path: str, tree: ast.Module):
        self.path, self.tree = path, tree
        everything = [name for node in ast.walk(tree) for name in source.bound(node)]
        self.bound = set(everything)
        self.executed = list(_executed(tree))
        imports = [node for node in self.executed if isinstance(node, ast.ImportFrom) and _is_ours(node)]
        given = {alias.asname or alias.name: f"{n.module}.{alias.name}" for n in imports for alias in n.names}
        self.imported = {name: target for name, target in given.items() if everything.count(name) == 1}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        stored = any(
            isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and self.target(node.value)
            for node in ast.walk(tree)
        )
        if used & DYNAMIC or "*" in self.bound or stored:
            self.executed = []

    def check_names(self) -> None:
        known = {*self.bound, *vars(builtins), "__name__", "__file__", "__doc__"}
        for node in self.executed:
            if isinstance(node, ast.ImportFrom) and _is_ours(node):
                self._check_import(node)
            elif isinstance(node, ast.Name) and node.id not in known:
                self._fail(node, f"NameError: name {node.id!r} is not defined", node.id, known)
            elif isinstance(node, ast.Attribute) and (module := self.target(node.value)):
                members = source.members(module)
                if members is not None and node.attr not in members and node.attr[0] != "_":
                    text = f"AttributeError: module {module!r} has no attribute {node.attr!r}"
                    self._fail(node, text, node.attr, members)
            elif isinstance(node, ast.Call) and (callee := self._callee(node)):
                for keyword in node.keywords:
                    if keyword.arg and keyword.arg not in callee.parameters:
                        text = f"TypeError: {callee.name}() got an unexpected keyword argument {keyword.arg!r}"
                        listed = f" (arguments: {', '.join(callee.parameters)})"
                        self._fail(keyword, text, keyword.arg, callee.parameters, listed)

    def _check_import(self, node: ast.ImportFrom) -> None:
        module = node.module or ""  # a relative import is not one of ours
        members = source.members(module)
        for alias in node.names:
            if members is not None and alias.name not in (*members, "*") and alias.name[0] != "_":
                text = f"ImportError: cannot import name {alias.name!r} from {module!r}"
                self._fail(node, f"{text} ({source.file_of(module)})", alias.name, members)

    def run(self) -> Run:
        """A Run with the plain values that the file's `return Run(...)` gives, and a stand-in for a method's Config."""
        run = Run(method=None)
        returned = [node.value for node in self.executed if isinstance(node, ast.Return)]
        call = returned[0] if len(returned) == 1 and isinstance(returned[0], ast.Call) else None
        if call is None or self.target(call.func) not in ("fastssl.config.Run", "fastssl.Run"):
            return run
        for keyword in call.keywords:
            section, inner = keyword.arg or "", keyword.value
            if not isinstance(inner, ast.Call) or not (target := self.target(inner.func)):
                continue
            if section == "method" and target.startswith("fastssl.methods."):
                kind = source.method_config(target.split(".")[2]) if target.endswith(".Config") else None
                run.method = kind and kind(**_plain(inner, kind))
            elif target.rpartition(".")[2] == getattr(checks.SECTIONS.get(section), "__name__", None):
                for name, value in _plain(inner, checks.SECTIONS[section]).items():
                    setattr(getattr(run, section), name, value)
        return run

    def target(self, node: ast.AST) -> str | None:
        """The dotted name in fastssl that an expression refers to: `simclr.Config` -> fastssl.methods.simclr.Config."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.target(node.value)):
            return f"{owner}.{node.attr}"
        return None

    def _callee(self, call: ast.Call) -> source.Callee | None:
        target = self.target(call.func)
        return source.callee(target) if target else None

    def _fail(
        self, node: ast.stmt | ast.expr | ast.keyword, text: str, name: str, known: Iterable[str], listed: str = ""
    ) -> None:
        raise ValueError(f"{self.path}, line {node.lineno}: {text}{did_you_mean(name, known)}{listed}")


def _is_ours(node: ast.ImportFrom) -> bool:
    return not node.level and (node.module or "").split(".")[0] == "fastssl"


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that are certainly evaluated where the file is run and get_config() called, in about their order."""
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_config"]
    body = functions[0].body if len(functions) == 1 and not functions[0].decorator_list else []
    for statement in [*tree.body, *body]:
        if isinstance(statement, SIMPLE):
            yield from _evaluated(statement)
        if isinstance(statement, ast.Return | ast.Raise):
            return


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return
    yield node
    children: list = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.IfExp):
        children = [node.test]
    elif isinstance(node, ast.BoolOp):
        children = node.values[:1]
    elif isinstance(node, ast.Compare):
        children = [node.left, node.comparators[0]]
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    elif isinstance(node, ast.Call):  # the arguments come before the call
        children = [node.func, *node.args, *node.keywords]
    for child in children:
        yield from _evaluated(child)


def _plain(call: ast.Call, kind: type) -> dict[str, Any]:
    """The keyword arguments of a call that are literals; they need not have the right type."""
    found = {}
    for keyword in call.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if keyword.arg in settings.names(kind):
            found[keyword.arg] = value
    return found


def _override(run: Run, text: str) -> None:
    """Apply an override to the settings that are known without running the file."""
    key, _, value = text.partition("=")
    if key == "method":
        run.method = names.method(value, source.method_config)
    elif key in ("data.views", "data.eval_view"):
        if key == "data.views" or value.lower() != "none":
            names.check_recipe(value, source.recipes(), key)
    elif _is_known(run, key):
        settings.assign(run, text)


def _is_known(run: Run, key: str) -> bool:
    """Whether what holds the setting `key` is known: not the views, dictionaries and methods that the file makes."""
    first, *rest = key.split(".")
    if first == "method":
        return run.method is not None and len(rest) == 1
    if first in ("data", "hooks") and rest[:1] and rest[0] in ("views", "eval_view"):
        return False
    return first != "hooks" and len(rest) <= 1
