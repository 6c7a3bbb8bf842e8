"""A .beton file -> uint8 batches on the device, each image decoded once; views are cut from them there.

The order is a permutation keyed by (seed, epoch) and rank r takes its slice of each global batch, so any number of
ranks and micro-batches sees the batches that one rank sees.  Decoding runs on threads of this process, two
micro-batches ahead; on CUDA it writes into pinned memory, from which a side stream copies.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl import dist
from fastssl.files.datacard import DataCard

AHEAD = 2  # micro-batches decoded before they are asked for; more only costs memory once the decoder keeps up
RESIDENT_SHARE = 0.5  # of the free memory: the rest is for the model, its activations and the optimizer


@dataclass
class Batch:
    pixels: Tensor  # uint8 (B, P, 3), P = the most pixels of one image; image i fills the first h*w rows of pixels[i]
    sizes: Tensor  # int32 (B, 2) = (h, w)
    index: Tensor  # int64 (B,), row in the file
    label: Tensor  # int64 (B,), -1 = none; or float32 (B, C)
    epoch: int
    step: int  # optimizer step inside the epoch
    place: int | None = None  # of its first sample in the order given for the epoch, which may name a sample twice


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (n,), the same on every platform: NumPy keeps Philox's raw bits stable, not its `permutation`."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}: both must be 0 or more")
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable")


class Loader:
    """`batch` is global: each of `world` ranks gets batch / world samples a step, in `micro` equal micro-batches.

    Training (default): shuffled, the last incomplete batch dropped.  Evaluation (shuffle=False, drop_last=False):
    file order, every sample exactly once over the ranks, the last batch ragged; a rank may then get nothing for it.
    `wait_ms` is how long the consumer waited for the last micro-batch.  On CPU a canvas is used again once no tensor
    refers to it.
    """

    def __init__(
        self,
        path,
        batch: int,
        *,
        seed: int = 0,
        device=None,
        rank: int | None = None,
        world: int | None = None,
        micro: int = 1,
        workers: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        resident: bool = False,
    ):
        _check_file(path)
        from fastssl.decode import BetonReader  # 4 s: ffcv brings OpenCV and numba

        self._beton = BetonReader(path)
        self.path, self.samples = str(path), self._beton.samples
        self.batch, self.seed, self.micro = batch, seed, micro
        self.rank = dist.rank() if rank is None else rank
        self.world = dist.world() if world is None else world
        self.device = torch.device(dist.device() if device is None else device)
        self.workers = cores() if workers is None else workers
        self.shuffle, self.drop_last, self.wait_ms = shuffle, drop_last, 0.0
        self._check_batch()
        self.steps = self.samples // batch if drop_last else -(-self.samples // batch)
        self.card = self._read_card()
        self.classes = self.card.classes
        self.numbers: np.ndarray | None = None  # class in `classes` of each class of the file; see relabel
        self._pool = ThreadPoolExecutor(self.workers, "decode")
        self._feeder = ThreadPoolExecutor(1, "feed")
        self._canvas_shape = (batch // self.world // micro, self._beton.max_pixels, 3)
        self._free: list[np.ndarray] = []
        self._check_memory()
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)
            self._slots = cycle(
                [_Slot(torch.empty(self._canvas_shape, dtype=torch.uint8, pin_memory=True)) for _ in range(2)]
            )
        self._held = self._hold() if resident else None

    def _check_batch(self) -> None:
        for name in ("world", "micro", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        parts = self.world * self.micro
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank}: must be below world={self.world}")
        if self.batch < 1 or self.batch % parts:
            near = max(1, round(self.batch / parts)) * parts
            raise ValueError(
                f"batch={self.batch} is not divisible by world * micro = {self.world} * {self.micro}; "
                f"the nearest batch that is: {near}"
            )
        if self.drop_last and self.batch > self.samples:
            raise ValueError(
                f"batch={self.batch} is larger than {self.path} ({self.samples} samples); "
                f"use at most {self.samples // parts * parts}"
            )

    def _check_memory(self) -> None:
        """One canvas a micro-batch, as large for each image as for the largest; pinned, there are two."""
        pixels, images = self._beton.max_pixels, self._canvas_shape[0]
        need = images * pixels * 3
        free = free_memory(torch.device("cpu"))
        if need * (2 if self.device.type == "cuda" else 1) > free:
            raise ValueError(
                f"{self.path}: the largest image ({pixels / 1e6:.0f} megapixels) needs {need / 2**30:.1f} "
                f"GiB for batches of {images} and {free / 2**30:.1f} GiB are free: convert with "
                "--max-pixels or --short-side, or set a smaller speed.micro_batch"
            )

    def _read_card(self) -> DataCard:
        """The data card beside the file, or one with what the file's own table says where there is none."""
        found = {"samples": self.samples, "max_pixels": self._beton.max_pixels, "bytes": self._beton.bytes.size}
        if not Path(self.path).with_suffix(".json").exists():
            return DataCard(**found)
        card = DataCard.read(self.path)
        if (said := {name: getattr(card, name) for name in found}) != found:
            raise ValueError(
                f"the data card of {self.path} is not this file's: it says {said}, the file has {found}; convert again"
            )
        return card

    def labels(self) -> np.ndarray:
        """int64 (N,) or float32 (N, C) of all samples in file order; no image is decoded."""
        return self._labels(np.arange(self.samples))

    def relabel(self, numbers: np.ndarray, classes: list[str]) -> None:
        """From now on class i of the file is `numbers[i]` of `classes` (its column, for several labels an image)."""
        self.numbers, self.classes = numbers, classes
        if self._held is not None:
            label = torch.from_numpy(self.labels()).to(self.device)
            self._held = [*self._held[:3], label]  # not in place: copies of this loader share the list

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        found, numbers = self._beton.labels(rows), self.numbers
        if numbers is None:
            return found
        return found[:, np.argsort(numbers)] if found.ndim == 2 else np.where(found < 0, found, numbers[found])

    def epoch(self, epoch: int, start: int = 0, order: np.ndarray | None = None) -> Iterator[Batch]:
        """`micro` Batches per step for the steps from `start`; nothing before it is decoded.  `order`: rows to go
        through instead of the epoch's permutation, as many as there are samples; rows may repeat."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"start={start}: this epoch has steps 0 to {self.steps}")
        if order is not None and (order.shape != (self.samples,) or order.min() < 0 or order.max() >= self.samples):
            raise ValueError(f"order of shape {order.shape}: expected {self.samples} rows in 0 to {self.samples - 1}")
        return self._run(epoch, self._plan(epoch, start, order), order is not None)

    def in_file_order(self, batch: int | None = None) -> Loader:
        """Every sample once, by the same threads and from the same resident set; not while an epoch of this loader is
        under way.  `batch`: global; by default and at most one micro-batch a rank where samples are decoded."""
        largest = self._canvas_shape[0] * self.world
        batch = largest if batch is None else batch if self._held is not None else min(batch, largest)
        other = copy.copy(self)
        other.batch, other.micro, other.shuffle, other.drop_last = batch, 1, False, False
        other.steps = -(-self.samples // other.batch)
        return other

    def _plan(self, epoch: int, start: int, order: np.ndarray | None) -> list[tuple[int, int, np.ndarray]]:
        """(step, place in the order, rows) of each micro-batch of this rank."""
        if order is None:
            order = permutation(self.samples, self.seed, epoch) if self.shuffle else np.arange(self.samples)
        plan, places = [], np.arange(len(order))
        for step in range(start, self.steps):
            share = _slice(places[step * self.batch : (step + 1) * self.batch], self.rank, self.world)
            plan += [(step, _slice(share, k, self.micro)) for k in range(self.micro)]
        return [(step, int(part[0]), order[part]) for step, part in plan if len(part)]

    def _run(self, epoch: int, plan: list, ordered: bool) -> Iterator[Batch]:
        parts = [rows for *_, rows in plan]
        source = self._stream(parts) if self._held is None else self._pick(parts)
        with closing(source):  # also when the consumer leaves in mid-epoch
            for step, place, _ in plan:
                before = time.perf_counter()
                tensors = next(source)
                self.wait_ms = 1e3 * (time.perf_counter() - before)
                yield Batch(*tensors, epoch, step, place if ordered else None)

    def _stream(self, plan: list[np.ndarray]) -> Iterator[tuple[Tensor, ...]]:
        """Decoded and on the device, in order, AHEAD micro-batches beyond the one handed out in the making."""
        coming: deque = deque()
        try:
            for i in range(len(plan)):
                while len(coming) <= AHEAD and i + len(coming) < len(plan):
                    coming.append(self._feeder.submit(self._feed, plan[i + len(coming)]))
                tensors, ready = coming.popleft().result()  # raises what the decoder raised
                if ready is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(ready)
                    for t in tensors:  # the side stream owns their memory: not to be reused before this stream is done
                        t.record_stream(stream)
                yield tensors
        finally:
            for future in coming:
                future.cancel()

    def _feed(self, rows: np.ndarray) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """One micro-batch; runs on the feeder thread, one at a time."""
        n = len(rows)
        sizes, index = torch.empty(n, 2, dtype=torch.int32), torch.from_numpy(rows)
        label = torch.from_numpy(self._labels(rows))
        if self.device.type != "cuda":
            pixels = self._canvas()[:n]
            self._decode(rows, pixels.numpy(), sizes.numpy())
            return [pixels, sizes, index, label], None

        slot = next(self._slots)
        if slot.copied is not None:
            slot.copied.synchronize()  # the copy out of this slot, two micro-batches ago
        self._decode(rows, slot.pixels[:n].numpy(), sizes.numpy())
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            small = [t.to(self.device, non_blocking=True) for t in (sizes, index, label)]
            pixels = slot.pixels[:n].to(self.device, non_blocking=True)
            slot.copied = torch.cuda.Event()
            slot.copied.record()
        return [pixels, *small], slot.copied

    def _decode(self, rows: np.ndarray, pixels: np.ndarray, sizes: np.ndarray) -> None:
        """On all workers, in small pieces, because images differ in cost."""
        step = max(4, len(rows) // (8 * self.workers))
        parts = [slice(i, i + step) for i in range(0, len(rows), step)]
        for future in [self._pool.submit(self._beton.decode, rows[p], pixels[p], sizes[p]) for p in parts]:
            future.result()

    def _canvas(self) -> Tensor:
        """Host memory for one micro-batch, used again when the last tensor on it dies: fresh pages cost a third."""
        base = self._free.pop() if self._free else np.empty(self._canvas_shape, np.uint8)
        view = base.view()
        weakref.finalize(view, self._free.append, base).atexit = False
        return torch.from_numpy(view)

    def _hold(self) -> list[Tensor] | None:
        """The decoded set on the device: pixels (N, P, 3), sizes, index, label; None when it does not fit."""
        need, free = self.samples * self._beton.max_pixels * 3, free_memory(self.device)
        if need > RESIDENT_SHARE * free:
            warnings.warn(
                f"resident: {self.path} needs {need / 2**30:.2f} GiB decoded, {self.device} has {free / 2**30:.2f} GiB "
                f"free, of which at most {RESIDENT_SHARE:.0%} may go to data: streaming it instead",
                stacklevel=3,
            )
            return None
        rows = np.arange(self.samples)
        held = None
        for part in self._stream([rows[i : i + self._canvas_shape[0]] for i in rows[:: self._canvas_shape[0]]]):
            if held is None:
                held, at = [torch.empty(self.samples, *t.shape[1:], dtype=t.dtype, device=t.device) for t in part], 0
            for whole, t in zip(held, part):
                whole[at : at + len(t)] = t
            at += len(t)
        return held

    def _pick(self, parts: list[np.ndarray]) -> Iterator[list[Tensor]]:
        for rows in parts:
            rows = torch.from_numpy(rows).to(self.device, non_blocking=True)
            yield [t.index_select(0, rows) for t in self._held]


@dataclass
class _Slot:
    """Pinned memory for one micro-batch, and the event after the last copy out of it."""

    pixels: Tensor
    copied: torch.cuda.Event | None = None


def _check_file(path) -> None:
    """ValueError for what is not a .beton but can become one, with the command."""
    name = str(path).rstrip("/")
    kinds = {".zip": "zip", ".tar": "tar", ".gz": "tar", ".tgz": "tar", ".xz": "tar", ".txt": "list", ".csv": "list"}
    kind = "imagefolder" if Path(path).is_dir() else kinds.get(Path(name).suffix.lower())
    if name and kind and Path(path).exists():
        what = "a folder" if kind == "imagefolder" else f"a {Path(name).suffix} file"
        raise ValueError(
            f"{path} is {what}, and a .beton file is needed: `fastssl convert {kind} {name} "
            f"{Path(name).name.partition('.')[0]}.beton` makes one"
        )


def _slice(rows: np.ndarray, k: int, parts: int) -> np.ndarray:
    """The k-th of `parts` contiguous slices, equal where they can be."""
    return rows[k * len(rows) // parts : (k + 1) * len(rows) // parts]


def cores() -> int:
    """The cores of this node that are this rank's share."""
    return max(1, len(os.sched_getaffinity(0)) // dist.local_world())


def free_memory(device: torch.device) -> int:
    """Bytes; host memory is shared by the ranks of this node."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator, unused
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // dist.local_world()
