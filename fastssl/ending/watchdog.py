"""A thread on every rank that ends its process when training cannot continue: another rank has failed, was killed or
hangs, or the launcher has ended.  Collectives on GPUs would wait for a lost rank forever.

Every two seconds each rank writes its step and the location of its main thread to the process group's store.  Rank 0
checks all other ranks, the others check rank 0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as td

from fastssl import dist
from fastssl.ending.failure import failed_code, prints_alone, report_failure
from fastssl.ending.restarts import LAUNCHERS
from fastssl.ending.signals import Signals

CHECKPOINT_S = 120.0  # for a last checkpoint of ranks whose launcher has ended
BEAT_S = 2.0  # seconds between two heartbeats of a rank
# Seconds without a heartbeat until a rank counts as lost, and without an answer from the store until rank 0 does: long,
# since a heartbeat needs the GIL, and so that a short failure of the network ends no run
SILENT_S = 120.0
STORE_S = 30.0  # seconds of errors from the store until rank 0, which hosts it, counts as lost
# Substrings of errors from collectives that have lost a peer.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out")
PACKAGES = ("fastssl", "fastssl.kernels", "fastssl.data_prep", "fastssl.configs")
STDLIB, INSTALLED = sysconfig.get_paths()["stdlib"] + os.sep, ("site-packages", "dist-packages")


class Progress:
    """The progress of training, which the watchdog checks inside `watched`."""

    def __init__(self) -> None:
        self.step, self.limit = 0, 0.0
        self._time: float | None = None

    @contextlib.contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """Inside, `made` must be called at least every `seconds` (0: without limit)."""
        self.limit, self._time = seconds, time.monotonic()
        try:
            yield
        finally:
            self._time = None

    def made(self, step: int | None = None) -> None:
        """Record progress: a step of training (its number), or a batch of anything else."""
        self.step = self.step if step is None else step
        if self._time is not None:
            self._time = time.monotonic()

    def idle(self) -> float:
        """Seconds since the last call of `made`."""
        began = self._time  # read once: the main thread may set it to None
        return 0.0 if began is None else time.monotonic() - began


progress = Progress()


class Watchdog:
    """Runs from its construction until `stop`; see the module."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._parent = os.getppid()
        self._store: td.Store | None = None  # a connection of its own: the main thread may wait in the other one
        self._beats, self._written = 0, 0.0
        self._answered = 0.0  # when the store last answered; 0: not asked yet
        self._rounds = 0  # of `_run`, which stands still while the store does not answer
        self._seen: dict[int, tuple[bytes, float]] = {}  # by rank: the last heartbeat and when it arrived
        for run in (self._run, self._watch_store):
            threading.Thread(target=run, name="fastssl-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._end.set()

    def lost(self, error: BaseException) -> str | None:
        """A message that names the lost rank, if `error` is that of a collective that lost one; takes 10 seconds."""
        if dist.world() == 1 or not any(word in str(error) for word in LOST):
            return None
        try:
            store = self._connect()
            before = self._read(store, range(dist.world()))
            time.sleep(5 * BEAT_S)
            after = self._read(store, range(dist.world()))
        except RuntimeError:  # the store was lost with rank 0
            return _lost_message(0, None)
        gone = [r for r, beat in before.items() if after[r] == beat and r != dist.rank()]
        return _lost_message(gone[0], before[gone[0]]) if gone else None

    def _run(self) -> None:
        launched = any(name in os.environ for name in (*LAUNCHERS, "FASTSSL_RESTARTS"))
        while not self._end.wait(1.0):
            self._rounds += 1
            if launched and os.getppid() != self._parent:
                print("fastssl: the launcher has gone", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                self._exit(CHECKPOINT_S, 1)
            reason = self._check()
            if reason is not None and not self._end.is_set():
                first, code = report_failure(reason, 1, self._store)
                if first:
                    print(f"fastssl: {reason}", file=sys.stderr, flush=True)
                self._exit(0.0, code)

    def _watch_store(self) -> None:
        """In a thread of its own: a call of the store does not return if rank 0's node or the network has failed
        without closing the connection."""
        rounds, seconds = 0, 0  # counted, since no time passes while the process is stopped
        while not self._end.wait(1.0):
            seconds = seconds + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if seconds > SILENT_S:
                if prints_alone():
                    how = f"the store of the ranks, which it hosts, has not answered for {SILENT_S:.0f} s"
                    message = _lost_message(0, self._seen.get(0, (None,))[0], how)
                    print(f"fastssl: {message}", file=sys.stderr, flush=True)
                self._exit(0.0, 1)

    def _check(self) -> str | None:
        """Why the run cannot continue, or None."""
        try:
            if dist.world() == 1:  # or there is no process group yet, or no longer
                return self._hanging_rank({})
            self._answered = self._answered or time.monotonic()
            reason = self._exchange_heartbeats()
            self._answered = time.monotonic()
            return reason
        except ValueError:  # the process group has just ended
            return None
        except RuntimeError:
            if time.monotonic() - self._answered <= STORE_S:
                return None
            beat = self._seen.get(0, (None,))[0]
            return _lost_message(0, beat, f"the store of the ranks, which it hosts, has failed for {STORE_S:.0f} s")

    def _exchange_heartbeats(self) -> str | None:
        """Exchange heartbeats; returns why the run cannot continue, or None."""
        store, now = self._connect(), time.monotonic()
        code = failed_code(store)
        if code:
            self._exit(2.0, code)
        if now - self._written < BEAT_S:
            return None
        self._beats, self._written = self._beats + 1, now
        location, waits = _main_thread_location()
        host = socket.gethostname()
        beat = {"beat": self._beats, "step": progress.step, "location": location, "waits": waits, "host": host}
        store.set(_key(dist.rank()), json.dumps(beat))
        others = range(1, dist.world()) if dist.is_main() else (0,)
        found = self._read(store, others)
        for r, value in found.items():
            before, arrived = self._seen.setdefault(r, (value, now))
            if value != before:
                self._seen[r] = (value, now)
            elif now - arrived > SILENT_S:
                return _lost_message(r, value, f"no heartbeat for {SILENT_S:.0f} s")
        return self._hanging_rank({dist.rank(): beat, **{r: json.loads(value) for r, value in found.items() if value}})

    def _hanging_rank(self, beats: dict[int, dict]) -> str | None:
        """Which rank keeps the others waiting, where no step was made for too long; rank 0 decides."""
        if not progress.limit or progress.idle() < progress.limit or not dist.is_main():
            return None
        ranks = beats or {0: dict(zip(("location", "waits"), _main_thread_location())) | {"step": progress.step}}
        rank, hanging = min(ranks.items(), key=lambda item: (item[1]["waits"], item[1]["step"], item[0]))
        where = f" on {hanging['host']}" if "host" in hanging else ""
        waiting = [f"; rank {r} waits for it in {b['location']}" for r, b in ranks.items() if b["waits"] and r != rank]
        return (
            f"no step in {progress.limit:.0f} s (timeout_s): rank {rank}{where} hangs after step {hanging['step']} in "
            f"{hanging['location']}{waiting[0] if waiting else ''}; continue with --resume"
        )

    def _connect(self) -> td.Store:
        if self._store is None:
            self._store = td.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=SILENT_S))
        return self._store

    @staticmethod
    def _read(store: td.Store, ranks: Any) -> dict[int, bytes]:
        """The last heartbeat of each rank; empty: none yet."""
        return {r: store.get(_key(r)) if store.check([_key(r)]) else b"" for r in ranks}

    def _exit(self, seconds: float, code: int) -> None:
        if not self._end.wait(seconds):
            sys.stdout.flush()
            os._exit(code)


def _key(rank: int) -> str:
    return f"fastssl/beat/{rank}"


def _lost_message(rank: int, beat: bytes | None, how: str = "it has ended without an error") -> str:
    known: dict = json.loads(beat) if beat else {}
    where = f" on {known['host']} after step {known['step']}" if known else ""
    return (
        f"rank {rank} is lost{where}: {how}; it was killed (for lack of memory: see dmesg), or its node or network "
        "failed; continue with --resume"
    )


def _main_thread_location() -> tuple[str, bool]:
    """Where the main thread is in our code or the user's, and whether it waits there for other ranks or the device."""
    return _location_of(sys._current_frames().get(threading.main_thread().ident or 0))


def _location_of(frame: FrameType | None) -> tuple[str, bool]:
    waits = False
    while frame is not None:
        code = frame.f_code
        waits |= code.co_filename.endswith("torch/distributed/distributed_c10d.py")
        if _is_ours(code.co_filename):
            location = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
            return location, waits or code is Signals.received.__code__
        frame = frame.f_back
    return "an unknown place", waits


def _is_ours(file: str) -> bool:
    """Whether a source file is fastssl's or the user's: not one of Python or of an installed package."""
    path = Path(file)
    if any(folder in path.parents for folder in _folders()):
        return True
    return not file.startswith((STDLIB, "<")) and not any(name in path.parts for name in INSTALLED)


@functools.cache
def _folders() -> tuple[Path, ...]:
    """The folders of fastssl's packages; in a checkout kernels, data_prep and configs lie beside the folder fastssl."""
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    return tuple(Path(folder) for spec in found if spec for folder in spec.submodule_search_locations or ())
