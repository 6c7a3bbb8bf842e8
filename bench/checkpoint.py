"""Measure what a checkpoint, which is written in the background, costs a run on one device:
python bench/checkpoint.py configs/moco/r50_in1k_v2_200ep.py [a.b=value ...]

Blocks of steps with a checkpoint begun at their start alternate with blocks without.  Checkpoints are written into a
temporary folder in log.root, whose disk is measured.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import step as bench_step
import torch
from common import append, environment, one_line_errors, parser_with_dry, spread

from fastssl import config

if TYPE_CHECKING:
    from fastssl.checkpoint.writer import Writer
    from fastssl.trainer import Trainer

ALLOWED = 0.02  # of the time of a run that checkpoints may take


@one_line_errors
def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--steps", type=int, default=20, help="of a block; default 20")
    parser.add_argument("--blocks", type=int, default=4, help="of each kind; default 4")
    args = parser.parse_intermixed_args()
    env = environment("deepspeed")
    run = config.load(args.config, args.overrides)
    Path(run.log.root).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.log.root) as run.log.root:
        t = bench_step.build(run)
        results = measure(t, args.steps, args.blocks)
    print(report(results))
    if not args.dry:
        print(f"appended to {append('checkpoint', env, **bench_step.describe(t), **results)}")
    return 0


def measure(t: Trainer, steps: int, blocks: int) -> dict:
    """Seconds of a block of each kind, of the wait for `Writer.save`, and until the files are written; their MB."""
    from fastssl.checkpoint.writer import Writer

    source, found = bench_step.real_batches(t), []
    with Writer(t) as writer:
        for each in (None, writer):  # compiles, tunes, allocates the copies on the host
            run_block(t, source, 3, each)
        for _ in range(blocks):
            found.append((run_block(t, source, steps)[0], *run_block(t, source, steps, writer)))
        path = writer.finish()
    assert path is not None, "rank 0 knows it"
    size = sum(file.stat().st_size for file in path.iterdir())
    without, with_, waits, written = (spread(list(values), 3) for values in zip(*found))
    # the difference of two medians may be below the machine's noise, and the wait is a part of it
    extra = max(with_["median"] - without["median"], waits["median"])
    return {
        "steps": steps,
        "without_s": without,
        "with_s": with_,
        "save_s": waits,
        "written_s": written,
        "mb": round(size / 1e6, 1),
        "extra_s": round(extra, 3),
        "interval_s": round(extra / ALLOWED, 1),
    }


def run_block(t: Trainer, source: Iterator[list], steps: int, writer: Writer | None = None) -> tuple[float, ...]:
    """Seconds of the block; with `writer` those that `save` takes at its start, and those until the files are written
    (as seen after a step, or after the block)."""
    from fastssl.checkpoint import disk
    from fastssl.step import step

    start, path = time.perf_counter(), disk.directory(t.folder) / f"step_{t.step:08d}"
    if writer:
        writer.save()
    waited, written = time.perf_counter() - start, 0.0
    for micro_batches in itertools.islice(source, steps):
        step(t, micro_batches)
        t.meter.end_step(t.step)
        if writer and not written and path.exists():
            written = time.perf_counter() - start
    if t.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if writer:
        writer.finish()
    return seconds, waited, written or time.perf_counter() - start


def report(r: dict) -> str:
    def text(key: str) -> str:
        return f"{r[key]['median']:.3f} s ({r[key]['min']:.3f} to {r[key]['max']:.3f})"

    return (
        f"{r['mb']:.0f} MB: training waits {text('save_s')}, the files are written after {text('written_s')}\n"
        f"{r['steps']} steps: {text('with_s')} with a checkpoint, {text('without_s')} without\n"
        f"{r['extra_s']:.3f} s more, under {100 * ALLOWED:g} % if checkpoints are {r['interval_s']:.1f} s or more apart"
    )


if __name__ == "__main__":
    sys.exit(main())
