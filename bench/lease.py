"""Run all measurements on a GPU, the most important first, within a time limit:  python bench/lease.py --minutes 12

Each result is appended to bench/results/<device>.jsonl at once.  Finished items are not repeated at the same commit
(--again repeats them); one that fails or takes too long does not stop the others.  At its time limit an item gets
SIGTERM, so that the training run writes a checkpoint, from which the next call continues.  --list shows finished and
remaining items, --only NAME chooses some.  At the end a table of the measured steps is printed, for
docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, device_name, environment

PHOTOS = ["data.train=data/photos.beton", "data.test=none", "log.knn_epochs=0", "log.probe=False"]
CIFAR = ["speed.resident=True"]
STEPS = {  # name: config and overrides, with batches that fit on one GPU
    "simclr_r18": ("simclr/r18_cifar10_200ep.py", CIFAR),
    "barlow_vits16": ("barlow/vits16_in1k_100ep_bf16.py", PHOTOS),
    "simclr_r50": ("simclr/r50_in1k_200ep.py", [*PHOTOS, "optim.precision=fp16"]),
    "simclr_r18_bs512": ("simclr/r18_cifar10_200ep.py", [*CIFAR, "optim.batch=512"]),
    "mae_vitb16": ("mae/vitb16_in1k_300ep_bf16.py", [*PHOTOS, "optim.batch=512"]),
    "dino_vits16": ("dino/vits16_in1k_100ep_bf16.py", [*PHOTOS, "optim.batch=128"]),
    "moco_r50": ("moco/r50_in1k_v2_200ep.py", [*PHOTOS, "optim.precision=fp16"]),
    "byol_r50": (
        "byol/r50_in1k_bs4096_accumulate2_200ep_fp16.py",
        [*PHOTOS, "optim.batch=256", "speed.micro_batch=none"],
    ),
}
VARIANTS = {  # of the step, in order of value
    "graph": ["speed.graph=on"],
    "plain": ["speed.graph=off"],
    "compile_graph": ["speed.graph=on", "speed.compile=on"],
    "compile": ["speed.graph=off", "speed.compile=on"],
}
KERNELS = ("infonce", "ntxent", "augment", "soft_cross_entropy", "sinkhorn", "gathered", "queue_bank")
FASTEST = VARIANTS["compile_graph"]
LOSSES = {  # step of STEPS, both sides, settings of both; what may make a setting the default: docs/measure.md
    "compile_r18": ("simclr_r18", "speed.compile=off", "speed.compile=on", ["speed.graph=on"]),
    "graph_r18": ("simclr_r18", "speed.graph=off", "speed.graph=on", ["speed.compile=off", "deterministic=True"]),
    "compile_vits16": ("barlow_vits16", "speed.compile=off", "speed.compile=on", ["speed.graph=on"]),
    "residual_vits16": ("barlow_vits16", "optim.residual_in_fp32=True", "optim.residual_in_fp32=False", FASTEST),
}
LEAST = 40  # seconds; with less left, no item is started
STOP = 20  # of them, to end after SIGTERM


@dataclass(frozen=True)
class Item:
    name: str
    command: list[str]
    seconds: int  # time limit
    files: tuple[str, ...] = ()  # input files
    check: bool = False  # a test, whose failures are printed


def items(commit: str) -> list[Item]:
    """In order of value.  `commit` is part of the name of the training run, which continues in later calls."""
    py = sys.executable
    # other versions of a library may warn, which the tests' own settings turn into errors
    pytest = [py, "-m", "pytest", "-n", "12", "-vv", "--tb=short", "-W", "default", "--durations=5"]
    cifar, photos = ("data/cifar10_train.beton", "data/cifar10_test.beton"), ("data/photos.beton",)
    data = {"simclr_r18": cifar[:1], "barlow_vits16": photos}
    losses = {
        name: Item(
            f"losses_{name}",
            [py, "bench/losses.py", f"configs/{STEPS[of][0]}", a, b, *STEPS[of][1], *both, "--steps", "200"],
            180,
            data[of],
        )
        for name, (of, a, b, both) in LOSSES.items()
    }
    train = [py, "bench/run.py", "configs/simclr/r18_cifar10_200ep.py", *CIFAR, *FASTEST]
    train += ["log.knn_epochs=20", "log.checkpoint_epochs=20", f"name=lease/{commit}/simclr_r18"]
    moco, overrides = STEPS["moco_r50"]
    checkpoint = [py, "bench/checkpoint.py", f"configs/{moco}", *overrides]
    peers = [py, "bench/peers.py", cifar[0], CIFAR[0], "--batch", "256", "--seconds", "60"]
    first = [(name, variant) for variant in ("graph", "plain") for name in list(STEPS)[:3]]
    rest = [(name, variant) for variant in VARIANTS for name in STEPS if (name, variant) not in first]
    found = [
        Item("tests_gpu", [*pytest, "-m", "gpu", "-k", "not every_size"], 200, check=True),
        Item("run_simclr_cifar10", train, 420, cifar),
        losses["compile_r18"],
        losses["graph_r18"],
        Item(
            "tests_kernels",
            [*pytest, "tests/kernels", "-m", "not gpu and not full", "-k", "not builds"],
            200,
            check=True,
        ),
        losses["compile_vits16"],
        Item("checkpoint_moco_r50", checkpoint, 150, photos),
        losses["residual_vits16"],
        Item("peers_simclr_r18", peers, 150, cifar[:1]),
        *(_step(name, variant, cifar, photos) for name, variant in first + rest),
    ]
    found += [Item(f"kernels_{op}", [py, "bench/ops.py", op, "--json"], 200) for op in KERNELS]
    for method in ("barlow", "byol", "moco", "dino", "vicreg", "swav", "simsiam"):
        command = [py, "bench/methods.py", method, "--set", "cifar10_200ep"]
        found.append(Item(f"run_{method}", [*command, *(f"--override={o}" for o in (*CIFAR, *FASTEST))], 900, cifar))
    found.append(Item("tests_every_size", [*pytest, "tests/kernels", "-k", "every_size"], 500, check=True))
    return found


def _step(name: str, variant: str, cifar: tuple, photos: tuple) -> Item:
    config, overrides = STEPS[name]
    command = [
        sys.executable,
        "bench/step.py",
        f"configs/{config}",
        *overrides,
        *VARIANTS[variant],
        "--seconds",
        "40",
        "--blocks",
        "3",
        "--steps",
        "20",
    ]
    return Item(
        f"step_{name}_{variant}",
        command,
        120 if "compile" not in variant else 200,
        cifar if overrides[0] == CIFAR[0] else photos,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=12, help="time limit after which no item is started; default 12"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only items whose names begin with NAME")
    parser.add_argument("--again", action="store_true", help="repeat finished items")
    parser.add_argument("--list", action="store_true", help="show the items and stop")
    parser.add_argument("--dry", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    env = environment("triton")
    record = Record(ROOT / "bench" / "results" / f"{device_name()}-lease.json", env)
    chosen = [i for i in items(env["commit"]) if not args.only or i.name.startswith(tuple(args.only))]
    if not chosen:
        names = " or ".join(args.only)
        print(f"bench/lease.py: no item begins with {names}; --list shows their names", file=sys.stderr)
        return 2
    if args.list or args.dry:
        for item in chosen:
            print(f"{record.state(item.name):9} {item.name:28} " + (" ".join(item.command) if args.dry else ""))
        return 0
    deadline, failed = time.monotonic() + 60 * args.minutes, []
    for item in chosen:
        left = deadline - time.monotonic()
        missing = [f for f in item.files if not (ROOT / f).exists()]
        if missing:
            print(f"{item.name}: skipped, {missing[0]} does not exist; see docs/measure.md", flush=True)
        elif args.again or record.state(item.name) != "done":
            if left < LEAST:
                print("time limit reached; the next call continues here", flush=True)
                break
            if not run(item, min(item.seconds, left - STOP), record):
                failed.append(item.name)
    print("\n" + table(ROOT / "bench" / "results" / f"{env['device']}.jsonl", env["commit"]))
    if failed:
        print(f"not finished: {', '.join(failed)} (work_dirs/lease/NAME.log)")
    return bool(failed)


class Record:
    """Which items are finished, at which commit."""

    def __init__(self, path: Path, env: dict):
        self.path, self.env = path, env
        self.items = json.loads(path.read_text()) if path.exists() else {}

    def state(self, name: str) -> str:
        """ "done", "failed", or "" for an item that has not run at this commit."""
        entry = self.items.get(name)
        if entry is None or entry["commit"] != self.env["commit"]:
            return ""
        return "failed" if entry["rc"] else "done"

    def write(self, name: str, rc: int, seconds: float, last: str) -> None:
        self.items[name] = {
            "commit": self.env["commit"],
            "date": self.env["date"],
            "rc": rc,
            "seconds": round(seconds, 1),
            "last": last,
        }
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.items, indent=1) + "\n")


def run(item: Item, seconds: float, record: Record) -> bool:
    log = ROOT / "work_dirs" / "lease" / f"{item.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as file:
        # a process group of its own, not a session: what stops this program by its session stops the item, too
        process = subprocess.Popen(item.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            rc = 124
        finally:
            stop(process)
    spent = time.monotonic() - began
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][-160:] if lines else ""
    record.write(item.name, rc, spent, last)
    print(f"{item.name}: {'done' if rc == 0 else f'exit status {rc}'} in {spent:.0f} s: {last}", flush=True)
    if rc and item.check:
        print("\n".join(line for line in lines if re.search(r"(^|\] )(FAILED|ERROR) ", line))[:3000], flush=True)
    return rc == 0


def stop(process: subprocess.Popen) -> None:
    """End all processes that an item has started, of which a training run may write a checkpoint."""
    deadline = time.monotonic() + STOP
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(results: Path, commit: str) -> str:
    """The steps measured at `commit`, as Markdown."""
    lines = results.read_text().splitlines() if results.exists() else []
    steps = [r for r in map(json.loads, lines) if r["bench"] == "step" and r["commit"] == commit]
    rows = ["| config | batch | graph | compile | images/s | ms a step | MFU | GiB |", "|" + "---|" * 8]
    for r in steps:
        real = r["real"]
        mfu = "" if real["mfu"] is None else f"{100 * real['mfu']:.1f} %"
        rate = f"{real['images_per_s']['median']:,.0f}"
        rows.append(
            f"| {r['config']} | {r['batch']} | {r.get('graph', '')} | {r['compile']} | {rate} | "
            f"{real['total_ms_mean']:.2f} | {mfu} | {real['memory_gib']} |"
        )
    return "\n".join(rows) if steps else "no step has been measured at this commit"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally` in `run`
    sys.exit(main())
