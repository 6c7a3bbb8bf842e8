"""Compare SimCLR's step with other libraries': python bench/peers.py data/cifar10_train.beton [--batch 64]

lightly      its SimCLRTransform on PIL images, its NTXentLoss and LightlyDataset, torch's DataLoader
kornia       torch's DataLoader of uint8 images, views by kornia on the device, loss in plain PyTorch
torchvision  torchvision's transforms on PIL images, torch's DataLoader, loss in plain PyTorch

All train torchvision's ResNet-18 with a CIFAR stem and SimCLR's projector (configs/simclr/r18_cifar10_200ep.py with SGD
and bilinear crops), with equal batch, precision, memory format and process, and one loading thread or process per core,
in alternating blocks. Before, all make three steps from the same weights on the same views; if their losses differ,
nothing is timed. The others hold the decoded images in memory, as torchvision's CIFAR10 class does; ours decodes JPEGs
in every epoch, or holds the decoded set on the device with speed.resident=True.

Columns, median ms of a step: load (waiting for the next batch), views (if they are computed in the step), network
(forward, loss, backward; for a captured step also its views and its optimizer), rest (optimizer, logging). The last
columns are for loading and views without training. Libraries that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import ROOT, append, environment, parser_with_dry, spread
from peer_loops import Ours, Peer, decoded, kornia_peer, lightly_peer, torchvision_peer

from fastssl import config, dist
from fastssl.amp import DTYPES
from fastssl.config import Optim, Precision
from fastssl.loader import Loader
from fastssl.meters import Meter

CONFIG = ROOT / "configs/simclr/r18_cifar10_200ep.py"
COLUMNS = {
    "load": ("data",),
    "views": ("views",),
    "network": ("forward", "backward", "step"),
    "rest": ("optimizer", "other"),
}
CHECKED = 3  # steps
TOLERANCE = {"fp32": (1e-4, 1e-2), "fp16": (5e-3, 2e-2), "bf16": (2e-2, 5e-2)}  # of the first loss, of later ones


PEERS = {"lightly": lightly_peer, "kornia": kornia_peer, "torchvision": torchvision_peer}


def recipe(args: argparse.Namespace, more: list[str]) -> config.Run:
    """The Run of our side, with settings that the other libraries also have."""
    run = config.load(
        CONFIG,
        [
            f"data.train={args.data}",
            "data.test=none",
            "data.views.all.interpolation=bilinear",
            f"backbone.name={args.backbone}",
            f"speed.workers={max(1, args.workers)}",
        ],
    )
    run.sync_bn = False
    run.optim = Optim(name="sgd", lr=0.05, batch=args.batch, schedule="constant", precision=args.precision)
    for override in [*args.overrides, *more]:
        config.set_override(run, override)
    return run


def installed(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names of PEERS that can be imported, and {name: reason} of the others."""
    found, absent = [], {}
    for name in names:
        try:
            importlib.import_module({"kornia": "kornia.augmentation", "lightly": "lightly.data"}.get(name, name))
            found.append(name)
        except ImportError as error:
            absent[name] = str(error)
    return found, absent


def copy_weights(ours: Ours, peers: list[Peer]) -> None:
    """Copy our weights to the peers."""
    state = ours.t.method.state_dict()
    for peer in peers:
        for i, part in enumerate(("backbone.", "projector.")):
            peer.net[i].load_state_dict({k.removeprefix(part): v for k, v in state.items() if k.startswith(part)})


def check(sides: list, source: Iterator, precision: Precision) -> dict[str, list[float]]:
    """Losses of the first steps on the same views; ValueError if they differ."""
    losses: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(CHECKED):
        raw = next(source)
        views = [v.clone() for v in sides[0].make(raw)]
        for side in sides:
            losses[side.name].append(float(side.train(raw, Meter(sides[0].t.device, batch=1), views)))
    first = losses[sides[0].name]
    for name, values in losses.items():
        errors = [abs(a - b) / abs(b) for a, b in zip(values, first)]
        allowed = [TOLERANCE[precision][i > 0] for i in range(CHECKED)]  # rounding differences grow with each step
        if not all(a <= b for a, b in zip(errors, allowed)):
            raise ValueError(
                f"{name} has losses of {values}, ours are {first}: relative errors of up to {max(errors):.1g}, where "
                f"{allowed} are allowed, so nothing is timed"
            )
    return losses


def block(side: Ours | Peer, meter: Meter, steps: int, warm: int, train: bool) -> list[dict]:
    """Records of `steps` steps after `warm` others; without `train`, only of loading and views."""
    records = []
    with contextlib.closing(side.load()) as source:
        for i in range(warm + steps):
            with meter.phase("data"):
                raw = next(source)
            if train:
                side.train(raw, meter)
            else:
                with meter.phase("views"):
                    side.make(raw)
            records += meter.end_step(i)
        records += meter.flush()
    return [r for r in records if r["step"] >= warm]


def measure(sides: list, args: argparse.Namespace, deadline: float, device: torch.device) -> dict[str, dict]:
    kept: dict[str, dict] = {side.name: {True: [], False: []} for side in sides}
    for k in range(args.blocks):
        if k and time.perf_counter() > deadline:
            break  # after a whole round, so that all sides have the same number of blocks
        for side in sides[k % len(sides) :] + sides[: k % len(sides)]:  # each round starts with another side
            for train in (True, False):
                meter = Meter(device, batch=args.batch)
                warm = args.warm if train else max(2 * args.workers, args.warm)
                steps = args.steps if train else args.input_steps
                kept[side.name][train].append(block(side, meter, steps, warm, train))
    results = {}
    for name, (whole, alone) in ((name, kinds.values()) for name, kinds in kept.items()):
        records = [r for part in whole for r in part]
        results[name] = {
            "images_per_s": spread([rate(part, args.batch) for part in whole]),
            "ms": {
                column: round(statistics.median(sum(r[f"{p}_ms"] for p in phases) for r in records), 2)
                for column, phases in COLUMNS.items()
            },
            "input_images_per_s": spread([rate(part, args.batch) for part in alone]),
        }
    return results


def rate(records: list[dict], batch: int) -> float:
    return 1e3 * batch * len(records) / sum(r["total_ms"] for r in records)


def report(results: dict[str, dict], losses: dict[str, list[float]]) -> None:
    print(
        f"{'':14}{'images/s':>10}{'from':>9}{'to':>9}"
        + "".join(f"{c + ' ms':>12}" for c in COLUMNS)
        + f"{'input img/s':>13}{'from':>9}{'to':>9}  losses of the first steps"
    )
    for name, r in results.items():
        cells = "".join(f"{r['ms'][c]:12.2f}" for c in COLUMNS)
        whole, alone = (
            "".join(f"{r[key][k]:{w}.1f}" for k, w in (("median", first), ("min", 9), ("max", 9)))
            for key, first in (("images_per_s", 10), ("input_images_per_s", 13))
        )
        print(f"{name:14}{whole}{cells}{alone}  {', '.join(f'{x:.4f}' for x in losses[name])}")
    ours = results["ours"]
    for name, r in results.items():
        if not name.startswith("ours"):
            step, side = (ours[k]["median"] / r[k]["median"] for k in ("images_per_s", "input_images_per_s"))
            print(f"ours / {name}: whole step {step:.2f}, loading and views {side:.2f}")


def main(argv: list[str] | None = None, loader: Loader | None = None) -> int:
    """`loader`: the loader of our side, instead of one of the file."""
    parser = parser_with_dry(__doc__)
    parser.add_argument("data", help="a .beton file of images of one size")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="for our side: speed.resident=True")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="fp16" if torch.cuda.is_available() else "fp32", choices=list(DTYPES))
    parser.add_argument("--backbone", default="resnet18", help="resnet18, resnet34 or resnet50")
    parser.add_argument("--steps", type=int, default=30, help="counted steps of a block")
    parser.add_argument("--input-steps", type=int, default=30, help="the same, for loading and views")
    parser.add_argument("--warm", type=int, default=6, help="first steps of a block, not counted")
    parser.add_argument("--blocks", type=int, default=4, help="of each side")
    parser.add_argument(
        "--seconds", type=float, default=400, help="time limit after which no round of blocks is started"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="loading threads of ours and loading processes of the others (one a core)",
    )
    args = parser.parse_intermixed_args(argv)
    deadline = time.perf_counter() + args.seconds
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    found, absent = installed(args.peers)
    for name, why in absent.items():
        print(f"{name} is left out: {why}")
    try:
        env = environment("torchvision", "deepspeed", "ffcv")
        for name in found:
            with contextlib.suppress(PackageNotFoundError):
                env["versions"][name] = version(name)
        kinds: dict[str, list[str]] = {"ours": []}
        if torch.cuda.is_available():
            kinds = {"ours": ["speed.graph=on"], "ours, no graph": ["speed.graph=off"]}
        ours = [Ours(name, recipe(args, more), loader) for name, more in kinds.items()]
        t = ours[0].t
        images = decoded(t.loader)
        peers = [PEERS[name](t.run, t.device, images, args.workers) for name in found]
        copy_weights(ours[0], peers)
        losses = check([*ours, *peers], ours[0].load(), args.precision)
        results = measure([*ours, *peers], args, deadline, t.device)
    except ValueError as error:
        print(f"bench/peers.py: {error}", file=sys.stderr)
        return 2
    finally:
        dist.shutdown()
    report(results, losses)
    if not args.dry:
        facts = {name: getattr(args, name) for name in ("backbone", "batch", "precision", "workers", "overrides")}
        facts |= {"data": Path(args.data).name, "threads": torch.get_num_threads()}
        facts |= {"load_after": round(os.getloadavg()[0], 1)}
        where = append("peers", env, **facts, sides=results, losses=losses, left_out=sorted(absent))
        print(f"appended to {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
