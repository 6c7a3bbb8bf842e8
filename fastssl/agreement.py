"""What must be equal on all ranks at the start: settings, code, versions, the data's size, and the run folder.

Ranks that differ would train without an error and give a result that no config describes.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import socket
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as td

from fastssl import dist, files
from fastssl.config import Run, dump

VERSIONS = ("torch", "torchvision", "ffcv", "deepspeed", "numpy")
SHOWN = 5  # differences in the message
SHARED_S = 60.0  # until a file of rank 0 is seen on another node: file systems cache directories for some seconds


def compare(run: Run) -> None:
    """ValueError on every rank where settings, code, versions or the size of the data differ between ranks.  It names
    the first rank that differs from rank 0, and what differs."""
    if dist.world() == 1:
        return
    mine = facts(run)
    digests: list[Any] = [None] * dist.world()
    td.all_gather_object(digests, files.sha256_json(mine))
    if len(set(digests)) == 1:
        return
    everything: list[Any] = [None] * dist.world()
    td.all_gather_object(everything, (socket.gethostname(), mine))
    rank = next(r for r, digest in enumerate(digests) if digest != digests[0])
    (host_0, first), (host, other) = everything[0], everything[rank]
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    shown = [f"{key} is {_value(other.get(key))} there and {_value(first.get(key))} on rank 0" for key in keys[:SHOWN]]
    more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise ValueError(
        f"rank {rank} on {host} differs from rank 0 on {host_0}: {'; '.join(shown)}{more}. "
        "Start all ranks with the same command, code and data"
    )


def facts(run: Run) -> dict[str, Any]:
    """What `compare` compares: setting or file -> value or hash."""
    data = Path(run.data.train)
    return {
        **dict(_settings(dump(run))),
        f"size of {data}": data.stat().st_size if data.is_file() else "no file",
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONS},
        **_code(run),
    }


def check_folder(folder: Path, name: str) -> None:
    """ValueError on every rank where one does not see the file `name` as rank 0 has just written it to the run folder:
    the nodes do not share it."""
    if dist.world() == 1:
        return
    text = dist.on_main((folder / name).read_text)
    deadline = time.monotonic() + SHARED_S
    while not (sees := _read(folder / name) == text) and time.monotonic() < deadline:
        time.sleep(0.5)
    hosts: list[Any] = [None] * dist.world()
    td.all_gather_object(hosts, (socket.gethostname(), sees))
    for rank, (host, sees) in enumerate(hosts):
        if not sees:
            raise ValueError(
                f"rank {rank} on {host} does not see the run folder {folder} of rank 0 on {hosts[0][0]}: start all "
                "ranks in one folder of a file system that the nodes share, or name one by log.root=/shared/folder"
            )


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in the JSON data of a config."""
    if isinstance(value, dict | list) and value:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _code(run: Run) -> dict[str, str]:
    """Hashes of fastssl's files, and of those that define the run's method, hooks and other objects."""
    found = {}
    for package in ("fastssl", "fastssl.kernels"):
        for folder in map(Path, importlib.import_module(package).__path__):
            for file in sorted(folder.rglob("*.py")):
                found[f"{package}/{file.relative_to(folder)}"] = file
    for module in {str(value).rpartition(".")[0] for key, value in _settings(dump(run)) if key.endswith("type")}:
        defined_in = getattr(sys.modules.get(module), "__file__", None)
        if defined_in and not module.startswith("fastssl."):
            found[Path(defined_in).name] = Path(defined_in)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in found.items()}


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)
