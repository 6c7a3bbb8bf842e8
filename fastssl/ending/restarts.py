"""`--restarts N`: each rank is the child of a process that restarts it on the same node, up to N times.

When one rank ends, the others end, too (watchdog.py; docs/reliability.md says how soon); then all are restarted.  There
is no restart after an error that it cannot fix (wrong settings, data or files: exit code 2), a signal (75) and Ctrl-C
(130).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fastssl.ending.signals import INTERRUPTED, REQUEUE, handled_by

FINAL = (0, 2, REQUEUE, INTERRUPTED)
PAUSE_S = 1.0  # before a restart
PORT_STEP = 100  # between the ports of two starts, so that a second job can have the next port
SAVED = "FASTSSL_SAVED"  # variable: a file that rank 0 creates with the first checkpoint (also for slurm.py)
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables of deepspeed and torchrun


def supervise(command: Sequence[str], restarts: int) -> int:
    """Run `command` (the training, without --restarts), with restarts; returns the last exit code.

    Its signals (signals.HANDLED) are passed on to the child.  After a signal there is no restart; unless the child ends
    with a code in FINAL, the result is then REQUEUE (INTERRUPTED for Ctrl-C)."""
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:
        # rank 0 creates this file: that of the Slurm job, or one here
        rank, attempt = _Rank(Path(os.environ.get(SAVED) or Path(folder) / "saved")), 0
        with handled_by(rank.pass_on):
            while True:
                code = rank.run(continue_command(command) if rank.saved.exists() else command, attempt)
                if code in FINAL:
                    return code
                if not rank.stop and attempt < restarts:
                    _announce(code, attempt + 1, restarts)
                    time.sleep(PAUSE_S)
                if rank.stop:
                    return INTERRUPTED if rank.stop == signal.SIGINT else REQUEUE
                if attempt == restarts:
                    return code
                attempt += 1


def mark_saved() -> None:
    """On rank 0, just before a checkpoint is complete: restarts continue from it, whatever the command says.

    Before, because a restart that repeats --force would delete a checkpoint without the file.  The file without a
    checkpoint does no harm: --force has already deleted what was there, and --continue then starts the run."""
    if SAVED in os.environ:
        Path(os.environ[SAVED]).touch()


def _announce(code: int, attempt: int, restarts: int) -> None:
    """A line on rank 0, and on each rank that was killed."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and code <= 128:
        return
    how = f"was ended by {signal.Signals(code - 128).name}" if code > 128 else f"ended with exit code {code}"
    print(f"fastssl: rank {rank} {how}; restart {attempt} of {restarts}", file=sys.stderr, flush=True)


def continue_command(command: Sequence[str]) -> list[str]:
    """`command` of `fastssl train`, changed so that the run continues from its newest checkpoint.  Before the first
    checkpoint a restart repeats the unchanged command, since --force still applies."""
    return [*(word for word in command if word not in ("--force", "--resume", "--continue")), "--continue"]


class _Rank:
    """Runs the rank as a child process."""

    def __init__(self, saved: Path):
        self.saved, self.stop = saved, 0  # `stop`: the first signal
        self._child: subprocess.Popen | None = None

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        self.stop = self.stop or number
        if self._child is not None:
            self._child.send_signal(number)

    def run(self, command: Sequence[str], attempt: int) -> int:
        """The exit code of one attempt; 128 + its number for a signal that killed it."""
        parent, launched = os.getppid(), any(name in os.environ for name in LAUNCHERS)
        self._child = child = subprocess.Popen(command, env=self._environment(attempt))
        if self.stop:  # it came before there was a child
            child.send_signal(self.stop)
        while True:
            try:
                code = child.wait(1.0)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if launched and os.getppid() != parent:  # the launcher has ended
                    self.pass_on(signal.SIGTERM)
                    parent = os.getppid()

    def _environment(self, attempt: int) -> dict[str, str]:
        env = {**os.environ, "FASTSSL_RESTARTS": str(attempt), SAVED: str(self.saved)}
        if "TORCHELASTIC_RESTART_COUNT" in env:  # torchrun's store outlives the ranks: each attempt has its own keys
            env["TORCHELASTIC_RESTART_COUNT"] = str(int(env["TORCHELASTIC_RESTART_COUNT"]) + 1000 * attempt)
        elif "MASTER_PORT" in env:  # so that no rank joins those of the attempt before, which may still be ending
            env["MASTER_PORT"] = str(_port(int(env["MASTER_PORT"]), attempt))
        return env


def _port(first: int, attempt: int) -> int:
    """A port for each attempt: PORT_STEP higher each time, or lower where there are no higher ones."""
    port = first + PORT_STEP * attempt
    return port if port < 1 << 16 else first - PORT_STEP * attempt
