"""Command lines: the parser of all commands, whose help names every default, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'lars'?" where a known name is similar, else ""."""
    similar = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


class Parser(argparse.ArgumentParser):
    """Options are written out in full; the description keeps its lines; errors are one line with the nearest name."""

    def __init__(self, prog: str, description: str | None = None, **options):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_Help, **options)

    def add_argument(self, *names, **options) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if action.nargs == argparse.ZERO_OR_MORE:
            action.required = False  # else argparse names it beside an argument that is missing
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {self.explain(message)}; see {self.prog} --help\n")

    def explain(self, message: str) -> str:
        """An error of argparse in one line, with the option or choice that is most similar to a misspelt one."""
        message = " ".join(message.split())
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message)
        names = [name for action in self._actions for name in action.option_strings]
        misspelt = [word.partition("=")[0] for word in unknown[1].split(" ") if word[:1] == "-"] if unknown else []
        if misspelt:
            return message + did_you_mean(misspelt[0], names)
        choice = re.match(r"argument ([^ ]+): invalid choice: '(.*?)' \(choose from", message)
        for action in self._actions:
            if (
                choice
                and action.choices
                and choice[1] in ("/".join(action.option_strings), action.metavar, action.dest)
            ):
                return message + did_you_mean(choice[2], map(str, action.choices))
        return message


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if not action.option_strings or value is None or value is argparse.SUPPRESS or "default" in text:
            return text
        if isinstance(value, bool) or value == []:
            return text
        if isinstance(value, tuple):
            value = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        return f"{text}{'; ' if text else ''}default: {str(value).replace('%', '%%')}"


def docstring(path: Path) -> str:
    """Of a module of this package, which is not imported."""
    return inspect.cleandoc(path.read_text().split('"""')[1])


def comma_separated(kind: Callable[[str], object]) -> Callable[[str], tuple]:
    """For `type=` of an option: "1,2" -> (1, 2) with `kind` int."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from None

    return parse


def existing(text: str) -> str:
    """For `type=` of an argument: a run folder or a weight file that exists."""
    if os.path.exists(text):  # unlike Path.exists, False for a name that is too long
        return text
    folder, name = os.path.split(text)
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):  # there is no such folder either
        names = os.listdir(folder or ".")
    raise argparse.ArgumentTypeError(f"no run folder or weight file {text}{did_you_mean(name, names)}")


def columns(rows: Sequence[Sequence[object]], left: int = 0) -> str:
    """A table of text: the first `left` columns are aligned to the left, the others to the right."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join("  ".join(f(cell, n) for f, cell, n in zip(align, row, widths)).rstrip() for row in text)


def settings_text(row: dict) -> str:
    """{"k": 20, "lr": 0.1} -> "k=20 lr=0.1"."""
    return " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())


def shorten_warnings() -> None:
    """Print fastssl's own warnings without the place in its source, and all others as before."""
    warnings.formatwarning = _format_warning


_default_format = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return _default_format(message, category, filename, lineno, line)


def run_command(command: str, work: Callable[[], None]) -> int:
    """The exit code of `fastssl COMMAND`: 2 for a ValueError or OSError, whose message is printed."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"fastssl {command}: {error}", file=sys.stderr)
        return 2
    return 0
