"""ODC's and NPID's memory banks compared with OpenSelfSup's algorithms, in one run:  python bench/banks.py

centroids   ODC's update of all centroids, every ten steps.  Published: sort the labels, then a Python loop that gathers
            each cluster's rows.  Ours: update the clusters' sums in ten steps, then divide; also the means computed
            from scratch, as in k-means
odc step    ODC's update of its bank after a step.  Published: the same on the CPU, with two counts of all labels
npid loss   forward and backward.  Published: draws from an alias table, and all negatives gathered into one tensor.
            Ours: with separate negatives for each sample, and with one set for all
Both sides have the same data and threads.  The published algorithms are implemented again here, on the CPU as there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from common import append, environment, parser_with_dry, spread

from fastssl.kernels import update_centroids_
from fastssl.loader import Batch
from fastssl.methods import npid, odc
from fastssl.trainer import Context

CLUSTERS = 10_000


def main() -> None:
    parser = parser_with_dry(__doc__)
    parser.add_argument("--rows", type=int, default=1_281_167, help="samples of the data set")
    parser.add_argument("--negatives", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of our side")
    args = parser.parse_args()
    env = environment("numpy", "triton")
    torch.manual_seed(0)
    for name, make in {"centroids": centroids, "odc step": odc_step, "npid loss": npid_loss}.items():
        times = {side: spread(timed(run, args), 2) for side, run in make(args).items()}
        result = {"rows": args.rows, "threads": torch.get_num_threads(), "ours_on": args.device, "ms": times}
        print(f"\n{name}")
        for side, ms in result["ms"].items():
            ratio = result["ms"]["published"]["median"] / ms["median"]
            print(
                f"  {side:22}{ms['median']:12.2f} ms ({ms['min']:.2f} to {ms['max']:.2f}, n={ms['n']})"
                f"{ratio:10.1f} times as fast as published"
            )
        if not args.dry:
            append(name, env, **result)


def timed(run: Callable[[], object], args: argparse.Namespace) -> list[float]:
    """Milliseconds of each repetition, after one for warm-up."""
    out = []
    for _ in range(args.repeats + 1):
        start = clock(args.device)
        run()
        out.append(1e3 * (clock(args.device) - start))
    return out[1:]


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def directions(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def check_equal(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    error = float((ours.cpu() - theirs).abs().max())
    if not error < bound:
        raise SystemExit(f"bench/banks.py: the results of {name} differ by {error:.1e}, so nothing is timed")


def odc_method(args: argparse.Namespace, batch: int) -> odc.ODC:
    backbone = torch.nn.Identity()
    backbone.dim = 2048
    method = odc.Config(clusters=CLUSTERS).build(backbone, Context(args.rows, batch))
    method.bank.load_(directions(args.rows, 256))
    method.labels.copy_(torch.randperm(args.rows) % CLUSTERS)
    method.to(args.device).recount()
    method.update_centroids()
    return method


def centroids(args: argparse.Namespace, batch: int = 512) -> dict:
    method = odc_method(args, batch)
    bank, labels, theirs = method.bank.local_rows.cpu(), method.labels.cpu(), torch.zeros(CLUSTERS, 256)
    steps = torch.randperm(args.rows)[: 10 * batch].view(10, batch).to(args.device)

    def published() -> None:
        order = np.argsort(labels.numpy())
        edges = np.searchsorted(labels.numpy()[order], np.arange(CLUSTERS + 1))
        for k in range(CLUSTERS):
            if edges[k + 1] > edges[k]:
                theirs[k] = bank[order[edges[k] : edges[k + 1]], :].mean(dim=0)

    def ours() -> None:
        for index in steps:
            x = method.bank.lookup(index)
            method.move(index, method.labels[index], x, x)
        method.update_centroids()

    published()

    def from_scratch() -> None:
        update_centroids_(method.centroids, method.bank.local_rows, method.labels)

    for run in (ours, from_scratch):
        method.centroids.zero_()
        run()
        check_equal("centroids", method.centroids, theirs, 1e-6)
    return {"published": published, "ours": ours, "ours, from scratch": from_scratch}


def batch_of(index: torch.Tensor) -> Batch:
    """A batch of these samples, whose pixels are not read."""
    nothing = index.new_empty(0)
    return Batch(nothing, nothing, index, nothing, epoch=0, step=0)


def odc_step(args: argparse.Namespace, batch: int = 512) -> dict:
    method = odc_method(args, batch)
    bank, labels, means = (t.cpu().clone() for t in (method.bank.local_rows, method.labels, method.centroids))
    index, z = torch.randperm(args.rows)[:batch], torch.randn(batch, 256)
    given = batch_of(index.to(args.device))  # of step 0, in which the centroids are not updated
    out = {"z": z.to(args.device)}

    def published() -> None:
        mixed = 0.5 * bank[index] + 0.5 * z / (z.norm(dim=1, keepdim=True) + 1e-10)
        bank[index] = mixed / (mixed.norm(dim=1, keepdim=True) + 1e-10)
        labels[index] = torch.mm(means, bank[index].T).argmax(0)
        assert not (np.bincount(labels.numpy(), minlength=CLUSTERS) < 20).any(), "no cluster is too small"
        counts = np.bincount(labels.numpy(), minlength=CLUSTERS) + 1e-5
        weights = 1 / np.sqrt(counts)
        torch.from_numpy(weights / weights.sum())

    published()
    method.after_step(out, given, 0.0)
    check_equal("odc step", method.bank.local_rows, bank, 1e-5)
    return {"published": published, "ours": lambda: method.after_step(out, given, 0.0)}


def npid_loss(args: argparse.Namespace, batch: int = 32, dim: int = 128, temperature: float = 0.07) -> dict:
    backbone = torch.nn.Identity()
    backbone.dim = dim
    config = npid.Config(negatives=args.negatives, temperature=temperature)
    methods = {
        name: replace(config, shared=shared).build(backbone, Context(args.rows, batch))
        for name, shared in (("ours", False), ("ours, shared negatives", True))
    }
    bank = directions(args.rows, dim)
    for method in methods.values():
        method.to(args.device).bank.copy_(bank)
    z = torch.randn(batch, dim, requires_grad=True)
    index = torch.randperm(args.rows)[:batch]
    given = batch_of(index.to(args.device))
    probability, alias = torch.ones(args.rows), torch.zeros(args.rows, dtype=torch.int64)  # of a uniform distribution

    def published(drawn: torch.Tensor | None = None) -> torch.Tensor:
        if drawn is None:
            pick = torch.randint(args.rows, (batch * args.negatives,))
            keep = torch.bernoulli(probability.index_select(0, pick)).to(torch.int64)
            drawn = pick * keep + alias.index_select(0, pick) * (1 - keep)
        q = F.normalize(z, dim=1)
        negatives = bank.index_select(0, drawn.flatten()).view(batch, args.negatives, dim)
        near = torch.einsum("nc,nc->n", bank.index_select(0, index), q)[:, None]
        far = torch.bmm(negatives, q[:, :, None]).squeeze(2)
        logits = torch.cat([near, far], 1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64))
        loss.backward()
        return loss.detach()

    def ours(method: npid.NPID) -> torch.Tensor:
        loss = method.loss({"z": z.to(args.device)}, given)["loss"]
        loss.backward()
        return loss.detach()

    check_equal("npid loss", ours(methods["ours"]), published(methods["ours"].draw_negatives(given).cpu()), 1e-4)
    return {"published": published, **{name: lambda m=method: ours(m) for name, method in methods.items()}}


if __name__ == "__main__":
    main()
