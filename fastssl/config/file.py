"""Running a user's Python file.  An error in it becomes one line: the file, the line, the error and the nearest name.

Frames of ours and of the libraries below are not shown; FASTSSL_TRACEBACK=1 shows everything (see train.py).
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


def call(path: Path, function: str) -> Any:
    """The result of `function()` of the Python file `path`, which is imported as a module of its own.

    ValueError for whatever the file raises, SystemExit and endless recursion included."""
    name = "fastssl_config_" + path.stem
    module, before = ModuleType(name), sys.modules.get(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look up their module by its name
    try:
        with _folder(path.resolve().parent):
            # compiled here: a cached .pyc is taken for up to date when the file changes within its second
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
            if not callable(getattr(module, function, None)):
                raise ValueError(f"{path} has no {function}() -> Run")
            return getattr(module, function)()
    except (Exception, SystemExit) as error:
        sys.modules.pop(name) if before is None else sys.modules.update({name: before})
        if isinstance(error, ValueError) and _line(error.__traceback__, path) is None and not _decoding(error):
            raise  # ours, about the file as a whole
        raise ValueError(explain(error, path)) from error


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """First on sys.path inside, so that own modules win; last afterwards, so that they cannot hide a library's."""
    at, there = str(folder), str(folder) in sys.path
    sys.path.insert(0, at)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file took it out itself
            sys.path.remove(at)
        if not there:
            sys.path.append(at)


UNEXPECTED = re.compile(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'")


def _decoding(error: BaseException) -> bool:
    return isinstance(error, UnicodeError) or "null bytes" in str(error)


def _line(tb: TracebackType | None, path: Path) -> traceback.FrameSummary | None:
    """The innermost frame in the file or in another module of the user's beside or below it."""
    folder = path.resolve().parent

    def own(frame: FrameType, summary: traceback.FrameSummary) -> bool:
        file = Path(summary.filename)
        ours = frame.f_globals.get("__name__", "").split(".")[0] == "fastssl" or "site-packages" in file.parts
        return file == path or (file.is_file() and folder in file.resolve().parents and not ours)

    frames = [s for (f, _), s in zip(traceback.walk_tb(tb), traceback.extract_tb(tb)) if own(f, s)]
    return frames[-1] if frames else None


def explain(error: BaseException, path: Path) -> str:
    """An error of the file in one line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename or path}" + (f", line {error.lineno}" if error.lineno else "")
        code = f" ({error.text.strip()})" if error.text and error.text.strip() else ""
        return f"{where}: {type(error).__name__}: {error.msg}{code}"
    frame = _line(error.__traceback__, path)
    where = f"{frame.filename}, line {_line_number(error, frame)}" if frame else str(path)
    text = " ".join(str(error).split()) or "no message"
    text = re.sub(r"\.? Did you mean:? '\w+'\?", "", text)  # newer Pythons guess for some errors
    kind = "" if isinstance(error, ValueError) and not _decoding(error) else f"{type(error).__name__}: "
    return f"{where}: {kind}{text[:500]}{_guess(error, frame)}"


def _guess(error: BaseException, frame: traceback.FrameSummary | None) -> str:
    """The nearest name to a misspelt one, with all that are known where they are the fields of a dataclass."""
    argument = UNEXPECTED.search(str(error))
    if argument:
        known = _parameters(error.__traceback__, frame, *argument.groups())
        listed = f" (it takes {', '.join(known)})" if known else ""
        return settings.hint(argument[2], known) + listed
    if isinstance(error, AttributeError) and error.name is not None:
        return settings.hint(error.name, [n for n in dir(error.obj) if n[0] != "_"])
    if isinstance(error, NameError) and error.name is not None:
        last = _frames(error.__traceback__)[-1]
        return settings.hint(error.name, {*last.f_locals, *last.f_globals, *vars(builtins)})
    wanted = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    if wanted and wanted[2] in sys.modules:
        return settings.hint(wanted[1], _members(sys.modules[wanted[2]]))
    if isinstance(error, ModuleNotFoundError) and error.name and "." in error.name:
        package = sys.modules.get(error.name.rpartition(".")[0])
        return settings.hint(error.name.rpartition(".")[2], _members(package) if package else ())
    return ""


def _members(module: ModuleType) -> list[str]:
    inside = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return [n for n in (*inside, *vars(module)) if n[0] != "_"]


def _frames(tb: TracebackType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(tb)]


def _parameters(
    tb: TracebackType | None, frame: traceback.FrameSummary | None, function: str, argument: str
) -> list[str]:
    """What may be given by name in the user's call that raised: its own parameters, and where it hands on others (as
    recipes do to View), the fields of the dataclass that refused one."""
    known: list[str] = []
    user = next((f for f in reversed(_frames(tb)) if frame and f.f_code.co_filename == frame.filename), None)
    callee = _callee(frame, user, argument) if frame and user else None
    if callee:
        parameters = inspect.signature(callee).parameters.values()
        known = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known
    owner = function.rpartition(".")[0]
    for f in _frames(tb):
        for value in (*f.f_locals.values(), *f.f_globals.values()):
            kind = value if isinstance(value, type) else type(value)
            if kind.__qualname__ == owner and is_dataclass(kind):
                return list(dict.fromkeys([*known, *settings.names(kind)]))
    return known


def _call(frame: traceback.FrameSummary, argument: str) -> ast.Call | None:
    """The shortest call with `argument=` that spans the frame's line."""
    line = frame.lineno or 0
    calls = [
        node
        for node in ast.walk(ast.parse(Path(frame.filename).read_text()))
        if isinstance(node, ast.Call)
        and node.lineno <= line <= (node.end_lineno or 0)
        and argument in [k.arg for k in node.keywords]
    ]
    return min(calls, key=lambda c: (c.end_lineno or 0) - c.lineno, default=None)


def _line_number(error: BaseException, frame: traceback.FrameSummary) -> int | None:
    """The frame's line; of a call over several lines that of the keyword which was refused."""
    argument = UNEXPECTED.search(str(error))
    name = argument[2] if argument else ""
    call = _call(frame, name) if name else None
    return next(k.lineno for k in call.keywords if k.arg == name) if call else frame.lineno


def _callee(frame: traceback.FrameSummary, user: FrameType, argument: str) -> Any:
    """The function or class that the file calls with `argument=` on that line; None where it is not found."""
    call = _call(frame, argument)
    if call is None:
        return None
    try:
        value: Any = None
        for i, name in enumerate(ast.unparse(call.func).split(".")):
            value = {**vars(builtins), **user.f_globals, **user.f_locals}[name] if i == 0 else getattr(value, name)
        return value if callable(value) else None
    except (ValueError, KeyError, AttributeError):
        return None
