"""Conversion of image collections to one FFCV file (`NAME.beton`) with a data card (`NAME.json`).

`main(argv)` is the command `fastssl convert`; `sources.open_source` and `write.convert` are the same from Python.
JPEG bytes are stored as they are; the file is readable by FFCV without this package.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `fastssl convert ARGV` and return its exit code: 0 done, 2 bad input (one line on stderr)."""
    from .cli import main as run  # here, so that the import of the package stays quick

    return run(argv)


__all__ = ["main"]
