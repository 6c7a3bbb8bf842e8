"""Assembly of NAME.beton and its data card.

Worker processes turn images into bytes; this process alone lays them out, in order, so that the file is the same to
the last byte for any number of workers (FFCV's own DatasetWriter lets its workers race for pages).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl import files
from fastssl.files.datacard import DataCard

from .ffcv_format import ALLOCATION, HEADER, VERSION, field_descriptions, sample_table
from .image import Bad, Options, Stored, store_many
from .sources import Source

MIN_PAGE = 1 << 23  # FFCV's default page of 8 MiB; a sample never crosses a page
MAX_PAGE = 1 << 31
CHUNK_SAMPLES, CHUNK_BYTES = 64, 4 << 20
WAITING_BYTES = 1 << 29  # of a streamed archive, in the chunks that wait for a worker
Progress = Callable[[str, int, int], None]  # (what, done, total)


class BadImages(ValueError):
    """More images than --max-bad allows cannot be read; the list has been written."""


class BetonWriter:
    """An FFCV file written front to back: room for the table of `capacity` samples, pages, allocations, header."""

    def __init__(self, file, capacity: int, classes: int | None):
        """`classes`: the length of the label vector, or None for one integer a sample."""
        self.file, self.samples, self.page = file, 0, MIN_PAGE
        self.vectors = classes is not None
        self.fields = field_descriptions(classes)
        self.table = sample_table(capacity, self.vectors)
        self.image, self.index, self.label = (self.table[name] for name in self.table.dtype.names)
        self.allocations = np.zeros((capacity, 1 + self.vectors), ALLOCATION)
        self.at = HEADER.itemsize + self.fields.nbytes + self.table.nbytes
        self.file.seek(self.at)

    def add(self, stored: Stored, label) -> None:
        vector = np.asarray(label, "<f4").tobytes() if self.vectors else b""
        size, row = len(stored.payload) + len(vector), self.samples
        while size > self.page:  # what respects small pages respects larger ones too, so growing late is sound
            self.page *= 2
        if self.page > MAX_PAGE:
            raise ValueError(f"image {row} takes {size} bytes, FFCV stores at most {MAX_PAGE}: use --max-pixels")
        if self.at % self.page + size > self.page:
            gap = -self.at % self.page
            self.file.write(bytes(gap))
            self.at += gap
        self.file.write(stored.payload + vector)
        self.image[row] = (stored.mode, stored.width, stored.height, self.at)
        self.allocations[row, 0] = (row, self.at, len(stored.payload))
        self.index[row] = row
        if self.vectors:
            self.label[row] = self.at + len(stored.payload)
            self.allocations[row, 1] = (row, self.label[row], len(vector))
        else:
            self.label[row] = label
        self.at += size
        self.samples += 1

    def finish(self) -> None:
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, len(self.fields)
        header["page_size"], header["num_samples"], header["alloc_table_ptr"] = self.page, self.samples, self.at
        self.file.write(self.allocations[: self.samples].tobytes())
        self.file.seek(0)
        self.file.write(header.tobytes() + self.fields.tobytes() + self.table[: self.samples].tobytes())


class Target(NamedTuple):
    """The files of one conversion."""

    beton: Path

    @classmethod
    def of(cls, path: str | Path) -> Target:
        return cls(Path(path))

    @property
    def card(self) -> Path:
        return self.beton.with_suffix(".json")

    @property
    def bad(self) -> Path:
        return self.beton.with_suffix(".bad.txt")

    @property
    def part(self) -> Path:
        return self.beton.with_name(self.beton.name + ".part")


def convert(
    source: Source,
    out: str | Path,
    options: Options,
    *,
    workers: int = 1,
    max_bad: int = 0,
    force: bool = False,
    given: dict | None = None,
    progress: Progress = lambda *_: None,
) -> DataCard:
    """Write `out` (NAME.beton) and NAME.json; return the data card.

    `given`: further options to record in the card.  Raises ValueError or OSError, and then leaves an existing target
    as it was and nothing new except NAME.bad.txt where images could not be read."""
    target = Target.of(out)
    check_target(target, force)
    if source.count == 0:
        raise ValueError(f"{source.path} holds no image")
    with _exclusive(target, force) as (file, handles):
        beton = BetonWriter(file, source.count, len(source.classes) if source.label == "multi" else None)
        facts = dict.fromkeys(("copied", "resized", "bounded", "distrusted"), 0)
        bad: list[tuple[str, str]] = []
        for done, (name, label, result) in enumerate(_encode(source, options, workers, handles), 1):
            if isinstance(result, Bad):
                bad.append((name, result.reason))
            elif len(bad) <= max_bad:  # beyond it only the list is completed
                beton.add(result, label)
                for fact in facts:
                    facts[fact] += getattr(result, fact)
            progress("images", done, source.count)
        _report_bad(target, bad, max_bad, source.count)
        if beton.samples == 0:
            raise ValueError(f"none of the {source.count} images of {source.path} can be read, see {target.bad}")
        beton.finish()
        file.flush()
        os.fsync(file.fileno())
        digest = files.sha256(target.part, hash_progress(progress))
        card = _card(source, beton, facts, bad, digest, target.part.stat().st_size, options, given or {})
        card.write(target.card)
        os.replace(target.part, target.beton)
    return card


def check_target(target: Target, force: bool) -> None:
    if target.beton.suffix != ".beton":
        raise ValueError(f"the target {target.beton} must end in .beton")
    for path in (target.beton, target.card):
        if path.is_dir():
            raise ValueError(f"{path} is a folder")
        if path.exists() and not force:
            raise ValueError(f"{path} exists: give another name, or --force to replace it")


@contextlib.contextmanager
def _exclusive(target: Target, force: bool) -> Iterator:
    """The temporary file and the descriptors of its lock, which stands against a second conversion to the same name;
    the file is removed unless it was renamed, and one that a killed process left is taken over."""
    with files.new_folder(target.part.parent), open(target.part, "ab+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {target.beton}") from None
        check_target(target, force)  # again: the other process may have finished just now
        try:
            with open(target.part, "wb", buffering=1 << 22) as file:
                yield file, (lock.fileno(), file.fileno())
        except OSError as error:
            if error.filename:
                raise
            raise OSError(error.errno, f"{error.strerror}; nothing was kept", str(target.beton)) from error
        finally:
            target.part.unlink(missing_ok=True)


def _end_with_parent(parent: int, handles: tuple[int, ...]) -> None:
    """In a worker: end when the parent is killed, and do not hold its lock, whose descriptor a fork copies."""
    for handle in handles:
        os.close(handle)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before the line above
        os._exit(1)


def _encode(
    source: Source, options: Options, workers: int, handles: tuple[int, ...] = ()
) -> Iterator[tuple[str, object, Stored | Bad]]:
    """(name, label, result) in the order of the source, whatever the number of workers."""
    chunks = _chunks(source)
    if workers <= 1:
        for chunk, _ in chunks:
            yield from _join(chunk, store_many([ref for _, ref, _ in chunk], options))
        return
    # fork: a spawned worker would import the caller's main module again
    context, ours = multiprocessing.get_context("fork"), (os.getpid(), handles)
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent, initargs=ours) as pool:
        try:
            waiting: deque = deque()  # bounded, so that a long archive is not read into memory
            held = 0
            for chunk, size in chunks:
                waiting.append((chunk, size, pool.submit(store_many, [ref for _, ref, _ in chunk], options)))
                held += size
                while waiting and (len(waiting) >= 3 * workers or held > WAITING_BYTES):
                    chunk, size, future = waiting.popleft()
                    held -= size
                    yield from _join(chunk, future.result())
            for chunk, _, future in waiting:
                yield from _join(chunk, future.result())
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, likely for memory: try fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _join(chunk: list, results: list) -> Iterator[tuple[str, object, Stored | Bad]]:
    for (name, _, label), result in zip(chunk, results, strict=True):
        yield name, label, result


def _chunks(source: Source) -> Iterator[tuple[list, int]]:
    """Items that a worker gets at once, and how many bytes of them are in memory."""
    chunk, size = [], 0
    for item in source.items():
        chunk.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(chunk) == CHUNK_SAMPLES or size >= CHUNK_BYTES:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _report_bad(target: Target, bad: list[tuple[str, str]], max_bad: int, total: int) -> None:
    if not bad:
        target.bad.unlink(missing_ok=True)  # of an earlier attempt
        return
    target.bad.write_text("".join(f"{name}\t{reason}\n" for name, reason in bad), errors="surrogateescape")
    if len(bad) > max_bad:
        name, reason = bad[0]
        raise BadImages(
            f"{len(bad)} of {total} images cannot be read, the first is {name} ({reason}): all are listed "
            f"in {target.bad}; repair or remove them, or skip them with --max-bad {len(bad)}"
        )


def hash_progress(progress: Progress) -> Callable[[int, int], None]:
    """What `files.sha256` calls, in MB."""
    return lambda done, total: progress("hash, MB", done >> 20, total >> 20)


def geometry(modes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> dict:
    """The sizes in a data card, from the table of a file; `check` computes them again."""
    pixels = heights.astype(np.int64) * widths
    return {
        "max_height": int(heights.max()),
        "max_width": int(widths.max()),
        "max_pixels": int(pixels.max()),
        "min_side": int(np.minimum(heights, widths).min()),
        "mean_pixels": float(pixels.mean()),
        "jpeg": int((modes == 0).sum()),
        "raw": int((modes == 1).sum()),
    }


def _card(
    source: Source, beton: BetonWriter, facts: dict, bad: list, digest: str, size: int, options: Options, given: dict
) -> DataCard:
    image = beton.image[: beton.samples]
    recorded = {
        **given,
        "short_side": options.short_side,
        "upscale": options.upscale,
        "max_pixels": options.max_pixels,
        "max_aspect": options.max_aspect if options.short_side else None,
        "quality": options.quality,
        "mode": options.mode,
    }
    return DataCard(
        source=source.path,
        kind=source.kind,
        samples=beton.samples,
        classes=source.classes,
        label=source.label,
        **geometry(image["mode"], image["height"], image["width"]),
        **facts,
        bad=len(bad),
        bytes=size,
        options=recorded,
        sha256=digest,
        fastssl=version("fastssl"),
        ffcv=version("ffcv"),
    )
