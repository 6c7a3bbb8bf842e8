"""`--restarts N`: a process beside each rank that starts the rank again, where it is, up to N times.

A killed rank cannot restart itself, so that each rank runs as a child.  When one rank ends, the others end within
seconds (watchdog.py); then all are started again and continue from the newest checkpoint.  What a new start cannot mend
is not tried again: wrong settings, data and files (exit code 2), a signal (75), Ctrl-C (130).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from fastssl.ending.signals import HANDLED, INTERRUPTED, REQUEUE

FINAL = (0, 2, REQUEUE, INTERRUPTED)
PAUSE_S = 1.0  # before a restart


def supervise(command: Sequence[str], restarts: int) -> int:
    """Run `command` (the training, without --restarts) until it ends for good; returns its exit code."""
    done, code = 0, 0
    while True:
        code = _child(command if done == 0 else _to_continue(command), done)
        if code in FINAL or done == restarts:
            return code
        done += 1
        if os.environ.get("RANK", "0") == "0" or code > 128:
            how = f"was ended by {signal.Signals(code - 128).name}" if code > 128 else f"ended with exit code {code}"
            rank = os.environ.get("RANK", "0")
            print(f"fastssl: rank {rank} {how}; restart {done} of {restarts}", file=sys.stderr, flush=True)
        time.sleep(PAUSE_S)


def _to_continue(command: Sequence[str]) -> list[str]:
    return [a for a in command if a not in ("--force", "--resume")] + ["--continue"]


def _child(command: Sequence[str], attempt: int) -> int:
    """The exit code of one life of the rank; 128 + its number for a signal that killed it."""
    env = {**os.environ, "FASTSSL_RESTARTS": str(attempt)}
    if "TORCHELASTIC_RESTART_COUNT" in env:  # torchrun's store outlives the ranks: each life has its own keys in it
        env["TORCHELASTIC_RESTART_COUNT"] = str(int(env["TORCHELASTIC_RESTART_COUNT"]) + 1000 * attempt)
    elif "MASTER_PORT" in env:  # so that no rank joins those of the life before, which may still be ending
        env["MASTER_PORT"] = str(int(env["MASTER_PORT"]) + attempt)
    parent = os.getppid()
    process = subprocess.Popen(command, env=env)
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in HANDLED}
    try:
        while True:
            try:
                code = process.wait(1.0)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if os.getppid() != parent:  # the launcher has gone
                    process.send_signal(signal.SIGTERM)
                    parent = os.getppid()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
