"""Writing files so that they are complete or absent, hashes, JSON; files of tensors (tensors.py), reading
untrusted files (untrusted.py), data cards (datacard.py)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastssl.files import tensors


def sha256(path: str | Path, progress: Callable[[int, int], Any] = lambda done, total: None) -> str:
    """The SHA-256 of a file in hex.  `progress` is called with the bytes read so far and the size of the file."""
    digest, done, total = hashlib.sha256(), 0, os.stat(path).st_size
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON value in hex, the same for any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[bool]:
    """Create `path` and its parents; yields whether it was absent.  Folders that were created are removed at the end of
    the block if they are empty."""
    created = [folder for folder in [path, *path.parents] if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield bool(created)
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def atomic_write(path: str | Path, unique: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end of the block, and removed if the block raises.

    `unique`: with the process id in its name, for files that several processes may write at the same time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if unique else f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the error of a write has no file name
    except ValueError:
        raise
    except Exception as error:
        raise disk_error(temporary) or error from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(path: Path) -> OSError | None:
    """The error of writing 1 MiB to `path`; None: it succeeds.  For writers whose errors hide that the disk is full or
    read-only, as those of torch.save and safetensors do."""
    try:
        with open(path, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        return None
    except OSError as error:
        return OSError(error.errno, error.strerror, str(path))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of numbers, also of NumPy and tensors, strings and containers of them.  JSON has no NaN and no infinity:
    they are written as the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any, indent: int = 1, unique: bool = False) -> None:
    with atomic_write(path, unique) as temporary:
        temporary.write_text(to_json(value, indent) + "\n")


def write_safetensors(path: str | Path, state: dict, metadata: dict[str, str]) -> None:
    """Tensors by name, in the same bytes every time."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.writelines(tensors.blocks(state, metadata))
