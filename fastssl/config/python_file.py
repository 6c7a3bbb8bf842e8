"""Run a user's Python file, and turn an exception in it into a message of one line: file, line number, error, and for a
misspelt name the nearest known one.  FASTSSL_TRACEBACK=1 shows the whole traceback (see train.py).
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any

from fastssl.config import settings
from fastssl.parsing import did_you_mean


def call(path: Path, function: str | None) -> Any:
    """Execute the Python file `path` as a module and return the result of its function `function()`; with None, only
    execute it.

    ValueError for any exception in the file, including SystemExit and RecursionError."""
    name = "fastssl_config_" + path.stem
    module, before = ModuleType(name), sys.modules.get(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        with _first_on_sys_path(path.resolve().parent):
            # not by import: the modification time of a cached .pyc has a resolution of one second
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
            if function is None:
                return None
            if not callable(getattr(module, function, None)):
                raise ValueError(f"{path} has no {function}() -> Run")
            return getattr(module, function)()
    except (Exception, SystemExit) as error:
        sys.modules.pop(name) if before is None else sys.modules.update({name: before})
        in_file = _user_frame(error.__traceback__, path) is not None or _is_decoding_error(error)
        if isinstance(error, ValueError) and not in_file:
            raise  # raised above
        raise ValueError(explain(error, path)) from error


@contextlib.contextmanager
def _first_on_sys_path(folder: Path) -> Iterator[None]:
    """Put `folder` first on sys.path, so that its modules are found first; afterwards it is last, so that they do not
    hide modules of libraries."""
    entry, was_present = str(folder), str(folder) in sys.path
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # if the file has removed it
            sys.path.remove(entry)
        if not was_present:
            sys.path.append(entry)


UNEXPECTED = re.compile(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'")


def _is_decoding_error(error: BaseException) -> bool:
    return isinstance(error, UnicodeError) or "null bytes" in str(error)


def _user_frame(tb: TracebackType | None, path: Path) -> tuple[FrameType, int] | None:
    """The innermost frame, and its line, in the file `path` or in another module of the user in or below its folder."""
    folder = path.resolve().parent

    def is_users(frame: FrameType) -> bool:
        file = Path(frame.f_code.co_filename)
        library = frame.f_globals.get("__name__", "").split(".")[0] == "fastssl" or "site-packages" in file.parts
        return file == path or (file.is_file() and folder in file.resolve().parents and not library)

    frames = [(frame, line) for frame, line in traceback.walk_tb(tb) if is_users(frame)]
    return frames[-1] if frames else None


def explain(error: BaseException, path: Path) -> str:
    """The message of an error in the file, one line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename or path}" + (f", line {error.lineno}" if error.lineno else "")
        code = f" ({error.text.strip()})" if error.text and error.text.strip() else ""
        return f"{where}: {type(error).__name__}: {error.msg}{code}"
    callee, where = None, str(path)
    if found := _user_frame(error.__traceback__, path):
        frame, line = found
        argument = UNEXPECTED.search(str(error))
        if argument and (call := _call(frame.f_code.co_filename, line, argument[2])):
            callee = _callee(call, frame)
            line = next(k.lineno for k in call.keywords if k.arg == argument[2])
        where = f"{frame.f_code.co_filename}, line {line}"
    text = " ".join(str(error).split()) or "no message"
    text = re.sub(r"\.? Did you mean:? '\w+'\?", "", text)  # Python 3.12 adds its own suggestion to some errors
    is_plain = isinstance(error, ValueError) and not _is_decoding_error(error)
    return f"{where}: {'' if is_plain else type(error).__name__ + ': '}{text[:500]}{_suggestion(error, callee)}"


def _suggestion(error: BaseException, callee: Any) -> str:
    """The known name nearest to a misspelt one, and for arguments all known names; else ""."""
    argument = UNEXPECTED.search(str(error))
    if argument:
        known = _parameters(_frames(error.__traceback__), callee, argument[1])
        listed = f" (arguments: {', '.join(known)})" if known else ""
        return did_you_mean(argument[2], known) + listed
    if isinstance(error, AttributeError) and error.name is not None:
        return did_you_mean(error.name, [n for n in dir(error.obj) if n[0] != "_"])
    if isinstance(error, NameError) and error.name is not None:
        last = _frames(error.__traceback__)[-1]
        return did_you_mean(error.name, {*last.f_locals, *last.f_globals, *vars(builtins)})
    missing = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    if missing and missing[2] in sys.modules:
        return did_you_mean(missing[1], _members(sys.modules[missing[2]]))
    if isinstance(error, ModuleNotFoundError) and error.name and "." in error.name:
        package = sys.modules.get(error.name.rpartition(".")[0])
        return did_you_mean(error.name.rpartition(".")[2], _members(package) if package else ())
    return ""


def _members(module: ModuleType) -> list[str]:
    inside = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return [n for n in (*inside, *vars(module)) if n[0] != "_"]


def _frames(tb: TracebackType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(tb)]


def _parameters(frames: list[FrameType], callee: Any, function: str) -> list[str]:
    """Keyword arguments of the user's call that raised, without an unknown one: the function's parameters and, if it
    passes **keywords on to a dataclass (as recipes do to View), the fields of that dataclass."""
    known: list[str] = []
    if callee:
        parameters = inspect.signature(callee).parameters.values()
        known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known
    owner = function.rpartition(".")[0]
    for f in frames:
        for value in (*f.f_locals.values(), *f.f_globals.values()):
            kind = value if isinstance(value, type) else type(value)
            if kind.__qualname__ == owner and is_dataclass(kind):
                return list(dict.fromkeys([*known, *settings.names(kind)]))
    return known


def _call(file: str, line: int, argument: str) -> ast.Call | None:
    """The innermost call with `argument=` on a line of the file."""
    calls = [
        node
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Call)
        and node.lineno <= line <= (node.end_lineno or 0)
        and argument in [k.arg for k in node.keywords]
    ]
    return min(calls, key=lambda c: (c.end_lineno or 0) - c.lineno, default=None)


def _callee(call: ast.Call, user: FrameType) -> Any:
    """The function or class that a call in the user's frame names; None if it is not found."""
    try:
        value: Any = None
        for i, name in enumerate(ast.unparse(call.func).split(".")):
            value = {**vars(builtins), **user.f_globals, **user.f_locals}[name] if i == 0 else getattr(value, name)
        return value if callable(value) else None
    except (ValueError, KeyError, AttributeError):
        return None
