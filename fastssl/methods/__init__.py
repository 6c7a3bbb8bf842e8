"""One file per method.  `fastssl methods` lists them; a config names one by its Config: `method=simclr.Config(...)`."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "parts")


def main(argv: list[str] | None = None) -> int:
    """List every method with what it is, its paper and its settings, all read off its file."""
    argparse.ArgumentParser("fastssl methods", description="List the methods.").parse_args(argv)
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        title = re.sub(r"\s*https?://\S+", "", module.__doc__.split("\n\n")[0]).replace("\n", " ").strip()
        papers = " ".join(re.findall(r"https?://\S+", module.__doc__))
        settings = ", ".join(f"{f}={v!r}" for f, v in vars(module.Config()).items())
        print(f"{name}\n  {title}\n  {papers}\n  {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
