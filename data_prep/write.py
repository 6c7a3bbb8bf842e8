"""`convert`: from a Source to NAME.beton and its data card.

Worker processes encode the images (encoding.py); this process alone writes them, in the order of the source, so that
the file has the same bytes for any number of workers.  (The workers of FFCV's own DatasetWriter write pages in the
order in which they happen to finish.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastssl import files
from fastssl.files.datacard import DataCard

from .beton_writer import BetonWriter
from .encoding import encode
from .image import Bad, Options
from .sources import Source

Progress = Callable[[str, int, int], None]  # (what, done, total)


class BadImages(ValueError):
    """More images than --max-bad allows cannot be read.  NAME.bad.txt lists them."""


class Target(NamedTuple):
    """The files of one conversion."""

    beton: Path

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

    `max_bad`: images that cannot be read and are left out.  `given`: further options to record in the card.
    ValueError or OSError: the conversion failed; an existing file is as it was, and nothing new is left but
    NAME.bad.txt if there are images that cannot be read."""
    target = Target(Path(out))
    check_target(target, force)
    if source.count == 0:
        raise ValueError(f"{source.path} holds no image")
    with _temporary_file(target, force) as (file, descriptors):
        beton = BetonWriter(file, source.count, len(source.classes or []) if source.label == "multi" else None)
        counts = dict.fromkeys(("copied", "resized", "bounded", "distrusted"), 0)
        bad: list[tuple[str, str]] = []
        for done, (name, label, result) in enumerate(encode(source, options, workers, descriptors), 1):
            if isinstance(result, Bad):
                bad.append((name, result.reason))
            elif len(bad) <= max_bad:  # otherwise the conversion fails, and the loop only completes the list
                beton.add(result, label)
                for field in counts:
                    counts[field] += getattr(result, field)
            progress("images", done, source.count)
        _report_bad(target, bad, max_bad, source.count)
        if beton.samples == 0:
            raise ValueError(f"none of the {source.count} images of {source.path} can be read, see {target.bad}")
        beton.finish()
        file.flush()
        os.fsync(file.fileno())
        digest = files.sha256(target.part, hash_progress(progress))
        size = target.part.stat().st_size
        card = _card(source, beton, counts | {"bad": len(bad)}, digest, size, options, given or {})
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
def _temporary_file(target: Target, force: bool) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """NAME.beton.part, locked against a second conversion to the same name, and the descriptors that hold the lock.  At
    the end it is removed unless it was renamed.  A file that a killed process left is overwritten."""
    with files.new_folder(target.part.parent), open(target.part, "ab+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {target.beton}") from None
        check_target(target, force)  # again: another process may have finished since
        try:
            with open(target.part, "wb", buffering=1 << 22) as file:
                yield file, (lock.fileno(), file.fileno())
        except OSError as error:
            if error.filename:
                raise
            raise OSError(error.errno, f"{error.strerror}; nothing was written", str(target.beton)) from error
        finally:
            target.part.unlink(missing_ok=True)


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
    """The `progress` of `files.sha256`, in MB."""
    return lambda done, total: progress("hash, MB", done >> 20, total >> 20)


def geometry(modes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> dict:
    """The fields of a data card that describe sizes, from the table of a file; `check` compares them."""
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
    source: Source, beton: BetonWriter, counts: dict[str, int], digest: str, size: int, options: Options, given: dict
) -> DataCard:
    image = beton.image[: beton.samples]
    recorded = {**given, **asdict(options)}
    if not options.short_side:
        recorded["max_aspect"] = None  # not used
    return DataCard(
        source=source.path,
        kind=source.kind,
        samples=beton.samples,
        classes=source.classes,
        label=source.label,
        **geometry(image["mode"], image["height"], image["width"]),
        **counts,
        bytes=size,
        options=recorded,
        sha256=digest,
        fastssl=version("fastssl"),
        ffcv=version("ffcv"),
    )
