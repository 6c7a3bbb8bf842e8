"""Convert, pretrain and evaluate scikit-learn's digits, without a download.

Pretrains with DeepSpeed on the machine's GPUs or CPU, and compares raw pixels, the untrained network and the trained
one.  With all labels, raw pixels already do well; with few labels, pretraining shows.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl import backbones, config, data_prep, dist, options, pictures, rendezvous, train, weights
from fastssl.checkpoint import run_folder
from fastssl.eval import knn
from fastssl.eval.common import features
from fastssl.eval.common.search import nearest
from fastssl.eval.linear.probe import linear_probe
from fastssl.loader import Loader
from fastssl.sampler import Sampler

SCRIPTS = (Path(train.__file__), config.quickstart())
DRAWS = 20  # of few labelled images; their accuracies are averaged


def main(argv: list[str] | None = None) -> int:
    args = options.parse("quickstart", argv)
    start = time.time()
    try:
        run = config.load(config.quickstart(), args.overrides)
        convert(run)
        pretrain(run, args.overrides)
        report(run)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"fastssl quickstart: {error}", file=sys.stderr)
        return 2
    finally:
        dist.shutdown()
    print(f"\n{time.time() - start:.0f} s in all.  Next: fastssl convert --help, and configs/ for real recipes.")
    return 0


def files(run: config.Run) -> tuple[str, str]:
    """data.train and data.test, both of which are needed here."""
    if not run.data.train or not run.data.test:
        raise ValueError(f"data.train={run.data.train!r}, data.test={run.data.test!r}: quickstart needs both")
    return run.data.train, run.data.test


def convert(run: config.Run) -> None:
    for split, out in zip(("train", "test"), files(run)):
        if not Path(out).exists():
            print(f"\n$ fastssl convert digits {split} {out}", flush=True)
            if data_prep.main(["digits", split, out]):
                raise ValueError("conversion failed")


def pretrain(run: config.Run, overrides: list[str]) -> None:
    limit = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    count = max(n for n in range(1, limit + 1) if run.optim.batch % n == 0)
    scripts = [os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path) for path in SCRIPTS]
    command = ["--quiet", "--num_gpus", str(count), *scripts, *overrides, "--continue"]
    variables = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env = {**variables, **os.environ}
    print("\n$", shlex.join([*(f"{key}={env[key]}" for key in variables), "deepspeed", *command]), flush=True)
    port = str(rendezvous.free_port())  # DeepSpeed's default, 29500, may be in use by another run
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port]
    subprocess.run([*launcher, *command], env=env, check=True)


def report(run: config.Run) -> None:
    """Print the comparison and draw the picture."""
    device = dist.init()
    loaders = [Loader(path, 256, Sampler.sequential(), device=device) for path in files(run)]
    torch.manual_seed(run.seed)
    untrained, trained = backbones.build(run.backbone), backbones.build(run.backbone)
    folder = run_folder.path(run)
    weights.load_backbone(folder, trained)
    networks = {
        "raw pixels": features.Pixels(run.data.eval_view.size),
        "untrained network": untrained,
        "trained, without labels": trained,
    }
    print(
        f"\n{'accuracy in %':26}{'1 label a class':>18}{'5 labels a class':>18}{'kNN, all labels':>18}"
        f"{'linear, all labels':>20}"
    )
    for name, network in networks.items():
        bank, test = (extract(network.to(device), loader, run) for loader in loaders)
        sets = *bank, *test
        few = [sum(few_labels(*sets, count, seed) for seed in range(DRAWS)) / DRAWS for count in (1, 5)]
        knn_top1 = knn.knn(*sets, k=(10,))["results"][0]["top1"]
        probe = linear_probe(*sets)["results"][0]["top1"]
        print(f"{name:26}{few[0]:18.1f}{few[1]:18.1f}{knn_top1:18.1f}{probe:20.1f}", flush=True)
    picture = folder / "quickstart.png"
    draw(picture, loaders, trained, run)
    print(f"\nviews and nearest neighbours: {picture}")


def extract(network: nn.Module, loader: Loader, run: config.Run) -> tuple[Tensor, Tensor]:
    return features.extract(features.Extractor(network, run.data.eval_view), loader)


def few_labels(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, count: int, seed: int) -> float:
    """Accuracy of the nearest neighbour among `count` random labelled images of each class."""
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed)).to(bank.device)
    pick = torch.cat([order[bank_labels[order] == c][:count] for c in bank_labels.unique()])
    return knn.knn(bank[pick], bank_labels[pick], queries, labels, k=(1,))["results"][0]["top1"]


def draw(path: Path, loaders: list[Loader], network: nn.Module, run: config.Run) -> None:
    rows = 8
    first = next(iter(loaders[0].epoch(0)))
    first.pixels, first.sizes, first.index = first.pixels[:rows], first.sizes[:rows], first.index[:rows]
    views = pictures.view_rows(first, run.data.views, run.seed)
    (bank, _), (queries, _) = (extract(network, loader, run) for loader in loaders)
    view = run.data.eval_view
    plain = [extract(features.Pixels(view.size), loader, run)[0] for loader in loaders]
    images = [pictures.tiles(x.view(-1, 3, view.size, view.size), view) for x in plain]
    shown = torch.arange(0, len(queries), len(queries) // rows)[:rows]
    neighbours = nearest(bank, queries[shown.to(queries.device)], 6)[1].cpu()
    grid = torch.cat([images[1][shown][:, None], images[0][neighbours]], 1)
    pictures.sheet(path, [("an image and its views", views), ("a test image and its nearest neighbours", grid)])
