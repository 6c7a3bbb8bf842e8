"""Checkpoints on disk, complete or absent: written to a temporary folder, sealed by a manifest of sizes and hashes,
then renamed.  `newest` reports a damaged one and falls back to the one before.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fastssl import files
from fastssl.files import untrusted

MANIFEST = "manifest.json"


def directory(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(run_dir) / "checkpoints"


def create(run_dir: str | Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of `step`; call on one rank, then let every rank write into it."""
    path = directory(run_dir) / f"step_{step:08d}.tmp"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(temporary: Path, keep: int, keep_interval: int = 0) -> Path:
    """Seal and rename a folder that all ranks have finished; delete all but the `keep` newest (-1: keep all) and those
    whose step is a multiple of `keep_interval` (0: none).  Call on one rank."""
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in written}
    files.write_json(temporary / MANIFEST, {"format": 1, "files": entries})
    path, run_dir = temporary.with_suffix(""), temporary.parent.parent
    shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, from before a resume
    temporary.rename(path)
    for old in list_checkpoints(run_dir)[keep:] if keep > 0 else ():
        if not keep_interval or _step(old) % keep_interval:
            shutil.rmtree(old)
    return path


def newest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; a line is printed for every damaged one that is newer."""
    path, damaged = find_newest(run_dir)
    for line in damaged:
        print(line)
    return path


def find_newest(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for every damaged one that is newer."""
    damaged: list[str] = []
    for path in list_checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged.append(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        entries = _read_manifest(path / MANIFEST)
    except ValueError:
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"  # or a pipe or a device, which might be read without end
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if files.sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _read_manifest(manifest: Path) -> dict[str, dict]:
    """The files of a manifest with their "bytes" and "sha256".  ValueError for anything else, and for files outside the
    checkpoint."""
    value = untrusted.read_json(manifest)
    entries = value.get("files") if isinstance(value, dict) else None
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
    return sorted((p for p in directory(run_dir).glob("step_*") if re.fullmatch(r"step_\d+", p.name)), reverse=True)


def precedes(path: Path, checkpoint: Path) -> bool:
    """Whether `path` is `checkpoint` or an earlier one of the same run."""
    return path.parent.resolve() == checkpoint.parent.resolve() and path.name <= checkpoint.name


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
