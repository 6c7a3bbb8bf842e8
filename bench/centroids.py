"""ODC's means of all clusters against the algorithm of its published code, in one run:  python bench/centroids.py

Published: sort the labels, then a Python loop over the clusters that gathers the rows of each and takes their mean.
Both get the same bank, labels and threads; the loop is timed over all clusters unless --loop-clusters says fewer, and
its time is then scaled up by rows.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from common import append, environment

from fastssl.kernels import centroids_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--loop-clusters", type=int, help="time the published loop over so many clusters only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="do not append to bench/results")
    args = parser.parse_args()
    env = environment("numpy", "triton")
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(args.rows, args.dim), dim=1)
    labels = torch.randint(args.clusters, (args.rows,))
    theirs = torch.zeros(args.clusters, args.dim)
    ours = torch.zeros_like(theirs).to(args.device)
    moved = bank.to(args.device), labels.to(args.device)

    times = []
    for _ in range(args.repeats + 1):  # the first one warms up
        start = clock(args.device)
        centroids_(ours, *moved)
        times.append(clock(args.device) - start)
    counted = args.loop_clusters or args.clusters
    sort_s, loop_s, rows = published(theirs, bank, labels, counted)
    loop_s *= args.rows / rows
    error = float((ours.cpu()[:counted] - theirs[:counted]).abs().max())
    if error > 1e-6:
        raise SystemExit(f"bench/centroids.py: the two differ by {error:.1e}; no times")
    ms = [1e3 * t for t in times[1:]]
    result = {"rows": args.rows, "dim": args.dim, "clusters": args.clusters, "threads": torch.get_num_threads(),
              "ours_on": args.device, "published_on": "cpu", "loop_clusters": counted,
              "published_ms": {"sort": round(1e3 * sort_s), "loop": round(1e3 * loop_s)},
              "ours_ms": {"median": round(statistics.median(ms), 1), "min": round(min(ms), 1),
                          "max": round(max(ms), 1), "n": len(ms)},
              "times_faster": round(1e3 * (sort_s + loop_s) / statistics.median(ms), 1),
              "largest_difference": error}  # fmt: skip
    for name, value in result.items():
        print(f"{name:20} {value}")
    if not args.dry:
        print(f"appended to {append('centroids', env, **result)}")


def published(centroids, bank, labels, clusters: int) -> tuple[float, float, int]:
    """Seconds for the sort and for the loop over the first `clusters`, and how many rows those have."""
    start = time.perf_counter()
    order = np.argsort(labels.numpy())
    ordered = labels.numpy()[order]
    edges = np.searchsorted(ordered, np.arange(clusters + 1))
    sort_s = time.perf_counter() - start
    start = time.perf_counter()
    for k in range(clusters):
        if edges[k + 1] > edges[k]:
            centroids[k] = bank[order[edges[k] : edges[k + 1]], :].mean(dim=0)
    return sort_s, time.perf_counter() - start, int(edges[-1])


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
