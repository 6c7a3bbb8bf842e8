"""Train a config and record speed and accuracy: python bench/run.py configs/simclr/r18_cifar10_200ep.py [a.b=value ...]

Continues the run if its folder has a checkpoint.  SIGTERM stops it with a checkpoint; the steps so far are recorded,
and the next call continues.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import append, environment, parser_with_dry

from fastssl import config

TIMES = ("total", "step", "data", "other")
LONGEST = 5  # steps that are named


def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    try:
        run = config.load(args.config, args.overrides)
    except ValueError as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 2
    env, began = environment("torchvision", "triton", "ffcv", "deepspeed"), time.perf_counter()
    command = ["train", args.config, *args.overrides, "--continue"]
    process = start(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    log = Path(run.log.root) / run.name / "log.jsonl"
    if log.exists():
        found = {"command": " ".join(["fastssl", *command]), "finished": code == 0}
        found |= {"call_s": round(time.perf_counter() - began, 1), **measured(log)}
        if not args.dry:
            print(f"appended to {append('run', env, **found)}")
        print(json.dumps(found))
    return code


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "fastssl", *command])


def measured(log: Path) -> dict:
    """Of all steps in the log, also those of earlier calls.  `seconds`: the sum of their times."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in records if "total_ms" in r]
    if not steps:
        return {"steps": 0}
    longest = sorted(steps, key=lambda r: -r["total_ms"])[:LONGEST]
    return {
        "steps": steps[-1]["step"],
        "seconds": round(sum(r["total_ms"] for r in steps) / 1e3, 1),
        "ms": {name: round(statistics.median(r[f"{name}_ms"] for r in steps), 3) for name in TIMES},
        "images_per_s_median": round(statistics.median(r["images_per_s"] for r in steps)),
        "longest_ms": {str(r["step"]): round(r["total_ms"]) for r in longest},
        "memory_gib": round(max(r["memory_gib"] for r in steps), 2),
        "loss": steps[-1].get("loss"),
        "knn_top1": {str(r["epoch"] + 1): round(r["knn_top1"], 2) for r in records if "knn_top1" in r},
    }


if __name__ == "__main__":
    sys.exit(main())
