"""Features on disk: FOLDER/<key>/ with shards of 4096 rows, each a folder of memory-mapped .npy, and a manifest last.

The key is a hash of all that decides the values: the weights' tensors, the data, the view, the network, the precision
and the layers; so nothing is ever read for other weights, and a changed file is another key.  A shard appears whole
(temporary name, then rename) with the checksums of its files, so an interrupted extraction goes on at the first missing
shard.  A damaged shard is named and computed again: what it holds follows from its key, so a rerun can do nothing else.

Only the first rank touches the folder; rows come from the ranks and go to them as tensors.
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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import dist, files
from fastssl.eval.common import features
from fastssl.kernels.augment import View

ROWS = 4096  # of a shard: 32 MB of 2048 dimensions, and what an interruption may cost
FORMAT = 1
ELSEWHERE = "give --cache DIR elsewhere, or --no-cache"
STALE = 24 * 3600  # seconds after which an unfinished temporary shard is nobody's


def load_or_extract(
    folder: Path, backbone: nn.Module, loader, view: View, layers: tuple[str, ...], precision: str, weights: str = ""
) -> tuple[Tensor, ...]:
    """What features.extract returns, bit for bit, from the shards in `folder` and, of those missing, computed.

    `weights` says in words what they are, for the manifest.  ValueError when a feature is NaN or infinite.
    """
    sizes = [shape.numel() for shape in features.shapes(backbone, view, layers)]
    features.check_memory(loader, sum(sizes))
    out = [torch.empty(loader.samples, dim, device=loader.device) for dim in sizes]

    def take(first: int, parts: list[Tensor]) -> None:
        for part, layer in zip(parts, out):
            layer[first : first + len(part)] = part

    visit(folder, backbone, loader, view, layers, precision, take, weights)
    return (*out, labels(loader))


def labels(loader) -> Tensor:
    """(N,) or (N, C) on the loader's device, from the file's table: costs no decoding."""
    return torch.from_numpy(loader.labels()).to(loader.device)


def visit(
    folder: Path | None,
    backbone: nn.Module,
    loader,
    view: View,
    layers: tuple[str, ...],
    precision: str,
    take: Callable[[int, list[Tensor]], None],
    weights: str = "",
) -> None:
    """`load_or_extract` shard by shard, for sets that no memory holds: take(first row, [(n, dim) of each layer]) on all
    ranks for every shard, those that were kept before the others.  No folder: none is kept.
    """
    features.check_loader(loader)
    sizes = [shape.numel() for shape in features.shapes(backbone, view, layers)]
    made: list[Store] = []
    if folder is not None:
        on_main(lambda: made.append(Store(folder, backbone, loader, view, layers, precision, sizes, weights)))
    store, shards = made[0] if made else None, range(-(-loader.samples // ROWS))
    missing = [k for k in shards if folder is None or not _read(store, k, sizes, loader, take)]
    place = f" into {store.folder}" if store else ""
    if missing:
        _say(f"features of {loader.path}: computing {len(missing)} of {len(shards)} shards{place}")
        _compute(store, missing, backbone, loader, view, layers, precision, take)
        on_main(lambda: store and store.finish())
    else:
        _say(f"features of {loader.path}: read from {store.folder}" if store else "")


class Store:
    """The folder of one key.  Lives on the first rank."""

    def __init__(self, folder: Path, backbone: nn.Module, loader, view: View, layers, precision, sizes, weights):
        self.layers, self.sizes, self.samples = layers, sizes, loader.samples
        spec = dataclasses.asdict(backbone.spec) if hasattr(backbone, "spec") else repr(backbone)
        facts = {
            "format": FORMAT,
            "fastssl": version("fastssl"),
            "weights": hash_weights(backbone),
            "data": hash_data(loader),
            "view": dataclasses.asdict(view),
            "layers": layers,
            "precision": precision,
            "backbone": spec,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / key
        self.about = {
            **facts,
            "of": weights,
            "file": loader.path,
            "samples": loader.samples,
            "rows": ROWS,
            "dims": dict(zip(layers, sizes)),
            "dtype": "float32",
        }

    def shard(self, k: int) -> Path:
        return self.folder / f"{k:05d}"

    def read(self, k: int) -> list[np.ndarray] | None:
        """One memory-mapped (rows, dim) array for each layer; None where there is no sound shard, damage printed."""
        folder, rows = self.shard(k), min(ROWS, self.samples - k * ROWS)
        if not folder.exists():
            return None
        out, file = [], folder
        try:
            for name, dim, crc in zip(self.layers, self.sizes, _sums(folder, self.layers)):
                file = folder / f"{name}.npy"
                array = np.load(file, mmap_mode="c")  # copy-on-write: torch refuses memory that it may not write
                if array.shape != (rows, dim) or array.dtype != np.float32:
                    raise ValueError(f"holds {array.dtype} {array.shape}, not float32 {(rows, dim)}")
                if not np.isfinite(array).all():
                    raise ValueError("holds NaN or infinite values")
                if zlib.crc32(array) != crc:
                    raise ValueError("has changed since it was written")
                out.append(array)
        except (OSError, ValueError, EOFError, KeyError) as error:
            print(f"features: {file} is damaged ({error}); computing this shard again", flush=True)
            return None
        return out

    def write(self, k: int, parts: list[np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{k:05d}.tmp.", dir=self.folder))
        try:
            for name, part in zip(self.layers, parts):
                np.save(temporary / f"{name}.npy", part)
            sums = {name: zlib.crc32(part) for name, part in zip(self.layers, parts)}
            (temporary / "crc32.json").write_text(json.dumps(sums))
            temporary.chmod(0o755)  # mkdtemp's are for the owner alone
            shutil.rmtree(self.shard(k), ignore_errors=True)  # damaged, or the same from another process
            os.rename(temporary, self.shard(k))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def finish(self) -> None:
        for path in self.folder.glob("*.tmp.*"):  # of a process that was killed
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
        files.write_json(self.folder / "manifest.json", self.about, unique=True)

    def room(self, shards: int) -> None:
        """ValueError when the disk cannot hold that many."""
        room(self.folder, shards * ROWS * sum(self.sizes) * 4, ELSEWHERE)


def room(folder: Path, need: int, fix: str) -> None:
    """ValueError with the fix when the disk of `folder` has less than `need` bytes."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free: {fix}")


def hash_weights(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.view(torch.uint8).numpy() if value.ndim else value[None].view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_data(loader) -> str:
    """SHA-256 of the .beton, from its data card where it has one."""
    if "sha256" in loader.card:
        return loader.card["sha256"]
    return files.sha256(loader.path)


def _sums(folder: Path, layers: tuple[str, ...]) -> list[int]:
    sums = json.loads((folder / "crc32.json").read_text())
    return [sums[name] for name in layers]


def _read(store: Store | None, k: int, sizes: list[int], loader, take) -> bool:
    """Hand shard k to `take` on all ranks, if the first has it."""
    first, stop = k * ROWS, min((k + 1) * ROWS, loader.samples)
    parts = store.read(k) if store else None
    if not dist.broadcast_(torch.tensor([parts is not None], dtype=torch.uint8, device=dist.device())):
        return False
    rows = (
        [torch.from_numpy(part).to(loader.device) for part in parts]
        if parts
        else [torch.empty(stop - first, dim, device=loader.device) for dim in sizes]
    )
    take(first, [dist.broadcast_(part) for part in rows])
    return True


def _compute(
    store: Store | None,
    missing: list[int],
    backbone: nn.Module,
    loader,
    view: View,
    layers: tuple[str, ...],
    precision: str,
    take,
) -> None:
    on_main(lambda: store and store.room(len(missing)))
    for run in _runs(missing):
        start, stop = run[0] * ROWS // loader.batch, -(-min((run[-1] + 1) * ROWS, loader.samples) // loader.batch)
        held, coming = [], list(run)
        for step, parts in features.by_step(backbone, loader, view, layers, precision, start, stop):
            held.append(parts)
            while coming and min((coming[0] + 1) * ROWS, loader.samples) <= (step + 1) * loader.batch:
                joined = [torch.cat(part) for part in zip(*held)]
                mine = joined[-1] < (coming[0] + 1) * ROWS  # held is what no shard has taken yet
                _emit(store, coming.pop(0), [part[mine] for part in joined], loader, take)
                held = [[part[~mine] for part in joined]]


def _emit(store: Store | None, k: int, mine: list[Tensor], loader, take) -> None:
    """One shard: from all ranks to `take` on all ranks, and from the first to disk."""
    first, stop = k * ROWS, min((k + 1) * ROWS, loader.samples)
    mine = [part[mine[-1] >= first] for part in mine]  # a batch may begin in the shard before
    *parts, _, index = (dist.gather_ragged(part) for part in mine)
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(first, stop, device=index.device)):
        raise ValueError(
            f"{loader.path}: the ranks gave {len(index)} samples that are not {first} to {stop - 1}, each "
            "once; were all given the same file?"
        )
    parts = [part[order] for part in parts]
    for part in parts:
        bad = ~part.isfinite().all(1)
        if bad.any():
            raise ValueError(
                f"{loader.path}: features of {int(bad.sum())} samples are NaN or infinite (first: sample "
                f"{first + int(bad.nonzero()[0])}): the training diverged, or precision is too low; "
                "nothing of them was kept"
            )
    on_main(lambda: store and store.write(k, [part.cpu().numpy() for part in parts]))
    take(first, parts)


def _runs(numbers: list[int]) -> list[list[int]]:
    """[0, 1, 4] -> [[0, 1], [4]]"""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][-1] == n - 1:
            out[-1].append(n)
        else:
            out.append([n])
    return out


def on_main(work: Callable[[], None], fix: str = ELSEWHERE) -> None:
    """Do it on the first rank; its error becomes every rank's, so that none waits for it; `fix` ends that of a file."""
    problem = b""
    if dist.is_main():
        try:
            work()
        except (OSError, ValueError) as error:
            problem = f"{error}; {fix}".encode() if isinstance(error, OSError) else str(error).encode()
    size = int(dist.broadcast_(torch.tensor([len(problem)], device=dist.device())))
    if size:
        text = torch.tensor(list(problem) or [0] * size, dtype=torch.uint8, device=dist.device())
        raise ValueError(bytes(dist.broadcast_(text).tolist()).decode())


def _say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)
