"""The `fastssl` command.  Each sub-command is `main(argv)` of the module that does the work."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import textwrap
from pathlib import Path

from fastssl.eval import PROTOCOLS
from fastssl.parsing import did_you_mean, shorten_warnings

COMMANDS = {
    "train": ("fastssl.train", "pretrain a backbone in one process (in several: deepspeed --module fastssl.train)"),
    "slurm": ("fastssl.slurm", "pretrain on the nodes of a Slurm cluster: write an sbatch script and submit it"),
    "replay": ("fastssl.replay", "make the step again in which a run's loss was not finite, and find the first tensor"),
    "convert": ("fastssl.data_prep", "convert a dataset to a .beton file, or check one"),
    "eval": ("fastssl.eval", f"evaluate a run or weights: {', '.join(PROTOCOLS)}"),
    "export": ("fastssl.weights.export", "write a backbone for torchvision, timm, detectron2, Hugging Face"),
    "publish": ("fastssl.weights.publish", "write weights without the optimizer, named by their hash"),
    "params": ("fastssl.params", "count parameters and FLOPs of a config or a backbone"),
    "upgrade": ("fastssl.weights.upgrade", "rewrite an old flat state dict in the current format"),
    "doctor": ("fastssl.doctor", "check this installation; name what is missing and how to install it"),
    "report": ("fastssl.report", "write one HTML page about runs: curves, speed, pictures, evaluations, settings"),
    "methods": ("fastssl.methods", "list the methods"),
    "quickstart": ("fastssl.quickstart", "convert, pretrain and evaluate scikit-learn's digits, in about a minute"),
}


def main(argv: list[str] | None = None) -> int:
    shorten_warnings()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has ended: fastssl methods | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        return 128 + signal.SIGPIPE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastssl COMMAND ...  (fastssl COMMAND --help)\n")
        for name, (_, what) in COMMANDS.items():
            print(textwrap.fill(what, 100, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14))
        print("\nfastssl --import FILE COMMAND ...  runs a Python file first, such as one with your own backbone")
        return 0
    if argv[0] == "--import":
        return _import(argv[1:])
    if argv[0] not in COMMANDS:
        print(f"fastssl: unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    from fastssl import options  # late, because it needs fastssl.config

    if argv[0] in options.COMMANDS:  # --help and mistakes are reported before torch is imported
        options.parse(argv[0], argv[1:])
    module, _ = COMMANDS[argv[0]]
    return importlib.import_module(module).main(argv[1:])


def _import(argv: list[str]) -> int:
    """`fastssl --import FILE COMMAND ...`: FILE registers a backbone with timm, for example."""
    from fastssl.config import python_file

    try:
        if len(argv) < 2:
            raise ValueError("--import needs a Python file and a command: fastssl --import FILE COMMAND ...")
        python_file.call(Path(argv[0]), None)
    except ValueError as error:
        print(f"fastssl: {error}", file=sys.stderr)
        return 2
    return _run(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
