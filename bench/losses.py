"""Compare the losses of two settings over the same steps:
python bench/losses.py configs/simclr/r18_cifar10_200ep.py speed.compile=off speed.compile=on [a.b=value ...]

A and B are each a list of settings (speed.graph=on,speed.compile=on).  Both start from the same weights and take the
same images; `log.probe=True`, as in most configs, adds the online probe and its loss.  The verdict is

- "bits": all losses are the same numbers;
- "rounding": the first loss differs by at most 2^-9 of it, and the means of WINDOW steps by at most twice as much
  (root mean square over the windows) as those of A once more, with its initial weights rounded to half precision;
- "different".

The result line also has the ms of a step of A and B.  `speed.compile=auto` and `speed.graph=auto` may become "on" where
there are such lines: docs/measure.md.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
import time

import step as bench_step
import torch
from common import append, environment, one_line_errors, parser_with_dry

from fastssl import config

WINDOW = 50
FIRST = 2**-9  # relative difference of the first losses
LOSSES = ("loss", "probe_loss")


@one_line_errors
def main() -> int:
    parser = parser_with_dry(__doc__)
    parser.add_argument("config", help="a config file")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for both")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_intermixed_args()
    sides = {"a": args.a.split(","), "b": args.b.split(",")}
    if args.steps < 2 * WINDOW:
        raise ValueError(f"--steps {args.steps}: give at least {2 * WINDOW}, two windows of {WINDOW}")
    env = environment("triton", "deepspeed")
    losses: dict[str, dict] = {}
    ms: dict[str, float] = {}
    facts: dict = {}
    for name, settings in sides.items():
        losses[name], ms[name], facts = train(args.config, [*args.overrides, *settings], args.steps)
        print(f"{name}: {', '.join(settings)}: {ms[name]:.2f} ms a step, {summary(losses[name])}", flush=True)
    result = verdict(losses["a"], losses["b"])
    if result["verdict"] != "bits":
        rounded, _, _ = train(args.config, [*args.overrides, *sides["a"]], args.steps, rounded=True)
        print(f"a, weights rounded: {summary(rounded)}", flush=True)
        result = verdict(losses["a"], losses["b"], rounded)
    if not args.dry:
        where = append("losses", env, **facts, **sides, steps=args.steps, ms_a_step=ms, **result)
        print(f"appended to {where}")
    print(f"{result}\nverdict: {result['verdict']}, {ms['a']:.2f} and {ms['b']:.2f} ms a step")
    return int(result["verdict"] == "different")


def train(file: str, overrides: list[str], steps: int, rounded: bool = False) -> tuple[dict, float, dict]:
    """The losses by name, ms of a step in the second half, and what bench/step.py records of a trainer.  `rounded`:
    round the initial weights to half precision."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from fastssl import engine, hooks  # after the variable is set: DeepSpeed reads it when it is imported
    from fastssl.step import step

    run = config.load(file, overrides)
    run.optim.steps = 10**9
    torch._dynamo.reset()
    t = engine.build(run, [hooks.LinearProbe()] if run.log.probe else [])
    if rounded:
        with torch.no_grad():
            for p in t.method.parameters():
                p.copy_(p.half())
    found, wait = [], torch.cuda.synchronize if t.device.type == "cuda" else lambda: None
    for i, (_, micro_batches) in enumerate(itertools.islice(engine.batches(t), steps)):
        if i == steps // 2:
            wait()
            begin = time.perf_counter()
        step(t, micro_batches)
        t.meter.end_step(t.step)
        found.append({name: t.scalars[name] for name in LOSSES if name in t.scalars})
    wait()
    ms = (time.perf_counter() - begin) / (steps - steps // 2) * 1e3
    losses = {name: [float(each[name]) for each in found] for name in found[0]}
    facts = bench_step.describe(t)
    del t, found
    gc.collect()  # the trainer is in cycles, and the next one needs its memory
    return losses, round(ms, 3), facts


def verdict(a: dict, b: dict, rounded: dict | None = None) -> dict:
    """See the top of this file.  `rounded`: the losses of A with rounded weights, needed unless all are equal."""
    if a == b:
        return {"verdict": "bits"}
    first = max(abs(a[name][0] - b[name][0]) / abs(a[name][0]) for name in a)
    apart = {name: distance(a[name], b[name]) for name in a}
    if rounded is None:
        return {"verdict": "different", "first": first, "apart": apart}
    allowed = {name: 2 * distance(a[name], rounded[name]) for name in a}
    close = first <= FIRST and all(apart[name] <= allowed[name] for name in a)
    return {"verdict": "rounding" if close else "different", "first": first, "apart": apart, "allowed": allowed}


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square, over the whole windows, of the difference of their means."""
    means = [[sum(x[i : i + WINDOW]) / WINDOW for i in range(0, len(x) - WINDOW + 1, WINDOW)] for x in (a, b)]
    return math.sqrt(sum((u - v) ** 2 for u, v in zip(*means)) / len(means[0]))


def summary(losses: dict) -> str:
    return ", ".join(f"{name} {x[0]:.6g} to {sum(x[-WINDOW:]) / WINDOW:.6g}" for name, x in losses.items())


if __name__ == "__main__":
    sys.exit(main())
