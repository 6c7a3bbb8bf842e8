"""Shared by the benchmarks: the data folder, a description of the machine, and result lines in bench/results."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FASTSSL_DATA", ROOT.parent / "shared" / "data"))


def parser_with_dry(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="do not append to bench/results")
    return parser


def one_line_errors(main: Callable[[], int]) -> Callable[[], int]:
    """Decorator of a program that trains: a ValueError is one line and exit code 2; the process group is left."""

    @functools.wraps(main)
    def run() -> int:
        from fastssl import dist

        try:
            return main()
        except ValueError as error:
            print(f"bench/{Path(main.__code__.co_filename).name}: {error}", file=sys.stderr)
            return 2
        finally:
            dist.shutdown()

    return run


def device_name() -> str:
    """The GPU, or the CPU and the number of cores that this process may use, as part of a file name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = f"{found[1] if found else 'cpu'} {len(os.sched_getaffinity(0))} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def environment(*packages: str) -> dict:
    """Date, commit ("+changes" if the checkout differs from it), device and versions, for a result line."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # before the run; above 0.5 the times are not reliable
        "versions": {name: version(name) for name in ("torch", *packages)},
    }


def spread(values: list[float], digits: int = 1) -> dict:
    """Median, minimum, maximum and number of the values."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def results_file(env: dict) -> Path:
    return ROOT / "bench" / "results" / f"{env['device']}.jsonl"


def append(bench: str, env: dict, **result) -> Path:
    """Add one line to bench/results/<device>.jsonl."""
    path = results_file(env)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"bench": bench, **env, **result}) + "\n")
    return path
