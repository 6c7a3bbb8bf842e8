"""How a run ends early: by a signal, by an error on one rank, or when its launcher has gone (docs/runs.md).

Ranks agree on a received signal once a step, so that all of them write the same checkpoint.  The first rank that fails
prints the reason; the others end without output.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as td

from fastssl import dist

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REQUEUE = 75  # exit code after a signal: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
DELAY = 4  # steps on CUDA until a signal is acted on: reading the flag of this step would wait for the device
REPEAT_S = 2.0  # a second Ctrl-C later than this is the user's; launchers send the first one twice
CHECKPOINT_S = 120.0  # for a last checkpoint of ranks whose launcher has gone
FAILED = "fastssl/failed"  # key in the process group's store: "code rank reason" of the first rank that failed


class Stopped(SystemExit):
    """A signal has ended the run and a checkpoint is written; `code` is the exit code."""

    code: int

    def __init__(self, number: int):
        super().__init__(INTERRUPTED if number == signal.SIGINT else REQUEUE)


class Signals:
    """Inside `with`, the signals HANDLED are recorded and do not end the process; a second Ctrl-C interrupts at once.
    Signals that the process ignores (SIGHUP under nohup) stay ignored."""

    def __init__(self, device: torch.device):
        self.device = device
        self._number, self._time = 0, 0.0
        self._before: dict[int, Any] = {}  # handlers, as signal.signal returns them
        self._sent: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in HANDLED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == self._number == signal.SIGINT and time.monotonic() - self._time > REPEAT_S:
            raise KeyboardInterrupt
        if not self._number:
            self._number, self._time = number, time.monotonic()

    def received(self) -> int:
        """The signal that any rank has received, or 0; the same on every rank.  Call it once a step on all ranks.  On
        CUDA it is the result of DELAY steps before, for which the host does not wait."""
        if dist.world() == 1:
            return self._number
        number = torch.full((1,), self._number, dtype=torch.int32, device=self.device)
        td.all_reduce(number, td.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(number)
        host, event = torch.empty(1, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        host.copy_(number, non_blocking=True)
        event.record()
        self._sent.append((host, event))
        if len(self._sent) <= DELAY:
            return 0
        host, event = self._sent.popleft()
        event.synchronize()
        return int(host)


def report_failure(reason: str, code: int) -> tuple[bool, int]:
    """Tell the other ranks that this one ends with exit code `code`.  Returns whether it is the first to fail, which is
    the one to print its reason, and the first one's exit code.

    Before the process group exists, it is the first rank of each node."""
    if not td.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0, code
    if dist.world() == 1:
        return True, code
    store, mine = td.distributed_c10d._get_default_store(), f"{code} {dist.rank()} {reason}"
    try:
        store.set_timeout(timedelta(seconds=5))
        recorded = store.compare_set(FAILED, "", mine).decode()
        first = recorded == mine
        seen = store.add(FAILED + "/seen", 1)
        deadline = time.monotonic() + 3
        while first and seen < dist.world() and time.monotonic() < deadline:  # rank 0 may host the store
            time.sleep(0.1)
            seen = store.add(FAILED + "/seen", 0)
        return first, int(recorded.split()[0])
    except RuntimeError:  # the rank that hosted the store has ended, and has printed its reason or was killed
        return False, code


class Watchdog:
    """A thread on every rank of several.  It ends the rank soon after another one has failed, which a collective on
    GPUs would not notice, and after the launcher has gone, in training with a last checkpoint."""

    def __init__(self):
        self._end = threading.Event()
        self._parent = os.getppid()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            threading.Thread(target=self._run, name="fastssl-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._end.set()

    def _run(self) -> None:
        launched = "CROSS_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ  # by deepspeed, by torchrun
        while not self._end.wait(1.0):
            if launched and os.getppid() != self._parent:
                print("fastssl: the launcher has gone", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                self._exit(CHECKPOINT_S, 1)
            code = self._failed()
            if code:
                self._exit(2.0, code)

    def _failed(self) -> int:
        """The exit code of a rank that has failed, else 0."""
        try:
            store = td.distributed_c10d._get_default_store()
            if not store.check([FAILED]):
                return 0
            store.add(FAILED + "/seen", 1)
            return int(store.get(FAILED).split()[0])
        except (RuntimeError, ValueError):  # there is no process group yet, or no longer
            return 0

    def _exit(self, seconds: float, code: int) -> None:
        if not self._end.wait(seconds):
            sys.stdout.flush()
            os._exit(code)
