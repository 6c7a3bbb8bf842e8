"""Checkpoints that are complete or absent: written to a temporary folder, sealed by a manifest of sizes and hashes,
then renamed.  `newest` skips a damaged one, names it, and falls back to the one before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


def folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of `step`; call on one rank, then let every rank write into it."""
    path = folder(run_dir) / f"step_{step:08d}.tmp"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(temporary: Path, keep: int) -> Path:
    """Seal and rename a folder that all ranks have finished; delete all but the `keep` newest.  Call on one rank."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (temporary / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}, indent=1))
    path = temporary.with_suffix("")
    shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, from before a resume
    temporary.rename(path)
    for old in _all(path.parent)[keep:]:
        shutil.rmtree(old)
    return path


def newest(run_dir: str | Path, warn=print) -> Path | None:
    """The newest complete checkpoint; every damaged one that is newer is reported to `warn`."""
    for path in _all(folder(run_dir)):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _all(parent: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in parent.glob("step_*") if p.suffix == ""), reverse=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
