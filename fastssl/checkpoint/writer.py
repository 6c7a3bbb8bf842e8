"""Checkpoints are written by a thread of each rank, while training goes on.

`save` copies this rank's state to host memory; its thread then writes the files and reports them in the process group's
store.  Rank 0's thread waits for all reports and commits the checkpoint.  The threads use no collective.

A checkpoint may take longer than `timeout_s`: waiting for a thread that is working counts as progress.  While they
write, the other ranks send heartbeats through the store, and rank 0 waits for ranks that do.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as td
from torch import Tensor

from fastssl import dist
from fastssl.checkpoint import disk, state
from fastssl.ending import mark_saved, progress
from fastssl.files import untrusted
from fastssl.trainer import Trainer

POLL_S = 0.02
BEAT_S = 1.0  # seconds between two heartbeats of a rank's thread
SILENT_S = 120.0  # without a heartbeat, after which rank 0 stops waiting; the thread needs the GIL for each
STALL_S = 10.0  # as SILENT_S, in `Writer.__exit__`
FILE_S = 3600.0  # for one file, with its fsync; a thread that takes longer counts as hanging


class Writer:
    """Inside `with`, `save` begins a checkpoint, and `finish` waits for it.  After an exception the end of the block
    waits for it, too, as long as ranks still write."""

    def __init__(self, t: Trainer):
        self._t, self._copies = t, HostCopies(t.device)
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None  # the temporary one
        self._path: Path | None = None  # rank 0: of the last complete checkpoint
        self._complete: set[Path] = set()  # rank 0: checkpoints that need not be read again
        self._error: ValueError | None = None
        self._leaving = False  # in `__exit__`
        self._since = 0.0  # when the thread began its current file or received a heartbeat
        self._connection: td.Store | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving = True
        self._join()
        if dist.is_main() and self._error is not None and self._error is not error:
            print(self._error, file=sys.stderr, flush=True)

    def save(self) -> None:
        """Begin a checkpoint of the present step, after the one before is complete.  ValueError on every rank
        where that one has failed, or this one cannot be begun."""
        self._join()
        self._folder, token = dist.on_main(self._begin)
        contents = state.snapshot(self._t, self._copies)
        self._copies.record()
        self._path, self._since = None, time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(self._folder, token, contents), name="fastssl-checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a checkpoint cannot be written; `finish` then raises."""
        return self._error is not None

    def finish(self) -> Path | None:
        """Wait for the last checkpoint; returns its path, on every rank.  ValueError on every rank if it failed."""
        self._join()
        return dist.on_main(self._result)

    def _begin(self) -> tuple[Path, str]:
        self._result()
        try:
            return disk.create(self._t.folder, self._t.step), secrets.token_hex(8)
        except OSError as error:
            raise ValueError(self._message(disk.directory(self._t.folder) / "new", error)) from error

    def _result(self) -> Path | None:
        if self._error is not None:
            raise self._error
        return self._path

    def _join(self) -> None:
        """Wait for the thread; in `__exit__` not for one that hangs."""
        while self._thread is not None and not (self._leaving and self._hangs()):
            if not self._hangs():
                progress.made()
            self._thread.join(BEAT_S)
            if not self._thread.is_alive():
                self._thread = None

    def _hangs(self) -> bool:
        return time.monotonic() - self._since > FILE_S

    def _run(self, folder: Path, token: str, contents: state.Contents) -> None:
        """In the thread: write this rank's files, then report them, or on rank 0 commit."""
        try:
            with self._heartbeats(token):
                mine = self._write(folder, contents)
            if dist.is_main():
                self._path = self._commit(folder, [mine, *self._reports(folder, token)])
                return
            self._store().set(_key(token, dist.rank()), json.dumps(mine))
            _files(mine)  # raises this rank's own error
        except Exception as error:  # of any type: it is raised in the main thread
            if dist.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            self._error = error if type(error) is ValueError else ValueError(self._message(folder, error))

    def _write(self, folder: Path, contents: state.Contents) -> dict:
        """This rank's report: "files" with their entries in the manifest, or an "error"."""
        entries = {}
        try:
            self._copies.wait()
            for name, content in contents.items():
                self._since = time.monotonic()
                entries[name] = disk.write(folder / name, content)
        except Exception as error:  # of any type: rank 0 raises it
            return {"error": self._message(folder, error)}
        return {"files": entries}

    @contextlib.contextmanager
    def _heartbeats(self, token: str) -> Iterator[None]:
        """Inside, a second thread sends rank 0 heartbeats, as long as writing does not hang."""
        if dist.is_main():
            yield
            return
        end = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the store has failed: the report fails, too
                while not end.wait(BEAT_S) and not self._hangs():
                    self._store().add(_key(token, dist.rank()) + "/beats", 1)

        thread = threading.Thread(target=beat, name="fastssl-checkpoint-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _reports(self, folder: Path, token: str) -> list[dict]:
        """What the other ranks have written, in the order of ranks; waits for those with heartbeats."""
        reports: list[dict] = []
        store = self._store()
        for rank in range(1, dist.world()):
            key, beats, self._since = _key(token, rank), 0, time.monotonic()
            while not store.check([key]):
                if (count := store.add(key + "/beats", 0)) != beats:
                    beats, self._since = count, time.monotonic()
                if time.monotonic() - self._since > (STALL_S if self._leaving else SILENT_S):
                    raise ValueError(self._message(folder, f"rank {rank} has not written its files"))
                time.sleep(POLL_S)
            reports.append(json.loads(store.get(key)))
            store.delete_key(key)
            store.delete_key(key + "/beats")
        return reports

    def _commit(self, folder: Path, reports: list[dict]) -> Path:
        log, self._since = self._t.run.log, time.monotonic()
        entries = {name: entry for report in reports for name, entry in _files(report).items()}
        kept = interval_in_steps(log.keep_every, self._t.loader.steps)
        mark_saved()
        return disk.commit(folder, log.keep, kept, entries, self._complete)

    def _store(self) -> td.Store:
        """The process group's, by a connection of its own: the main thread may wait in the other one."""
        if self._connection is None:
            self._connection = td.distributed_c10d._get_default_store().clone()
        return self._connection

    @staticmethod
    def _message(folder: Path, error: Exception | str) -> str:
        if isinstance(error, Exception):
            error = error.strerror if isinstance(error, OSError) and error.strerror else untrusted.one_line(error)
        try:
            last = disk.newest(folder.parent.parent, lambda damaged: None)
        except (OSError, disk.NewerFormat) as unreadable:
            why = unreadable.strerror if isinstance(unreadable, OSError) else unreadable
            return f"{folder.parent}: {error}; its checkpoints cannot be read: {why}"
        return f"{folder.parent}: {error}; the newest complete checkpoint is {last.name if last else 'none'}"


def interval_in_steps(epochs: float, steps: int) -> int:
    """An interval of `epochs` epochs, of `steps` steps each, in steps: at least 1, or 0 for 0 (no interval)."""
    return max(1, round(epochs * steps)) if epochs else 0


def _key(token: str, rank: int) -> str:
    return f"fastssl/checkpoint/{token}/{rank}"


def _files(report: dict) -> dict[str, dict]:
    """The entries in the manifest of a rank's report.  ValueError for one of an error."""
    if "error" in report:
        raise ValueError(report["error"])
    return report["files"]


def save(t: Trainer) -> Path:
    """Write a checkpoint of the present step and wait for it; returns its path, on every rank."""
    with Writer(t) as writer:
        writer.save()
        path = writer.finish()
    assert path is not None
    return path


class HostCopies:
    """Copies tensors to host memory that the next checkpoint uses again.  On CUDA it is pinned: the device copies in
    the order of its stream, and the host does not wait."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._kept: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def __call__(self, key: str, value: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._kept[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._cuda)
        return kept.copy_(value.detach(), non_blocking=True)

    def record(self) -> None:
        """Call it after the last copy of a checkpoint."""
        if self._cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Until the copies are complete; in any thread."""
        if self._copied is not None:
            self._copied.synchronize()
