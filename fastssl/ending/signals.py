"""Signals: once a step the ranks agree on the signal received, so that all write the same checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as td

from fastssl import dist

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REQUEUE = 75  # exit code after a signal: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
DELAY = 4  # steps on CUDA until a signal is acted on: reading the flag of this step would wait for the device
FAIL = 1000  # not a signal: larger than all signal numbers, so that it wins the MAX; some rank has an error to raise
REPEAT_S = 2.0  # a second Ctrl-C later than this is the user's; launchers send the first one twice


class Stopped(SystemExit):
    """A signal has ended the run and a checkpoint is written; `code` is the exit code."""

    code: int

    def __init__(self, number: int):
        super().__init__(INTERRUPTED if number == signal.SIGINT else REQUEUE)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, the signals HANDLED call `handler`.  Those that the process ignores (SIGHUP under nohup) stay ignored."""
    taken = [number for number in HANDLED if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = [(number, signal.signal(number, handler)) for number in taken]
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)


class Signals:
    """Inside `with`, the signals HANDLED are recorded and end nothing; a second Ctrl-C interrupts at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self._number, self._time = 0, 0.0
        self._handled = contextlib.ExitStack()
        self._sent: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self._handled.enter_context(handled_by(self._record))
        return self

    def __exit__(self, *_) -> None:
        self._handled.close()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == self._number == signal.SIGINT and time.monotonic() - self._time > REPEAT_S:
            raise KeyboardInterrupt
        if not self._number:
            self._number, self._time = number, time.monotonic()

    def request(self, number: int) -> None:
        """Have `received` return `number` on all ranks; a larger one wins."""
        self._number = max(self._number, number)

    def received(self) -> int:
        """The signal that any rank has received, or what one has requested, or 0; the same on every rank.  Call it once
        a step on all ranks.  On CUDA it is the result of DELAY steps before, for which the host does not wait."""
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
