"""Checkpoints are written by a thread of each rank, while training goes on.

`save` copies this rank's state to host memory; its thread then writes the files.  Rank 0's thread reads in the process
group's store that all ranks have finished, and commits the checkpoint.  The threads use no collective.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as td
from torch import Tensor

from fastssl import dist
from fastssl.checkpoint import state, store
from fastssl.files import untrusted
from fastssl.trainer import Trainer

POLL_S = 0.02
STALL_S = 10.0  # after an error: a checkpoint that has not grown for so long is left unfinished


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
        self._abandoned = False
        self._connection: td.Store | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self._join_while_growing()

    def save(self) -> None:
        """Begin a checkpoint of the present step, after the one before is complete.  ValueError on every rank
        where that one has failed, or this one cannot be begun."""
        self._join()
        self._folder, token = dist.on_main(self._begin)
        contents = state.snapshot(self._t, self._copies)
        self._copies.record()
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
            return store.create(self._t.folder, self._t.step), secrets.token_hex(8)
        except OSError as error:
            raise ValueError(self._message(store.directory(self._t.folder) / "new", error)) from error

    def _result(self) -> Path | None:
        if self._error is not None:
            raise self._error
        return self._path

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _join_while_growing(self) -> None:
        while self._thread is not None and self._thread.is_alive():
            before = self._size()
            self._thread.join(STALL_S)
            if self._thread.is_alive() and self._size() == before:
                self._abandoned = True
                self._thread.join(10 * POLL_S)
                print(f"{self._folder}: not all ranks have written their files", file=sys.stderr, flush=True)
                return

    def _size(self) -> int:
        assert self._folder is not None
        try:
            return sum(path.stat().st_size for path in self._folder.iterdir())
        except OSError:  # it has been renamed
            return -1

    def _run(self, folder: Path, token: str, contents: state.Contents) -> None:
        """In the thread: write this rank's files, then report them; on rank 0 commit."""
        try:
            self._copies.wait()
            mine: dict = {"files": {name: store.write(folder / name, content) for name, content in contents.items()}}
        except Exception as error:  # of any type: it is raised in the main thread
            mine = {"error": self._message(folder, error)}
        if dist.is_main():
            self._commit(folder, [mine, *self._reports(token)])
            return
        if "error" in mine:
            self._error = ValueError(mine["error"])
        self._store().set(f"fastssl/checkpoint/{token}/{dist.rank()}", json.dumps(mine))

    def _reports(self, token: str) -> list[dict]:
        """What the other ranks have written, in the order of ranks; waits for them."""
        reports: list[dict] = []
        for rank in range(1, dist.world()):
            key, group = f"fastssl/checkpoint/{token}/{rank}", self._store()
            while not group.check([key]):
                if self._abandoned:
                    return [*reports, {"error": f"rank {rank} has not written its files"}]
                time.sleep(POLL_S)
            reports.append(json.loads(group.get(key)))
            group.delete_key(key)
        return reports

    def _commit(self, folder: Path, reports: list[dict]) -> None:
        log, steps = self._t.run.log, self._t.loader.steps
        try:
            for report in reports:
                if "error" in report:
                    raise ValueError(report["error"])
            entries = {name: entry for report in reports for name, entry in report["files"].items()}
            self._path = store.commit(folder, log.keep, round(log.keep_every * steps), entries, self._complete)
        except Exception as error:  # of any type: it is raised in the main thread
            shutil.rmtree(folder, ignore_errors=True)
            self._error = error if type(error) is ValueError else ValueError(self._message(folder, error))

    def _store(self) -> td.Store:
        """The process group's, by a connection of its own: the main thread may wait in the other one."""
        if self._connection is None:
            self._connection = td.distributed_c10d._get_default_store().clone()
        return self._connection

    @staticmethod
    def _message(folder: Path, error: Exception) -> str:
        why = error.strerror if isinstance(error, OSError) and error.strerror else untrusted.one_line(error)
        last, _ = store.find_newest(folder.parent.parent)
        return f"{folder.parent}: {why}; the newest complete checkpoint is {last.name if last else 'none'}"


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
