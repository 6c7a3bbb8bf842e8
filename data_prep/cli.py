"""`fastssl convert SOURCE PATH OUT` and `fastssl convert check NAME.beton`.

Errors are one line on stderr and exit code 2.  The result does not depend on --workers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastssl.files.datacard import DataCard
from fastssl.parsing import Parser

from .image import Options
from .kinds import KINDS, open_source
from .write import Progress, Target, check_target, convert

if TYPE_CHECKING:
    import rich.progress

SOURCE_OPTIONS = ("split", "root", "labels", "label_columns", "classes")  # recorded in the data card


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.explain(message)}; see fastssl convert --help")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _check(argv[1:]) if argv[:1] == ["check"] else _convert(argv)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (ValueError, OSError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"fastssl convert: {where}{text}".replace("\n", " "), file=sys.stderr)
        return 2
    except MemoryError:
        print("fastssl convert: not enough memory: try fewer --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastssl convert: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {name:<12} {text}" for name, text in KINDS.items())
    parser = _Parser(
        "fastssl convert",
        description=f"Convert images to one FFCV file OUT (NAME.beton) with a data card NAME.json.\n\nSOURCE\n{kinds}",
        epilog="fastssl convert check NAME.beton   decodes all images, compares the file with its data card, measures "
        "the decoding speed, draws NAME.png",
    )
    parser.add_argument("source", metavar="SOURCE", choices=list(KINDS))
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("out", metavar="OUT")
    add = parser.add_argument
    add("--split", help="sub-folder of PATH, or split of the dataset, to convert")
    add("--root", help="list: folder that the paths are relative to (default: the folder of the list)")
    add(
        "--label-columns",
        metavar="N",
        help="list: the column with the label, counted from 1 (the path is column 1); "
        "2-4 or 2-: several labels per image (default: 2, if the lines have at most two columns)",
    )
    add(
        "--classes",
        metavar="FILE",
        help="list: a file with one class name per line, in order, or the .beton or data card of another split, so "
        "that both have the same class numbers (default: the sorted names)",
    )
    add("--labels", choices=("auto", "none"), default="auto", help="none: ignore the class folders (default auto)")
    add("--short-side", type=_positive, metavar="S", help="shrink images whose short side is longer than S to S pixels")
    add("--upscale", action="store_true", help="with --short-side: also enlarge images whose short side is shorter")
    add("--max-pixels", type=_positive, metavar="N", help="shrink images of more than N pixels (height x width)")
    add(
        "--max-aspect",
        type=float,
        metavar="R",
        help="with --short-side S: shrink long images further, to at most R*S*S pixels, because in a batch every "
        "image takes the memory of the largest one in the file (default 4)",
    )
    add(
        "--mode",
        choices=("jpg", "raw"),
        help="format of images that cannot be stored unchanged; with raw, JPEGs are decoded, too (default: jpg for "
        "JPEGs, raw for images in lossless formats)",
    )
    add("--quality", type=_positive, default=95, help="of JPEGs that are encoded anew (default 95)")
    add(
        "--max-bad",
        type=_count,
        default=0,
        metavar="N",
        help="leave out up to N images that cannot be read (default 0); NAME.bad.txt lists them",
    )
    add(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one per CPU)",
    )
    add("--force", action="store_true", help="replace an existing OUT")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:  # integers of 64 bits have 19 digits
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is not a positive whole number of at most 18 digits")
    return int(text)


def _workers(text: str) -> int:
    count, limit = _positive(text), max(64, 4 * (os.cpu_count() or 1))
    if count > limit:
        raise argparse.ArgumentTypeError(f"{text} is more than {limit}: a worker keeps one CPU busy")
    return count


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.quality > 100:
        raise ValueError(f"--quality {args.quality}: must be 1 to 100")
    if not args.short_side and (args.upscale or args.max_aspect is not None):
        raise ValueError(
            f"{'--upscale' if args.upscale else '--max-aspect'} needs --short-side; "
            "--max-pixels limits the size without it"
        )
    if args.max_aspect is not None and not args.max_aspect >= 1:
        raise ValueError(f"--max-aspect {args.max_aspect}: must be 1 or more")
    target = Target(Path(args.out))
    check_target(target, args.force)  # now, because reading an archive can take minutes
    options = Options(args.short_side, args.upscale, args.max_pixels, args.max_aspect or 4.0, args.quality, args.mode)
    start = time.perf_counter()
    given = {name: getattr(args, name) for name in SOURCE_OPTIONS}
    source = open_source(args.source, args.path, **given)
    for note in source.notes:
        print(note)
    with progress_bar() as progress:
        card = convert(
            source,
            args.out,
            options,
            workers=args.workers,
            max_bad=args.max_bad,
            force=args.force,
            given=given,
            progress=progress,
        )
    for line in summary(card, target, time.perf_counter() - start):
        print(line)
    return 0


def summary(card: DataCard, target: Target, seconds: float) -> Iterator[str]:
    """The lines that are printed after a conversion."""
    classes, options = card.classes or [], card.options or {}
    kinds = {"none": "no labels", "int": f"{len(classes)} classes", "multi": f"{len(classes)} labels per image"}
    labels = kinds[card.label or "none"]
    copied, encoded = card.copied or 0, (card.jpeg or 0) - (card.copied or 0)
    yield (
        f"{target.beton}: {card.samples} images, {labels}, {card.bytes / 1e6:.1f} MB in {seconds:.1f} s "
        f"({copied} JPEGs unchanged, {encoded} encoded as JPEG, {card.raw} raw)"
    )
    if card.label == "int" and len(classes) == 1:
        yield (
            f"all images are of one class ({classes[0]!r}): the file can be used for training without labels, but "
            "not as the training set of an evaluation; each class needs a folder of its own"
        )
    if card.bad:
        yield f"left out {card.bad} images that cannot be read, listed in {target.bad}"
    if card.bounded:
        yield (
            f"--max-aspect {options['max_aspect']:g}: {card.bounded} long images were shrunk to the area of "
            f"{options['max_aspect'] * options['short_side']:g} by {options['short_side']}"
        )
    if card.distrusted:
        yield (
            f"{card.distrusted} JPEGs, for which FFCV's decoder reports errors (damaged, or of a rare kind), were "
            "decoded by Pillow and encoded anew"
        )
    if options["short_side"] and not card.resized:
        yield f"--short-side {options['short_side']} changed no image" + (
            "" if options["upscale"] else ": none is larger (--upscale enlarges smaller ones)"
        )
    mean = card.mean_pixels or card.max_pixels
    if card.max_pixels > 8 * mean:
        yield (
            "in a batch every image takes the memory of the largest one in the file, which has "
            f"{card.max_pixels} pixels, {card.max_pixels / mean:.0f} times the mean; --max-pixels or "
            "--short-side limits it"
        )


def _check(argv: list[str]) -> int:
    from .check import check

    parser = _Parser(
        "fastssl convert check",
        description="Decode all images, compare the file with its data card, measure the decoding speed and draw "
        "NAME.png, a contact sheet.",
    )
    parser.add_argument("path", metavar="NAME.beton")
    parser.add_argument("--workers", type=_workers, default=len(os.sched_getaffinity(0)), help="threads that decode")
    args = parser.parse_args(argv)
    with progress_bar() as progress:
        report = check(args.path, workers=args.workers, progress=progress)
    print(report)
    return 0


@contextlib.contextmanager
def progress_bar(interval_s: float = 10.0) -> Iterator[Progress]:
    """A bar on a terminal; otherwise a line of text every `interval_s` seconds."""
    bar, tasks, begin = None, {}, time.monotonic()
    last = begin

    def lines(what: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= interval_s:
            last = now
            print(f"{what}: {done} of {total}, {now - begin:.0f} s", file=sys.stderr, flush=True)

    def draw(what: str, done: int, total: int) -> None:
        nonlocal bar, last
        if bar is None:  # created here because it starts a thread, which must not exist when the workers are forked
            bar = _bar()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        elif (now := time.monotonic()) - last < 0.1 and done < total:
            return
        else:
            last = now
        bar.update(tasks[what], completed=done)

    try:
        yield draw if sys.stderr.isatty() else lines
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar
