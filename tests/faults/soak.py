"""Kills one small run with SIGKILL at random moments and continues it each time.  Not a test: `test_soak.py` starts it.

The modules are imported once, and every life of the run is a fork of this process, so that a restart takes less than a
second.  A checkpoint is written after every step: training, writing, reading and start-up are all hit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases
import torch

from fastssl import dist, engine
from fastssl.checkpoint import disk

MARGIN = 8  # steps: the longest life makes fewer


def life(root: Path, name: str, steps: int) -> int:
    """Fork a process that starts or continues the run; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(root / f"{name}.out", "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        torch.set_num_threads(1)
        dist.init("cpu")
        run = cases.run("moco", steps=steps, norm=False)
        run.name, run.log.root, run.deterministic = name, str(root), True
        run.log.every, run.log.checkpoint_steps, run.log.keep, run.log.probe = 1, 1, 2, True
        run.log.collapse_every, run.optim.schedule = 0, "cosine"
        resume = bool(disk.list_checkpoints(root / name))
        engine.fit(run, resume=resume, device="cpu", loader=cases.loader(run))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def unfinished(root: Path) -> set[tuple[str, int]]:
    """The temporary folders of checkpoints, each with its inode: one that is written again is another."""
    return {(p.name, p.stat().st_ino) for p in disk.directory(root / "killed").glob("*.tmp")}


def steps_done(root: Path, name: str) -> int:
    """Of the newest checkpoint folder."""
    found = disk.list_checkpoints(root / name)
    return disk.step_of(found[0]) if found else 0


def main(root: Path, kills: int, steps: int, seed: int, seconds: int) -> dict:
    """How many kills were where in a life.  No more are made after `seconds`, or when the run has few steps left."""
    draw, startup, step = random.Random(seed), 1.0, 0.1  # seconds until the first checkpoint of a life and between two
    places = {"before the first checkpoint": 0, "between checkpoints": 0, "while a checkpoint was written": 0}
    start, done = time.monotonic(), 0
    while done < kills and time.monotonic() - start < seconds and steps_done(root, "killed") < steps - MARGIN:
        before, left, began = steps_done(root, "killed"), unfinished(root), time.monotonic()
        pid = life(root, "killed", steps)
        if draw.random() < 0.25:
            time.sleep(draw.uniform(0, startup))
        else:
            for wanted in range(draw.randrange(3)):  # checkpoints of this life
                while steps_done(root, "killed") <= before + wanted and not ended(pid):
                    time.sleep(0.002)
                took, began = time.monotonic() - began, time.monotonic()
                startup, step = (startup, took) if wanted else (took, step)
            time.sleep(draw.uniform(0, 1.5 * step))
        if status := ended(pid):
            raise RuntimeError(f"a life ended by itself before kill {done + 1}: {status}, see {root / 'killed.out'}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if unfinished(root) - left:
            places["while a checkpoint was written"] += 1
        else:
            moved = steps_done(root, "killed") > before
            places["between checkpoints" if moved else "before the first checkpoint"] += 1
        done += 1
    reached = steps_done(root, "killed")
    for name in ("killed", "whole"):
        _, status = os.waitpid(life(root, name, steps), 0)
        if status:
            raise RuntimeError(f"{name}: wait status {status}: see {root / name}.out")
    return {"kills": done, "places": places, "step of the last kill": reached}


def ended(pid: int) -> object:
    """How the process has ended; None: it has not."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


if __name__ == "__main__":
    root, kills, steps, seed, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:])
    began = time.monotonic()
    found = main(root, kills, steps, seed, seconds)
    print(json.dumps({**found, "steps": steps, "seconds": round(time.monotonic() - began)}))
