"""Measure the phases of a training step, with real and with synthetic data:
python bench/step.py configs/simclr/r50_in1k_200ep.py [a.b=value ...] [--profile FOLDER]

Runs the engine's step on the config's data, in blocks that alternate with blocks on random pixels of equal sizes that
are already on the device.  The ratio of real to synthetic speed shows the cost of loading.  It can be started by
torchrun and deepspeed, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import append, environment, one_line_errors, spread

from fastssl import config, dist
from fastssl.meters import PHASES

if TYPE_CHECKING:
    from fastssl.config import Run
    from fastssl.trainer import Trainer

COLUMNS = (*PHASES, "other", "total")
WARM = 3  # first steps of a block, not counted: their batches were loaded before the block


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--steps", type=int, default=30, help="counted steps of a block")
    parser.add_argument("--blocks", type=int, default=4, help="of each kind")
    parser.add_argument("--seconds", type=float, default=400, help="after which blocks end early")
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="write FOLDER/step.txt (kernels, launches, busy share, host time) and step.json.gz, a "
        "trace for https://ui.perfetto.dev, instead of blocks",
    )
    parser.add_argument("--dry", action="store_true", help="do not append to bench/results")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    start = time.perf_counter()
    env = environment("torchvision", "triton", "ffcv", "deepspeed")
    run = config.load(args.config, args.overrides)
    t = build(run)
    if args.profile:
        print(profile(t, Path(args.profile)))
        return 0
    results = measure(t, args, start + args.seconds)
    if dist.is_main():
        report(run, results)
        if not args.dry:
            facts = describe(t)
            print(f"appended to {append('step', env, **facts, **results)}")
    return 0


def serve(file: str, overrides: list[str]) -> None:
    """For compare.py: run a block for each number of steps read from stdin, and print [images/s, last loss]."""
    t = build(config.load(file, overrides))
    source = real_batches(t)
    print("READY", flush=True)
    for line in sys.stdin:
        records = run_block(t, source, int(line))
        rate = t.run.optim.batch * len(records) / sum(r["total_ms"] for r in records) * 1e3
        print("RATE " + json.dumps([rate, float(t.scalars["loss"])]), flush=True)
    dist.shutdown()


def build(run: Run) -> Trainer:
    """The trainer of `run`, with more steps than any measurement makes."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from fastssl import engine  # after the variable is set: DeepSpeed reads it when it is imported

    run.optim.steps = 10**9
    return engine.build(run)


def measure(t: Trainer, args: argparse.Namespace, deadline: float) -> dict[str, dict]:
    """{"real": ..., "synthetic": ...}: images/s over the blocks, median milliseconds of each phase, MFU, memory."""
    from fastssl.step import count_flops

    steps = real_batches(t)
    first = next(steps)
    count_flops(t, first)
    sources = {"real": steps, "synthetic": synthetic_batches(first)}
    blocks: dict[str, list] = {name: [] for name in sources}
    for name in sources:  # compiles, tunes, fills caches
        run_block(t, sources[name], 2)
    for _ in range(args.blocks):
        for name, source in sources.items():
            if dist.sum_(torch.tensor(float(time.perf_counter() < deadline), device=t.device)) or not blocks[name]:
                blocks[name].append(run_block(t, source, args.steps))
    return {name: summarise(t, parts) for name, parts in blocks.items()}


def profile(t: Trainer, folder: Path, steps: int = 10) -> str:
    """Profile a step on real data; writes tables and a trace to `folder` and returns a summary."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    source, cuda = real_batches(t), t.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    run_block(t, source, 10)
    wait()
    begin = time.perf_counter()
    run_block(t, source, steps, flush=False)
    host = (time.perf_counter() - begin) / (WARM + steps) * 1e3  # until the host has issued all steps
    wait()
    wall = (time.perf_counter() - begin) / (WARM + steps) * 1e3
    with profiler(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        run_block(t, source, steps)
        wait()
    on_device = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_device = [e for e in on_device if not e.name.startswith("Optimizer.")]  # ranges, not kernels
    busy = sum(e.time_range.elapsed_us() for e in on_device) / (WARM + steps) / 1e3
    calls = sum(e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for e in found.events())
    kernels = len(on_device) / (WARM + steps)
    lines = [
        f"{t.run.name}: batch {t.run.optim.batch}, {t.run.optim.precision}, {describe(t)}",
        f"{wall:.2f} ms a step ({t.run.optim.batch / wall * 1e3:.0f} images/s); "
        f"the host needs {host:.2f} ms to issue it",
        f"{kernels:.0f} kernels and copies a step by {calls / (WARM + steps):.0f} launches",
        f"device busy {busy:.2f} ms, {100 * busy / wall:.0f} %",
    ]
    tables = [
        found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
        for key in (["self_cuda_time_total"] * cuda + ["self_cpu_time_total"])
    ]
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.txt").write_text("\n".join([*lines, *tables]))
        found.export_chrome_trace(str(folder / "step.json.gz"))
    return "\n".join(lines)


def real_batches(t: Trainer) -> Iterator[list]:
    """The micro-batches of each step, without end; methods that cluster do not cluster."""
    from fastssl import engine

    return (micro_batches for _, micro_batches in engine.batches(t, begin=lambda t, start: None))


def synthetic_batches(like: list) -> Iterator[list]:
    """The same step again and again: random pixels with the sizes and labels of a real step."""
    noise = [replace(batch, pixels=torch.randint_like(batch.pixels, 256)) for batch in like]
    return itertools.repeat(noise)


def run_block(t: Trainer, source: Iterator[list], steps: int, flush: bool = True) -> list[dict]:
    """Run `WARM` + `steps` steps as engine.train, without hooks, log and checkpoints; returns the records of the last
    `steps`."""
    from fastssl.step import step

    records = []
    for micro_batches in itertools.islice(source, WARM + steps):
        step(t, micro_batches)
        records += t.meter.end_step(t.step)
    return (records + (t.meter.flush() if flush else []))[WARM:]


def summarise(t: Trainer, blocks: list[list[dict]]) -> dict:
    records, meter = [record for block in blocks for record in block], t.meter
    rates = [t.run.optim.batch * len(block) / sum(r["total_ms"] for r in block) * 1e3 for block in blocks]
    total = statistics.mean(r["total_ms"] for r in records)
    return {
        "images_per_s": spread(rates),
        "ms": {name: round(statistics.median(r[f"{name}_ms"] for r in records), 3) for name in COLUMNS},
        "steps": len(records),
        "mfu": round(statistics.mean(r["mfu"] for r in records), 4) if meter.flops else None,
        "gflop_per_rank": round(meter.flops / 1e9, 1) if meter.flops else None,
        "total_ms_mean": round(total, 3),
        "memory_gib": round(max(r["memory_gib"] for r in records), 2),
    }


def describe(t: Trainer) -> dict:
    run = t.run
    return {
        "config": run.name,
        "method": type(run.method).__module__.rsplit(".", 1)[-1],
        "backbone": run.backbone.name,
        "stem": run.backbone.stem,
        "view_sizes": [view.size for view in run.data.views],
        "ranks": dist.world(),
        "batch": run.optim.batch,
        "optimizer": run.optim.name,
        "precision": run.optim.precision,
        "zero": run.speed.zero,
        "micro_batch": run.speed.micro_batch,
        "workers": t.loader.workers,
        "resident": run.speed.resident,
        "channels_last": run.speed.channels_last,
        "compile": t.not_compiled is None,
        "graph": t.capturable_step is not None and t.capturable_step.reason is None,
        "kernels": run.speed.kernels,
        "samples": t.loader.samples,
        "mean_pixels": t.loader.card.mean_pixels,
    }


def report(run: Run, results: dict[str, dict]) -> None:
    print(
        f"\n{run.name}: batch {run.optim.batch}, {len(run.data.views)} views, {run.optim.precision}, "
        f"{dist.world()} rank(s), ZeRO {run.speed.zero}; median ms of a step"
    )
    print(f"{'':10}" + "".join(f"{name:>11}" for name in (*COLUMNS, "images/s", "from", "to", "MFU %", "GiB")))
    for name, r in results.items():
        rate, mfu = r["images_per_s"], "-" if r["mfu"] is None else f"{100 * r['mfu']:.1f}"
        cells = [f"{r['ms'][column]:.2f}" for column in COLUMNS]
        cells += [*(f"{rate[key]:.1f}" for key in ("median", "min", "max")), mfu, f"{r['memory_gib']:.2f}"]
        print(f"{name:10}" + "".join(f"{cell:>11}" for cell in cells))
    ratio = results["real"]["images_per_s"]["median"] / results["synthetic"]["images_per_s"]["median"]
    print(f"real data runs at {100 * ratio:.1f} % of the speed of synthetic data")


if __name__ == "__main__":
    sys.exit(main())
