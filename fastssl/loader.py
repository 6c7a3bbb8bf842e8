"""Batches of uint8 images on the device from a .beton file, each image decoded once; views are cut from them there.

Decoding runs on threads of this process, two micro-batches ahead.  On CUDA it writes into pinned memory, which is
copied to the device on a stream of its own.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import dist, host_memory, launcher
from fastssl.files.datacard import DataCard
from fastssl.sampler import MicroBatch, Sampler

AHEAD = 2  # micro-batches decoded in advance; more only need memory if decoding is fast enough
RESIDENT_FRACTION = 0.5  # of the free memory: the rest is for the model, its activations and the optimizer
Tensors = list[Tensor]  # of a batch: pixels, sizes, index, label


@dataclass
class Batch:
    pixels: Tensor  # uint8 (B, P, 3), P = the most pixels of one image; image i fills the first h*w rows of pixels[i]
    sizes: Tensor  # int32 (B, 2) = (h, w)
    index: Tensor  # int64 (B,), row in the file
    label: Tensor  # int64 (B,), -1 = none; or float32 (B, C)
    epoch: int
    step: int  # of the epoch
    position: int | None = None  # of its first sample in the `order` given for the epoch, which may repeat samples


class Loader:
    """Batches of a file.  `batch` counts the images of all ranks; `sampler` divides it and sets the order.

    `resident`: decode all images once and keep them on the device, if they fit.  `workers`: threads that decode;
    default: this rank's cores.  `wait_ms`: how long the caller of `epoch` waited for the last micro-batch.  On CPU the
    memory of a batch is used again once no tensor refers to it.  ValueError for a file or a batch that cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch: int,
        sampler: Sampler | None = None,
        *,
        device: torch.device | str | None = None,
        workers: int | None = None,
        resident: bool = False,
    ):
        _check_file(path)
        from fastssl.decode import BetonReader  # 4 s: ffcv brings OpenCV and numba

        self._beton = BetonReader(path)
        self.path, self.samples, self.batch = str(path), self._beton.samples, batch
        self.sampler = sampler or Sampler()
        self.device = torch.device(dist.device() if device is None else device)
        self.workers = cores() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers={workers}: must be 1 or more")
        self.sampler.check_batch(batch, self.samples, self.path)
        self.wait_ms = 0.0
        self.card = self._read_card()
        self.classes = self.card.classes
        self.class_numbers: np.ndarray | None = None  # position in `classes` of each class of the file; see relabel
        self._decoders = ThreadPoolExecutor(self.workers, "decode")
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")
        self._buffer_shape = (batch // self.sampler.world // self.sampler.micro_per_step, self._beton.max_pixels, 3)
        self._free: list[np.ndarray] = []  # buffers that no tensor refers to
        self._check_memory()
        if self.device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(self.device)
            self._pinned = cycle([_PinnedBuffer(self._buffer_shape) for _ in range(2)])
        self._resident = self._decode_all() if resident else None

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return self.sampler.steps(self.batch, self.samples)

    def _check_memory(self) -> None:
        """ValueError if the buffers of the micro-batches do not fit into memory, with as much space for every image as
        for the largest one.  On CUDA two pinned ones, for which PyTorch takes the next power of 2; on CPU those of the
        step that is made and of the next one, and those decoded in advance."""
        images, pixels, _ = self._buffer_shape
        one, free = images * pixels * 3, free_memory(torch.device("cpu"))
        cuda = self.device.type == "cuda"
        count, each = (2, 1 << (one - 1).bit_length()) if cuda else (2 * self.sampler.micro_per_step + AHEAD, one)
        if count * each > free:
            raise ValueError(
                f"{self.path}: the largest image ({pixels / 1e6:.0f} megapixels) needs {count * each / 2**30:.1f} "
                f"GiB for {count} micro-batches of {images} and {free / 2**30:.1f} GiB are free: convert with "
                "--max-pixels or --short-side, or set a smaller speed.micro_batch"
            )

    def _read_card(self) -> DataCard:
        """The data card beside the file; without one, a card with what the file itself says."""
        found: dict[str, Any] = {
            "samples": self.samples,
            "max_pixels": self._beton.max_pixels,
            "bytes": self._beton.bytes.size,
        }
        if not Path(self.path).with_suffix(".json").exists():
            return DataCard(**found)
        card = DataCard.read(self.path)
        if (stated := {name: getattr(card, name) for name in found}) != found:
            raise ValueError(
                f"the data card of {self.path} belongs to another file: it says {stated}, the file has {found}; "
                "convert again"
            )
        return card

    @property
    def fingerprint(self) -> str:
        """What tells this file from another one of the same name."""
        return self._beton.fingerprint

    def labels(self) -> np.ndarray:
        """int64 (N,) or float32 (N, C) of all samples in file order; no image is decoded."""
        return self._labels(np.arange(self.samples))

    def relabel(self, numbers: np.ndarray, classes: list[str]) -> None:
        """From now on class i of the file is `numbers[i]` of `classes` (its column, for several labels an image)."""
        self.class_numbers, self.classes = numbers, classes
        if self._resident is not None:
            label = torch.from_numpy(self.labels()).to(self.device)
            self._resident = [*self._resident[:3], label]  # a new list: copies of this loader have the old one

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        found, numbers = self._beton.labels(rows), self.class_numbers
        if numbers is None:
            return found
        return found[:, np.argsort(numbers)] if found.ndim == 2 else np.where(found < 0, found, numbers[found])

    def epoch(self, epoch: int, start: int = 0, order: np.ndarray | None = None) -> Generator[Batch]:
        """This rank's micro-batches of the steps from `start`; nothing before it is decoded.  `order` (samples,): rows
        to take instead of the epoch's permutation; they may repeat."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"start={start}: this epoch has steps 0 to {self.steps}")
        if order is not None and (order.shape != (self.samples,) or order.min() < 0 or order.max() >= self.samples):
            raise ValueError(f"order of shape {order.shape}: expected {self.samples} rows in 0 to {self.samples - 1}")
        micro_batches = self.sampler.micro_batches(self.batch, self.samples, epoch, start, order)
        return self._batches(epoch, micro_batches, repeats=order is not None)

    def in_file_order(self, batch: int | None = None) -> Loader:
        """A loader of every sample once, which shares this one's threads and resident images; not to be used during an
        epoch of this one.  `batch`: of all ranks; by default one micro-batch of each, which is also the maximum if the
        images are not resident."""
        largest = self._buffer_shape[0] * self.sampler.world
        other = copy.copy(self)
        other.batch = largest if batch is None else batch if self._resident is not None else min(batch, largest)
        other.sampler = replace(self.sampler, micro_per_step=1, shuffle=False, drop_last=False)
        return other

    def _batches(self, epoch: int, micro_batches: list[MicroBatch], repeats: bool) -> Generator[Batch]:
        rows = [micro_batch.rows for micro_batch in micro_batches]
        source = self._decode_ahead(rows) if self._resident is None else self._select(self._resident, rows)
        with closing(source):  # also if the caller stops early
            for micro_batch in micro_batches:
                before = time.perf_counter()
                pixels, sizes, index, label = next(source)
                self.wait_ms = 1e3 * (time.perf_counter() - before)
                position = micro_batch.position if repeats else None
                yield Batch(pixels, sizes, index, label, epoch, micro_batch.step, position)

    def _select(self, resident: Tensors, rows: list[np.ndarray]) -> Generator[Tensors]:
        """Micro-batches of the resident images."""
        for part in rows:
            index = torch.from_numpy(part).to(self.device, non_blocking=True)
            yield [t.index_select(0, index) for t in resident]

    def _decode_ahead(self, rows: list[np.ndarray]) -> Generator[Tensors]:
        """Micro-batches on the device, in order.  While the caller works on one, the next AHEAD are decoded."""
        pending: deque[Future] = deque()
        try:
            for i in range(len(rows)):
                while len(pending) <= AHEAD and i + len(pending) < len(rows):
                    pending.append(self._prefetcher.submit(self._load, rows[i + len(pending)]))
                tensors, copied = pending.popleft().result()  # raises what the decoder raised
                if copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(copied)
                    for t in tensors:  # allocated on the copy stream: not to be reused before this stream is done
                        t.record_stream(stream)
                yield tensors
        finally:
            for future in pending:
                future.cancel()

    def _load(self, rows: np.ndarray) -> tuple[Tensors, torch.cuda.Event | None]:
        """One micro-batch, and on CUDA the event after its copy.  Called on the prefetcher's thread alone."""
        self._beton.check_unchanged()
        n = len(rows)
        sizes, index = torch.empty(n, 2, dtype=torch.int32), torch.from_numpy(rows)
        label = torch.from_numpy(self._labels(rows))
        if self.device.type != "cuda":
            pixels = self._buffer()[:n]
            self._decode(rows, pixels.numpy(), sizes.numpy())
            return [pixels, sizes, index, label], None

        pinned = next(self._pinned)
        if pinned.copied is not None:
            pinned.copied.synchronize()  # the copy out of this buffer, two micro-batches ago
        self._decode(rows, pinned.pixels[:n].numpy(), sizes.numpy())
        with torch.cuda.device(self.device), torch.cuda.stream(self._copy_stream):
            others = [t.to(self.device, non_blocking=True) for t in (sizes, index, label)]
            pixels = pinned.pixels[:n].to(self.device, non_blocking=True)
            pinned.copied = torch.cuda.Event()
            pinned.copied.record()
        return [pixels, *others], pinned.copied

    def _decode(self, rows: np.ndarray, pixels: np.ndarray, sizes: np.ndarray) -> None:
        """Decode these rows on all workers, in small parts, because some images take longer than others."""
        size = max(4, len(rows) // (8 * self.workers))
        parts = [slice(i, i + size) for i in range(0, len(rows), size)]
        for future in [self._decoders.submit(self._beton.decode, rows[p], pixels[p], sizes[p]) for p in parts]:
            future.result()

    def _buffer(self) -> Tensor:
        """Host memory for one micro-batch, used again when the last tensor on it is deleted: the page faults of new
        memory cost a third of the time."""
        memory = self._free.pop() if self._free else np.empty(self._buffer_shape, np.uint8)
        view = memory.view()
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)

    def _decode_all(self) -> Tensors | None:
        """All samples on the device: pixels (N, P, 3), sizes, index, label.  If they do not fit: a warning and None."""
        need, free = self.samples * self._beton.max_pixels * 3, free_memory(self.device)
        if need > RESIDENT_FRACTION * free:
            warnings.warn(
                f"resident: {self.path} needs {need / 2**30:.2f} GiB decoded, {self.device} has {free / 2**30:.2f} GiB "
                f"free, of which images may use {RESIDENT_FRACTION:.0%}: they are decoded in each epoch instead",
                stacklevel=3,
            )
            return None
        rows, size = np.arange(self.samples), self._buffer_shape[0]
        tensors: Tensors = []
        for part, start in zip(self._decode_ahead([rows[i : i + size] for i in rows[::size]]), rows[::size]):
            if not tensors:
                tensors = [torch.empty(self.samples, *t.shape[1:], dtype=t.dtype, device=t.device) for t in part]
            for of_all, t in zip(tensors, part):
                of_all[start : start + len(t)] = t
        return tensors


class _PinnedBuffer:
    """Pinned memory for one micro-batch, and the event after the last copy out of it."""

    def __init__(self, shape: tuple[int, int, int]):
        self.pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.copied: torch.cuda.Event | None = None


def _check_file(path: str | os.PathLike) -> None:
    """ValueError for a file or folder that must be converted first, with the command."""
    name = str(path).rstrip("/")
    kinds = {".zip": "zip", ".tar": "tar", ".gz": "tar", ".tgz": "tar", ".xz": "tar", ".txt": "list", ".csv": "list"}
    kind = "imagefolder" if Path(path).is_dir() else kinds.get(Path(name).suffix.lower())
    if name and kind and Path(path).exists():
        what = "a folder" if kind == "imagefolder" else f"a {Path(name).suffix} file"
        raise ValueError(
            f"{path} is {what}, and a .beton file is needed: `fastssl convert {kind} {name} "
            f"{Path(name).name.partition('.')[0]}.beton` makes one"
        )


def cores() -> int:
    """CPU cores for this rank: those of `srun --cpus-per-task`, to which Slurm may have bound it; else those of the
    node, divided by its ranks."""
    available, own = len(os.sched_getaffinity(0)), launcher.cores_per_rank()
    return min(available, own) if own else max(1, available // dist.local_world())


def free_memory(device: torch.device) -> int:
    """Bytes that are free, within the limits of control groups; those of a host are divided by the ranks on it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch's allocator
        return torch.cuda.mem_get_info(device)[0] + cached
    return host_memory.free_bytes() // dist.local_world()
