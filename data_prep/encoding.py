"""Worker processes that encode the images of a source.  The results come in the order of the source."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .image import Bad, Options, Stored, store_many
from .sources import Item, Source

CHUNK_SAMPLES, CHUNK_BYTES = 64, 4 << 20  # that a worker gets at once, whichever is reached first
WAITING_BYTES = 1 << 29  # in the chunks that are encoded or wait for it; only images of a streamed archive count
PR_SET_PDEATHSIG = 1
Encoded = tuple[str, Any, Stored | Bad]  # (name, label, result)


def encode(source: Source, options: Options, workers: int, descriptors: tuple[int, ...] = ()) -> Iterator[Encoded]:
    """(name, label, result) of each image.  `descriptors`: of open files, which the workers close."""
    chunks = _chunks(source)
    if workers <= 1:
        for chunk, _ in chunks:
            yield from _results(chunk, store_many([ref for _, ref, _ in chunk], options))
        return
    # fork: a spawned worker would import the caller's main module again
    context, arguments = multiprocessing.get_context("fork"), (os.getpid(), descriptors)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            waiting: deque[tuple[list[Item], int, Future]] = deque()
            waiting_bytes = 0
            for chunk, size in chunks:
                waiting.append((chunk, size, pool.submit(store_many, [ref for _, ref, _ in chunk], options)))
                waiting_bytes += size
                # a limit, so that a long archive is not read into memory
                while waiting and (len(waiting) >= 3 * workers or waiting_bytes > WAITING_BYTES):
                    chunk, size, future = waiting.popleft()
                    waiting_bytes -= size
                    yield from _results(chunk, future.result())
            for chunk, _, future in waiting:
                yield from _results(chunk, future.result())
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, likely for memory: try fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _results(chunk: list[Item], results: list[Stored | Bad]) -> Iterator[Encoded]:
    for (name, _, label), result in zip(chunk, results, strict=True):
        yield name, label, result


def _chunks(source: Source) -> Iterator[tuple[list[Item], int]]:
    """The items that a worker gets at once, and how many bytes of their images are in memory."""
    chunk, size = [], 0
    for item in source.items():
        chunk.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(chunk) == CHUNK_SAMPLES or size >= CHUNK_BYTES:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _start_worker(parent: int, descriptors: tuple[int, ...]) -> None:
    """Make this worker end if its parent is killed, and close the parent's files, which the fork copied: an open one
    would keep the lock of a killed conversion."""
    for descriptor in descriptors:
        os.close(descriptor)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was killed before the line above
        os._exit(1)
