"""A run's folder: the lock that keeps other processes out, config.json and environment.json."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

from fastssl import dist, files
from fastssl.checkpoint import disk
from fastssl.config import Run, dump, run_name
from fastssl.files import untrusted
from fastssl.trainer import Trainer

LOCK, ENVIRONMENT = "lock", "environment.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems that are mounted without locks


def path(run: Run) -> Path:
    return Path(run.log.root) / run.name


@contextlib.contextmanager
def locked(run: Run, config_file: str | Path | None = None) -> Iterator[None]:
    """Keep other processes out of the run's folder.  ValueError on every rank if one is training there."""
    with contextlib.ExitStack() as stack:
        dist.on_main(lambda: stack.enter_context(lock(path(run), config_file)))
        yield


@contextlib.contextmanager
def lock(folder: str | Path, config_file: str | Path | None = None) -> Iterator[None]:
    """Create `folder` and keep other processes out of it; ValueError if one holds it, with its process and its config.
    Folders that were created and are still empty at the end are removed.

    An flock: the kernel releases it however the process ends, and NFS (version 4) and Lustre (mounted with -o flock)
    pass it to other nodes.  A file system without locks gives a printed warning.
    """
    folder = Path(folder)
    with files.new_folder(folder) as created, open(folder / LOCK, "a+") as file:
        _acquire(file, folder)
        file.truncate(0)
        config = f", {Path(config_file).resolve()}" if config_file else ""
        file.write(f"process {os.getpid()} on {socket.gethostname()}{config}\n")
        file.flush()
        try:
            yield
        finally:
            if created and [p.name for p in folder.iterdir()] == [LOCK]:  # the start failed
                (folder / LOCK).unlink()


def _acquire(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{folder}: its file system has no locks ({error.strerror}); no other run may write there")
            return
        file.seek(0)
        raise ValueError(
            f"{folder} is being trained by another process ({file.read().strip()}): wait "
            "for its end, or give another name=..."
        ) from None


def prepare(t: Trainer, checkpoint: Path | None = None, clear: bool = True) -> None:
    """Write config.json.  With `clear`, delete the checkpoints that do not lead to `checkpoint` (None: all of them),
    which `find_checkpoint` has allowed."""
    if dist.is_main():
        t.folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            _keep_log(t.folder, delete=clear and bool(disk.list_checkpoints(t.folder)))
        for old in disk.list_checkpoints(t.folder) if clear else ():
            if checkpoint is None or not disk.is_at_or_before(old, checkpoint):
                shutil.rmtree(old)
        files.write_json(t.folder / "config.json", dump(t.run), indent=2)
    dist.barrier()


def _keep_log(folder: Path, delete: bool) -> None:
    """Rename the log of an earlier run that ended before its first checkpoint; with `delete` (--force) it is
    overwritten."""
    log, texts = folder / "log.jsonl", folder / "log.txt"
    if delete or not log.exists():
        return
    number = next(n for n in itertools.count(1) if not (folder / f"log-{n}.jsonl").exists())
    for file in (log, texts):
        if file.exists():
            file.rename(file.with_stem(f"log-{number}"))
    print(f"{folder}: the log of a run that has left no checkpoint is kept as log-{number}.jsonl", flush=True)


def record_environment(t: Trainer, config_file: str | Path | None = None) -> None:
    """Add an entry to environment.json: the machine and the versions with which the run starts or continues, the step,
    and the config file."""
    if not dist.is_main():
        return
    device = t.device
    before = _environments(t.folder) if t.step else []
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    entry = {
        "step": t.step,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "ranks": dist.world(),
        "accelerator": device.type,
        "device": f"{cuda.name}, {cuda.total_memory / 2**30:.0f} GiB" if cuda else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        **({"config": str(Path(config_file).resolve())} if config_file else {}),
        **({"data": t.loader.fingerprint} if hasattr(t.loader, "fingerprint") else {}),
        **{name: metadata.version(name) for name in ("fastssl", "torch", "torchvision", "ffcv", "deepspeed")},
    }
    files.write_json(t.folder / ENVIRONMENT, [*before, entry])


def other_config(run: Run, config_file: str | Path | None) -> Path | None:
    """The config file of the run in the folder of `run`, if it is another one, and the folder is named by the file."""
    known = [entry["config"] for entry in _environments(path(run)) if isinstance(entry.get("config"), str)]
    if not known or config_file is None or run.name != run_name(config_file):
        return None
    other = Path(known[-1])
    return other if other.is_file() and not other.samefile(config_file) else None


def check_data(t: Trainer, checkpoint: Path) -> None:
    """ValueError, on every rank, if the training file is not the one that the run of `checkpoint` has read last."""

    def check() -> None:
        known = [entry["data"] for entry in _environments(checkpoint.parent.parent) if "data" in entry]
        if known and hasattr(t.loader, "fingerprint") and known[-1] != t.loader.fingerprint:
            raise ValueError(
                f"--resume: data.train={t.loader.path} is another file than before ({t.loader.fingerprint} now, "
                f"{known[-1]} when the run was last started): bring it back, or start a new run (name=...)"
            )

    dist.on_main(check)


def _environments(folder: Path) -> list[dict]:
    """The entries of environment.json; none in older runs."""
    try:
        found = untrusted.read_json(folder / ENVIRONMENT)
    except ValueError:
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM core, which has no such line
        return platform.processor() or platform.machine()
