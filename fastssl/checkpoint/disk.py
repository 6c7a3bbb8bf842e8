"""Checkpoints on disk.  Each is written to a temporary folder, with a manifest of sizes and hashes, which is renamed at
the end: it is complete or absent.  `newest` reports a damaged one and returns the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl import files
from fastssl.files import tensors, untrusted

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1  # of a checkpoint; raise it where a version before could not read or would misread what is written


class NewerFormat(ValueError):
    """A checkpoint that a later version has written: complete, but not to be read here."""


def directory(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(run_dir) / "checkpoints"


def create(run_dir: str | Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of `step`, the only one; call on one rank, then let every rank write
    into it."""
    for unfinished in directory(run_dir).glob("step_*.tmp"):
        shutil.rmtree(unfinished)
    path = directory(run_dir) / f"step_{step:08d}.tmp"
    path.mkdir(parents=True)
    return path


def write(path: Path, content: bytes | dict[str, Tensor]) -> dict:
    """Write a file through to the disk; returns its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in [content] if isinstance(content, bytes) else tensors.blocks(content):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def commit(
    temporary: Path,
    keep: int,
    keep_interval: int = 0,
    entries: dict[str, dict] | None = None,
    known: set[Path] | None = None,
) -> Path:
    """Write the manifest of a folder that all ranks have finished, rename it and delete older ones (`_delete_old`).
    Call on one rank.

    `entries`: of the manifest, as `write` returned them; None: the folder is read.  `known`: checkpoints known to
    be complete, whose contents are not read again; the new one is added."""
    if entries is None:
        written = sorted(p for p in temporary.rglob("*") if p.is_file())
        entries = {
            str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in written
        }
    files.write_json(temporary / MANIFEST, {"format": FORMAT, "files": entries})
    path = temporary.with_suffix("")
    shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, from before a resume
    _sync(temporary / MANIFEST)
    temporary.rename(path)
    _sync(path.parent)
    known = set() if known is None else known
    known.add(path)
    _delete_old(path, keep, keep_interval, known)
    return path


def _delete_old(path: Path, keep: int, keep_interval: int, known: set[Path]) -> None:
    """Delete what is older than the `keep` newest complete checkpoints (-1: nothing), `path`, which was just written,
    among them; those whose step is a multiple of `keep_interval` (0: none) stay.

    A checkpoint of a later step was damaged when the run was resumed from one before it: it is deleted, too."""
    complete = 1
    for other in list_checkpoints(path.parent.parent):
        if step_of(other) > step_of(path):
            shutil.rmtree(other)
        elif other == path or keep < 1:
            continue
        elif complete < keep:
            complete += _is_complete(other, known)
        elif not keep_interval or step_of(other) % keep_interval:
            shutil.rmtree(other)


def _is_complete(path: Path, known: set[Path]) -> bool:
    with contextlib.suppress(NewerFormat):
        if damage(path, read=path not in known) is not None:
            return False
    known.add(path)
    return True


def _sync(path: Path) -> None:
    """Have a file or the entries of a folder on the disk before older checkpoints are deleted."""
    handle = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems refuse it for folders
        os.fsync(handle)
    os.close(handle)


def newest(run_dir: str | Path, report: Callable[[str], Any] = print) -> Path | None:
    """The newest complete checkpoint; `report` gets a line for every damaged one that is newer.  NewerFormat, instead
    of the one before, if it is of a newer format: to go on from an older one would discard it."""
    for path in list_checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        report(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None


def damage(path: Path, read: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None.  `read`: read the files, too, not their sizes only.
    NewerFormat if a later version has written it."""
    try:
        entries = _read_manifest(path / MANIFEST)
    except NewerFormat:
        raise
    except ValueError:
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in entries.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"  # or a pipe or a device, which might be read without end
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if read and files.sha256(file) != entry["sha256"]:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _read_manifest(manifest: Path) -> dict[str, dict]:
    """The files of a manifest with their "bytes" and "sha256".  NewerFormat for one of a later version, ValueError for
    anything else, and for files outside the checkpoint."""
    value = untrusted.read_json(manifest)
    found = value.get("format") if isinstance(value, dict) else None
    if type(found) is not int or found < 1:
        raise ValueError(f"{manifest} has no format")
    if found > FORMAT:
        raise NewerFormat(
            f"checkpoint {manifest.parent} has format {found}, and this version of fastssl reads format {FORMAT}: use "
            "the version that wrote it (environment.json in the run folder names it), or name an older "
            "checkpoint"
        )
    entries = value.get("files")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{manifest} lists no files")
    for name, entry in entries.items():
        inside = "\0" not in name and ".." not in Path(name).parts and not Path(name).is_absolute()
        valid = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not (inside and valid):
            raise ValueError(f"{manifest}: the entry {name!r:.60} is not a file with its size and hash")
    return entries


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders, newest first, damaged ones included."""
    found = (p for p in directory(run_dir).glob("step_*") if step_of(p) >= 0)
    return sorted(found, key=step_of, reverse=True)


def is_at_or_before(path: Path, checkpoint: Path) -> bool:
    """Whether `path` is `checkpoint` or an earlier one of the same run."""
    return path.parent.resolve() == checkpoint.parent.resolve() and step_of(path) <= step_of(checkpoint)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for another name.  Above 8 digits the names sort differently."""
    number = re.fullmatch(r"step_(\d+)", path.name)
    return int(number[1]) if number else -1
