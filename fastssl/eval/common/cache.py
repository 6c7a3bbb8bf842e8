"""Features on disk: FOLDER/<key>/ with shards of 4096 rows, each a folder of memory-mapped .npy, and a manifest.

The key is a hash of all that decides the values: the weights' tensors, the data, the view, the network, the precision
and the layers, so that features of other weights are never read and a changed file has another key.  A shard is written
under a temporary name and renamed, with the checksums of its files: an interrupted extraction continues with the first
missing shard.  A damaged shard is reported and computed again, since its key determines its contents.

Only rank 0 reads and writes the folder; the rows are sent between ranks as tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import dist, files
from fastssl.eval.common.features import Extractor, check_finite, check_loader, check_memory
from fastssl.eval.common.ranks import on_main
from fastssl.files import untrusted
from fastssl.files.tensors import tensor_bytes
from fastssl.loader import Loader

SHARD_ROWS = 4096  # 32 MB of 2048 dimensions, and what an interruption may cost
FORMAT = 1
REMEDY = "give --cache DIR elsewhere, or --no-cache"
STALE = 24 * 3600  # seconds after which an unfinished temporary shard is of a process that has ended
Receive = Callable[[int, list[Tensor]], None]  # number of the first row, (n, dim) of each layer


def load_or_extract(folder: Path, extractor: Extractor, loader: Loader, weights: str = "") -> tuple[Tensor, ...]:
    """What features.extract returns, bit for bit: read from the shards in `folder`, computed where they are missing.

    `weights`: where they come from, in words, for the manifest.  ValueError when a feature is NaN or infinite.
    """
    dims = extractor.dims
    check_memory(loader, sum(dims))
    out = [torch.empty(loader.samples, dim, device=loader.device) for dim in dims]

    def receive(first: int, parts: list[Tensor]) -> None:
        for part, layer in zip(parts, out):
            layer[first : first + len(part)] = part

    for_each_shard(folder, extractor, loader, receive, weights)
    return (*out, torch.from_numpy(loader.labels()).to(loader.device))


def for_each_shard(
    folder: Path | None, extractor: Extractor, loader: Loader, receive: Receive, weights: str = ""
) -> None:
    """Call receive(first row, [(n, dim) of each layer]) on all ranks for every shard, those that are read from `folder`
    first: for files whose features do not fit into memory.  No folder: none is stored."""
    check_loader(loader)
    store = None
    if folder is not None:
        store = on_main(lambda: FeatureStore(folder, extractor, loader, weights), REMEDY)
    shards, dims = range(-(-loader.samples // SHARD_ROWS)), extractor.dims
    missing = [k for k in shards if store is None or not _read(store, k, dims, loader, receive)]
    if missing:
        into = f" into {store.folder}" if store else ""
        dist.print_main(f"features of {loader.path}: computing {len(missing)} of {len(shards)} shards{into}")
        _compute(store, missing, extractor, loader, receive)
        if store:
            on_main(store.finish, REMEDY)
    elif store:
        dist.print_main(f"features of {loader.path}: read from {store.folder}")


class FeatureStore:
    """The folder of one key; only rank 0 calls its methods."""

    def __init__(self, folder: Path, extractor: Extractor, loader: Loader, weights: str) -> None:
        self.layers, self.dims, self.samples = extractor.layers, extractor.dims, loader.samples
        backbone = extractor.backbone
        facts = {
            "format": FORMAT,
            "fastssl": version("fastssl"),
            "weights": hash_weights(backbone),
            "data": hash_data(loader),
            "view": dataclasses.asdict(extractor.view),
            "layers": extractor.layers,
            "precision": extractor.precision,
            "backbone": dataclasses.asdict(backbone.spec) if hasattr(backbone, "spec") else repr(backbone),
        }
        key = files.sha256_json(facts)[:16]
        self.folder = folder / key
        self.about = {
            **facts,
            "of": weights,
            "file": loader.path,
            "samples": loader.samples,
            "rows": SHARD_ROWS,
            "dims": dict(zip(self.layers, self.dims)),
            "dtype": "float32",
        }

    def shard(self, k: int) -> Path:
        return self.folder / f"{k:05d}"

    def read(self, k: int) -> list[np.ndarray] | None:
        """One memory-mapped (rows, dim) array for each layer; None where the shard is missing, or damaged, which is
        printed."""
        folder, rows = self.shard(k), min(SHARD_ROWS, self.samples - k * SHARD_ROWS)
        if not folder.exists():
            return None
        out, file = [], folder
        try:
            sums = untrusted.read_json(folder / "crc32.json")
            crcs = [sums[name] for name in self.layers]
            for name, dim, crc in zip(self.layers, self.dims, crcs):
                file = folder / f"{name}.npy"
                out.append(_read_array(file, (rows, dim), crc))
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            print(f"features: {file} is damaged ({error}); computing this shard again", flush=True)
            return None
        return out

    def write(self, k: int, parts: list[np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{k:05d}.tmp.", dir=self.folder))
        try:
            for name, part in zip(self.layers, parts):
                np.save(temporary / f"{name}.npy", part)
            sums = {name: zlib.crc32(part.data) for name, part in zip(self.layers, parts)}
            (temporary / "crc32.json").write_text(json.dumps(sums))
            temporary.chmod(0o755)  # mkdtemp's are for the owner alone
            shutil.rmtree(self.shard(k), ignore_errors=True)  # damaged, or the same from another process
            os.rename(temporary, self.shard(k))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def finish(self) -> None:
        """Write the manifest and delete what processes that were killed have left."""
        for path in self.folder.glob("*.tmp.*"):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
        files.write_json(self.folder / "manifest.json", self.about, unique=True)


def _read_array(file: Path, shape: tuple[int, int], crc: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="c")  # copy-on-write: torch refuses memory that it may not write
    except Exception as error:  # NumPy parses the header as Python: SyntaxError, TokenError and others
        raise ValueError(untrusted.one_line(error)) from None
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(f"holds {array.dtype} {array.shape}, not float32 {shape}")
    if not np.isfinite(array).all():
        raise ValueError("holds NaN or infinite values")
    if zlib.crc32(array) != crc:
        raise ValueError("has changed since it was written")
    return array


def check_disk_space(folder: Path, need: int, remedy: str) -> None:
    """ValueError, with the remedy, when the disk of `folder` has less than `need` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 2**30:.1f} GiB, its disk has {free / 2**30:.1f} GiB free: {remedy}")


def hash_weights(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def hash_data(loader: Loader) -> str:
    """SHA-256 of the .beton, from its data card where it has one."""
    return loader.card.sha256 or files.sha256(loader.path)


def _read(store: FeatureStore, k: int, dims: list[int], loader: Loader, receive: Receive) -> bool:
    """Pass shard k to `receive` on all ranks, if rank 0 can read it."""
    first, stop = k * SHARD_ROWS, min((k + 1) * SHARD_ROWS, loader.samples)
    arrays = store.read(k) if dist.is_main() else None
    if not dist.broadcast_(torch.tensor([arrays is not None], dtype=torch.uint8, device=dist.device())):
        return False
    if arrays:
        parts = [torch.from_numpy(array).to(loader.device) for array in arrays]
    else:
        parts = [torch.empty(stop - first, dim, device=loader.device) for dim in dims]
    receive(first, [dist.broadcast_(part) for part in parts])
    return True


def _compute(
    store: FeatureStore | None, missing: list[int], extractor: Extractor, loader: Loader, receive: Receive
) -> None:
    if store:
        need = len(missing) * SHARD_ROWS * sum(store.dims) * 4
        on_main(lambda: check_disk_space(store.folder, need, REMEDY), REMEDY)
    for _, group in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
        shards = [k for _, k in group]  # consecutive ones
        last = min((shards[-1] + 1) * SHARD_ROWS, loader.samples)
        start, stop = shards[0] * SHARD_ROWS // loader.batch, -(-last // loader.batch)
        waiting = []  # rows of this rank that are in no finished shard: [features of each layer, sample numbers]
        for batch, parts in extractor.batches(loader, start, stop):
            waiting.append([*parts, batch.index])
            while shards and min((shards[0] + 1) * SHARD_ROWS, loader.samples) <= (batch.step + 1) * loader.batch:
                rows = [torch.cat(part) for part in zip(*waiting)]
                inside = rows[-1] < (shards[0] + 1) * SHARD_ROWS
                _finish_shard(store, shards.pop(0), [part[inside] for part in rows], loader, receive)
                waiting = [[part[~inside] for part in rows]]


def _finish_shard(store: FeatureStore | None, k: int, rows: list[Tensor], loader: Loader, receive: Receive) -> None:
    """One shard: from all ranks to `receive` on all ranks, and to disk."""
    first, stop = k * SHARD_ROWS, min((k + 1) * SHARD_ROWS, loader.samples)
    rows = [part[rows[-1] >= first] for part in rows]  # a batch may begin in the shard before
    *parts, index = (dist.gather_ragged(part) for part in rows)
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(first, stop, device=index.device)):
        raise ValueError(
            f"{loader.path}: the ranks gave {len(index)} samples that are not {first} to {stop - 1}, each "
            "once; were all given the same file?"
        )
    parts = [part[order] for part in parts]
    for part in parts:
        check_finite(loader.path, part, first)
    if store:
        on_main(lambda: store.write(k, [part.cpu().numpy() for part in parts]), REMEDY)
    receive(first, parts)
