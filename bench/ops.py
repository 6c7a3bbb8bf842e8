"""Time the fused kernels, eager PyTorch, torch.compile, chunked matmuls, and other libraries if installed:
python bench/ops.py [OP ...] [--json] [--resume]

Each case is first compared with float64 (error at most twice plain PyTorch's).  A case that fails is not timed, and the
exit status is 1.  Times are those of the GPU in 50 replays of a CUDA graph of loss and gradient, with warm and cold L2
cache.  Appends one result line per op to bench/results; --resume skips ops with a result of this commit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import append, device_name, environment, parser_with_dry, results_file
from ops_compared import OPS, Op

REPETITIONS = 50
SECONDS = 500  # time limit; --resume measures the remaining ops
PEAKS = {"h200": (790e12, 4.3e12), "h100": (790e12, 2.9e12)}  # attainable dense half-precision operations/s and bytes/s


def captured(f: Callable[[], Any]) -> tuple[Callable[[], Any], Any, bool]:
    """Capture f in a CUDA graph, so that Python is not timed: (replay, tensors to keep alive, True).

    (f, None, False) if f cannot be captured.  A function that waits for the device is detected before, because a failed
    capture leaves the allocator in a bad state.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        f()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return f, None, False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = f()
    except RuntimeError:
        torch.cuda.synchronize()
        return f, None, False
    return graph.replay, kept, True


def microseconds(run: Callable[[], Any], cold: bool) -> dict[str, float]:
    scratch = torch.empty(256 << 20 if cold else 0, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPETITIONS)]
    for start, stop in events:
        if cold:
            scratch.zero_()  # larger than any L2 cache
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * a.elapsed_time(b) for a, b in events)
    tenth = REPETITIONS // 10
    return {
        "median": round(statistics.median(times), 2),
        "p10": round(times[tenth], 2),
        "p90": round(times[-1 - tenth], 2),
        "n": REPETITIONS,
    }


def measure(op: Op, case: Any) -> dict[str, Any]:
    """Errors and times of each implementation, or the message as "red" if the check fails."""
    row: dict[str, Any] = {
        "case": {k: str(v) for k, v in (case._asdict() if hasattr(case, "_asdict") else vars(case)).items()}
    }
    try:
        row["errors"] = op.check(case)
    except AssertionError as error:
        return row | {"red": str(error)}
    operations, nbytes = op.work(case)
    peak = next((v for k, v in PEAKS.items() if k in device_name()), None)
    row["ways"] = {}
    for name, f in op.implementations(case).items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        try:
            run, kept, graph = captured(f)
            result: dict[str, Any] = {
                "warm_us": microseconds(run, False),
                "cold_us": microseconds(run, True),
                "graph": graph,
            }
        except torch.cuda.OutOfMemoryError:
            row["ways"][name] = {"none": "does not fit in memory"}
            continue
        except Exception as error:  # other projects may not support a case
            if name == "ours":
                raise
            row["ways"][name] = {"none": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        del run, kept
        seconds = result["warm_us"]["median"] * 1e-6
        result["extra_mb"] = round((torch.cuda.max_memory_allocated() - base) / 1e6, 1)
        if operations:
            result["tflops"] = round(operations / seconds / 1e12, 1)
        result["gb_s"] = round(nbytes / seconds / 1e9, 1)
        if peak:
            bound = max((operations or 0) / peak[0], nbytes / peak[1])
            result["of_bound"] = round(bound / seconds, 3)
        row["ways"][name] = result
    if case in op.targets:
        row["target_us_h200"] = op.targets[case]
    return row


def show(name: str, row: dict[str, Any]) -> None:
    print(f"\n{name} {' '.join(f'{k}={v}' for k, v in row['case'].items())}")
    if "red" in row:
        print(f"  not timed, the result is wrong: {row['red']}")
        return
    print("  errors against fp64: " + ", ".join(f"{k} {v:.2g}" for k, v in row["errors"].items()))
    for name, r in row["ways"].items():
        if "none" in r:
            print(f"  {name:18} {r['none']}")
            continue
        warm, cold = r["warm_us"], r["cold_us"]
        rate = f"{r['tflops']:.0f} TFLOP/s" if "tflops" in r else f"{r['gb_s']:.0f} GB/s"
        bound = f"{100 * r['of_bound']:.0f} % of the bound" if "of_bound" in r else "bound unknown for this device"
        print(
            f"  {name:18} {warm['median']:10.1f} us ({warm['p10']} to {warm['p90']}), cold {cold['median']:.1f} us, "
            f"{rate}, {bound}, {r['extra_mb']:.0f} MB" + ("" if r["graph"] else ", not in a graph")
        )
    if "target_us_h200" in row:
        print(f"  target on an H200: {row['target_us_h200']} us")


def measured_ops(env: dict) -> set:
    path = results_file(env)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["op"] for line in lines if line["bench"] == "kernels" and line["commit"] == env["commit"]}


def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--json", action="store_true", help="print result lines instead of a table")
    parser.add_argument("--resume", action="store_true", help="skip ops with a result of this commit on this device")
    args = parser.parse_args()
    unknown = set(args.ops) - set(OPS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; choose from {', '.join(OPS)}")
    if not torch.cuda.is_available():
        print("bench/ops.py needs a CUDA device: nothing was measured.")
        return 2
    start = time.perf_counter()
    env = environment("triton")
    done = measured_ops(env) if args.resume else set()
    red = False
    for name in args.ops or OPS:
        if name in done:
            continue
        rows = []
        for case in OPS[name].cases:
            if time.perf_counter() - start > SECONDS:
                break
            rows.append(measure(OPS[name], case))
            red = red or "red" in rows[-1]
            print(json.dumps({"op": name, **rows[-1]})) if args.json else show(name, rows[-1])
            torch._dynamo.reset()
        if len(rows) < len(OPS[name].cases):
            print(f"time limit of {SECONDS} s reached at {name}: continue with --resume", file=sys.stderr)
            break
        if not args.dry:
            append("kernels", env, op=name, rows=rows)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
