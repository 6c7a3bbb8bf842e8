"""Conversion of image collections to one FFCV file (`NAME.beton`) with a data card (`NAME.json`).

`main(argv)` is the command `fastssl convert`; from Python, `kinds.open_source` and `write.convert` do the same.  JPEGs
are stored unchanged if they need no change, and FFCV reads the file without this package.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `fastssl convert ARGV` and return its exit code: 0 done, 2 bad input (one line on stderr)."""
    from .cli import main as run  # here, so that importing the package is fast

    return run(argv)
