"""Command lines: one parser class for all commands, whose help names every default."""

from __future__ import annotations

import argparse


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
