"""A sheet of test images with their nearest training images by cosine similarity, and how many share their class.

The number is the precision at k: the fraction of the k nearest training images that have the class of the query, over
all test images.  Images without a label do not count.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fastssl import dist, files, pictures
from fastssl.eval.common import search
from fastssl.eval.common.features import check_finite
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.maps import output_folder, sample

NEEDS = ("train", "test")
LABELLED = "none"  # labels are optional


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    folder = output_folder(args)
    if args.queries < 1:
        raise ValueError(f"queries={args.queries}: give the number of test images on the sheet")
    bank, bank_labels = target.features(target.train)
    queries, labels = target.features(target.test)
    found = nearest(bank, queries, args.k)
    row = {"k": args.k}
    if bank_labels.ndim == 1 and labels.ndim == 1:
        of_found = bank_labels[found]
        known = (of_found >= 0) & (labels >= 0)[:, None]
        if known.any():
            row["precision"] = 100 * (of_found == labels[:, None])[known].float().mean().item()
    shown = sample(len(queries), min(args.queries, len(queries)), args.seed)
    path = folder / "neighbours.png"
    if dist.is_main():
        shown_neighbours = found.cpu().numpy()[shown]
        tiles = [
            pictures.images(file, rows, target.view, device=args.device, workers=args.workers)
            for file, rows in ((target.test, shown), (target.train, shown_neighbours.flatten()))
        ]
        grid = torch.cat([tiles[0][:, None], tiles[1].view(len(shown), args.k, *tiles[1].shape[1:])], 1)
        with files.atomic_write(path) as temporary:
            pictures.sheet(temporary, [("a test image and its nearest training images", grid)])
    options = {
        "bank": len(bank),
        "queries": len(queries),
        "dim": bank.shape[1],
        "seed": args.seed,
        "shown": shown.tolist(),
    }
    return {"protocol": "neighbours", "options": options, "results": [{**row, "picture": str(path)}]}


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """int64 (M, k): rows of bank (N, dim) nearest to queries (M, dim) by cosine similarity, nearest first."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k}: must be between 1 and {len(bank)}, the samples that can be neighbours")
    check_finite("training set", bank)
    check_finite("test set", queries)
    return search.nearest(bank, queries, k)[1]
