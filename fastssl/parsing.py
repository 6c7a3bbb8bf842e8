"""Command lines: the parser of all commands, whose help names every default, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Options are written out in full; the description keeps its lines."""

    def __init__(self, prog: str, description: str | None = None, **options):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_Help, **options)


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


def comma_separated(kind: Callable[[str], object]) -> Callable[[str], tuple]:
    """For `type=` of an option: "1,2" -> (1, 2) with `kind` int."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from None

    return parse


def run_command(command: str, work: Callable[[], None]) -> int:
    """The exit code of `fastssl COMMAND`: 2 for a ValueError or OSError, whose message is printed."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"fastssl {command}: {error}", file=sys.stderr)
        return 2
    return 0
