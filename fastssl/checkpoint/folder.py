"""Checkpoints that are complete or absent: written to a temporary folder, sealed by a manifest of sizes and hashes,
then renamed.  `newest` skips a damaged one, names it, and falls back to the one before.  `lock` keeps a second run out
of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from fastssl import files
from fastssl.files import untrusted

MANIFEST = "manifest.json"
LOCK = "lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that are mounted without them


def folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of `step`; call on one rank, then let every rank write into it."""
    path = folder(run_dir) / f"step_{step:08d}.tmp"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(temporary: Path, keep: int, every: int = 0) -> Path:
    """Seal and rename a folder that all ranks have finished; delete all but the `keep` newest (-1: keep all) and those
    of every `every`-th step.  Call on one rank."""
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in written}
    files.write_json(temporary / MANIFEST, {"format": 1, "files": entries})
    path, run_dir = temporary.with_suffix(""), temporary.parent.parent
    shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, from before a resume
    temporary.rename(path)
    for old in found(run_dir)[keep:] if keep > 0 else ():
        if not every or step_of(old) % every:
            shutil.rmtree(old)
    return path


def newest(run_dir: str | Path, warn=print) -> Path | None:
    """The newest complete checkpoint; every damaged one that is newer is reported to `warn`."""
    for path in found(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        entries = _entries(path / MANIFEST)
    except ValueError:
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"  # or a pipe or a device, whose reading may never end
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if files.sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _entries(manifest: Path) -> dict[str, dict]:
    """The files of a manifest with their "bytes" and "sha256"; ValueError for anything else, or files elsewhere."""
    value = untrusted.read_json(manifest)
    entries = value.get("files") if isinstance(value, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{manifest} lists no files")
    for name, entry in entries.items():
        inside = "\0" not in name and ".." not in Path(name).parts and not Path(name).is_absolute()
        good = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not (inside and good):
            raise ValueError(f"{manifest}: the entry {name!r:.60} is not a file with its size and hash")
    return entries


def found(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders, damaged ones too, newest first."""
    return sorted((p for p in folder(run_dir).glob("step_*") if re.fullmatch(r"step_\d+", p.name)), reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


@contextlib.contextmanager
def lock(run_dir: str | Path, say=print) -> Iterator[None]:
    """Keep every other process out of a run's folder, which is made; ValueError where one is in it.  What was made and
    is still empty afterwards is removed.

    An flock: the kernel gives it up with the process, however that ends, and NFS (version 4) and Lustre (mounted with
    -o flock) carry it to other nodes.  Where the file system has none, `say` gets a warning.
    """
    run_dir, made = Path(run_dir), []
    for parent in [run_dir, *run_dir.parents]:
        if parent.exists():
            break
        made.append(parent)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    say(
                        f"{run_dir}: its file system has no locks ({error.strerror}); see to it that no other run "
                        "writes there"
                    )
                else:
                    file.seek(0)
                    raise ValueError(
                        f"{run_dir} is being trained by another process ({file.read().strip()}): wait "
                        "for its end, or give another name=..."
                    ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                if made and [p.name for p in run_dir.iterdir()] == [LOCK]:  # the start failed
                    (run_dir / LOCK).unlink()
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()
