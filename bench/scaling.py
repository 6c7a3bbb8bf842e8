"""Measure scaling over ranks and the cost of communication: python bench/scaling.py CONFIG [a.b=value ...] [--ranks 1 2
4]

weak    the config's batch on every rank: the global batch grows with the number of ranks strong  the config's batch
divided over the ranks The engine's step runs on random pixels on the device, over gloo on CPUs and NCCL on GPUs (at
most one rank per GPU). The time and the bytes of every collective are measured in separate steps, in which each starts
after the one before it has ended. A model extrapolates the step to 512 ranks, from the bytes of one step and the
latency and bandwidth of all-reduces between these ranks; its assumptions are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from common import append, environment, parser_with_dry

KINDS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
ASSUMPTIONS = """assumptions of the model:
  a step is the weak step of one rank and, after it, its communication: nothing overlaps
  an all-reduce of n bytes on W ranks takes 2 (W - 1) / W n / bandwidth and 2 (W - 1) latencies (a ring); an all-gather
    or a reduce-scatter moves (W - 1) times a rank's n bytes with W - 1 latencies, a broadcast n bytes with W - 1
  bytes of all-reduces do not depend on W; those that a rank gives to a gather or a scatter follow its own batch
  the loss of the larger global batch, stragglers, and links shared with other jobs cost nothing
  latency and bandwidth are {source}: {latency_us:.1f} us a hop, {gb_s:.2f} GB/s a rank"""


@contextlib.contextmanager
def recorded(device: torch.device) -> Iterator[list[tuple[str, int, float]]]:
    """Context manager: yields a list that receives (collective, bytes sent by this rank, milliseconds) of each call."""
    found, real = [], {name: getattr(td, name) for name in KINDS}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def wrap(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[1] if name in ("all_gather_into_tensor", "reduce_scatter_tensor") else args[0]
            share = td.get_world_size() if name == "reduce_scatter_tensor" else 1
            wait()
            start = time.perf_counter()
            out = real[name](*args, **kwargs)
            if out is not None:  # asynchronous
                out.wait()
            wait()
            found.append((name, given.nbytes // share, (time.perf_counter() - start) * 1e3))
            return out

        return call

    for name in KINDS:
        setattr(td, name, wrap(name))
    try:
        yield found
    finally:
        for name, function in real.items():
            setattr(td, name, function)


def worker(out: Path, kind: str, args: argparse.Namespace) -> None:
    """Run one rank of a measurement; rank 0 writes the result to `out`."""
    import step as bench_step

    from fastssl import config, dist

    device = dist.init()
    run = config.load(args.config, args.overrides)
    run.optim.batch *= dist.world() if kind == "weak" else 1
    t = bench_step.build(run)
    source = bench_step.synthetic_batches(next(bench_step.real_batches(t)))
    records = bench_step.run_block(t, source, args.steps)
    if t.capturable_step is not None:
        t.capturable_step.reason = "bench/scaling.py times its collectives"  # a replay would not call them
    with recorded(device) as found:
        bench_step.run_block(t, source, args.steps)
        calls = found[len(found) * bench_step.WARM // (bench_step.WARM + args.steps) :]
    result = {
        "ranks": dist.world(),
        "kind": kind,
        "batch": run.optim.batch,
        "ms": statistics.median(r["total_ms"] for r in records),
        "communication_ms": sum(ms for *_, ms in calls) / args.steps,
        "collectives": per_step(calls, args.steps),
        **(link(device) if dist.world() > 1 else {}),
    }
    if dist.is_main():
        out.write_text(json.dumps(result))
    dist.shutdown()


def per_step(calls: list[tuple], steps: int) -> dict[str, dict]:
    """Number of calls and bytes sent by a rank in one step, by collective."""
    out = {}
    for name in KINDS:
        sizes = [size for kind, size, _ in calls if kind == name]
        if sizes:
            out[name] = {"calls": round(len(sizes) / steps, 2), "bytes": round(sum(sizes) / steps)}
    return out


def link(device: torch.device, large: int = 16 << 20) -> dict:
    """Latency per hop and bandwidth per rank, from all-reduces of 4 bytes and of `large` bytes."""
    world, times = td.get_world_size(), []
    for size in (4, large):
        x, took = torch.zeros(size // 4, device=device), []
        for _ in range(12):
            with recorded(device) as found:
                td.all_reduce(x)
            took.append(found[0][2])
        times.append(statistics.median(took[2:]) / 1e3)
    hops, moved = 2 * (world - 1), 2 * (world - 1) / world * large
    return {"latency_us": times[0] / hops * 1e6, "gb_s": moved / max(times[1] - times[0], 1e-9) / 1e9}


def communication_ms(collectives: dict[str, dict], ranks: int, latency_us: float, gb_s: float) -> float:
    """Communication time of one step by the model; see ASSUMPTIONS."""
    total, hops = 0.0, ranks - 1
    for name, c in collectives.items():
        moved = {"all_reduce": 2 * hops / ranks, "broadcast": 1.0 if hops else 0.0}.get(name, hops) * c["bytes"]
        total += moved / (gb_s * 1e9) + c["calls"] * (2 if name == "all_reduce" else 1) * hops * latency_us * 1e-6
    return total * 1e3


def model(found: list[dict], latency_us: float, gb_s: float, max_ranks: int = 512) -> list[dict]:
    """Weak scaling on 1 to `max_ranks` ranks, from the step of the fewest ranks measured and the bytes of the most."""
    weak = [r for r in found if r["kind"] == "weak"]
    one, many = min(weak, key=lambda r: r["ranks"]), max(weak, key=lambda r: r["ranks"])
    rows = []
    for ranks in (1 << i for i in range(max_ranks.bit_length())):
        sent = communication_ms(many["collectives"], ranks, latency_us, gb_s)
        total = one["ms"] + sent
        rows.append({"ranks": ranks, "ms": total, "communication": sent / total, "efficiency": one["ms"] / total})
    return rows


def measure(kind: str, ranks: int, seconds: float) -> dict:
    """The result of this command's `worker` on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*torchrun, *sys.argv, "--worker", kind, str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            raise ValueError(f"{kind}, {ranks} ranks: not finished within --seconds; give more") from None
        if done.returncode or not out.exists():
            errors = [line for line in done.stderr.splitlines() if "rror" in line and "ChildFailed" not in line]
            last = (errors or done.stderr.splitlines() or ["no output"])[-1]
            raise ValueError(f"{kind}, {ranks} ranks: {last[:300]}")
        return json.loads(out.read_text())


def report(found: list[dict]) -> None:
    print(
        f"{'':8}{'ranks':>6}{'batch':>8}{'ms a step':>11}{'images/s':>10}{'of ideal':>10}{'communication ms':>18}"
        f"{'of the step':>13}{'calls':>7}{'MB sent':>10}"
    )
    for r in found:
        one = next(x for x in found if x["kind"] == r["kind"])
        ideal = one["ms"] * (1 if r["kind"] == "weak" else one["ranks"] / r["ranks"])
        share = 100 * r["communication_ms"] / r["ms"]
        calls, size = (sum(c[key] for c in r["collectives"].values()) for key in ("calls", "bytes"))
        print(
            f"{r['kind']:8}{r['ranks']:6}{r['batch']:8}{r['ms']:11.1f}{1e3 * r['batch'] / r['ms']:10.1f}"
            f"{100 * ideal / r['ms']:8.0f} %{r['communication_ms']:18.2f}{share:11.1f} %"
            f"{calls:7.1f}{size / 1e6:10.2f}"
        )


def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("config", help="a config file; its optim.batch is that of one rank in weak scaling")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a measurement")
    parser.add_argument("--seconds", type=float, default=400, help="of all measurements together")
    parser.add_argument(
        "--link",
        type=float,
        nargs=2,
        metavar=("US", "GB_S"),
        help="latency and bandwidth a rank for the model, instead of those measured here",
    )
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if args.worker:
        worker(Path(args.worker[1]), args.worker[0], args)
        return 0
    deadline, env = time.perf_counter() + args.seconds, environment("deepspeed")
    max_ranks = torch.cuda.device_count() if torch.cuda.is_available() else max(args.ranks)
    try:
        ranks = sorted({r for r in args.ranks if r <= max_ranks})
        if not ranks:
            raise ValueError(f"--ranks {' '.join(map(str, args.ranks))}: this machine has {max_ranks} GPUs")
        found = [measure(kind, r, deadline - time.perf_counter()) for kind in ("weak", "strong") for r in ranks]
    except ValueError as error:
        print(f"bench/scaling.py: {error}", file=sys.stderr)
        return 2
    report(found)
    if not torch.cuda.is_available() and max(ranks) > env["cores"]:
        print(f"{max(ranks)} ranks share {env['cores']} cores: their times do not show those of {max(ranks)} devices")
    latency, gb_s = args.link or (found[len(ranks) - 1].get("latency_us"), found[len(ranks) - 1].get("gb_s"))
    rows = []
    if latency is None or gb_s is None:
        print("no model: with one rank there is no communication to measure; give --link US GB_S")
    else:
        source = "given by --link" if args.link else f"measured between {ranks[-1]} ranks here"
        rows = model(found, latency, gb_s)
        print("\n" + ASSUMPTIONS.format(source=source, latency_us=latency, gb_s=gb_s))
        print(f"{'ranks':>8}{'ms a step':>12}{'communication':>16}{'efficiency':>13}   (model, not measured)")
        for r in rows:
            print(f"{r['ranks']:8}{r['ms']:12.1f}{100 * r['communication']:14.1f} %{100 * r['efficiency']:11.1f} %")
    if not args.dry:
        facts = {"config": str(Path(args.config).name), "overrides": args.overrides, "steps": args.steps}
        print(f"appended to {append('scaling', env, **facts, measured=found, link=[latency, gb_s], model=rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
