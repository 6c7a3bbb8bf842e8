"""Features of every image, layer by layer, and labels as .npy or .safetensors; rows are in the order of the file.

Maps (stem, layer1 to layer4) are average-pooled to about 9,000 dimensions as OpenSelfSup's tools/extract.py does;
"last" is the network's output.  Float32, not normalised.  .npy is written shard by shard, .safetensors from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastssl import dist, files
from fastssl.eval.common import cache, features
from fastssl.eval.common.ranks import on_main
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.maps import output_folder

NEEDS = ()  # one of the two files is enough
REMEDY = "give another --folder"


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    layers = features.layers_of(target.backbone) if args.layers == ("all",) else args.layers
    features.check_layers(target.backbone, layers)
    sources = {name: getattr(target, name) for name in ("train", "test") if args.only in (None, name)}
    sources = {name: path for name, path in sources.items() if path}
    if not sources:
        raise ValueError(f"give --{args.only} NAME.beton: {args.target or 'the command'} names none")
    folder = output_folder(args)
    targets = {name: _targets(folder, name, layers, args.to) for name in sources}
    existing = [path for paths in targets.values() for path in paths.values() if path.exists()]
    if existing and not args.force:
        raise ValueError(f"{existing[0]} exists: give another --folder, or --force to replace it")
    dist.barrier()  # every rank must have looked before the first one writes
    if args.squash:
        target.view = replace(target.view, crop="squash", resize=None)
    rows, about = [], target.describe()
    dims = target.extractor(layers).dims
    for name, path in sources.items():
        samples = target.loader(path).samples
        if args.to == "npy":
            _write_npy(target, path, targets[name], layers, [(samples, dim) for dim in dims])
        else:
            *parts, labels = target.features(path, layers)
            state = {**dict(zip(layers, parts)), "labels": labels}
            on_main(partial(_write_safetensors, targets[name]["labels"], state, {**about, "file": path}), REMEDY)
        rows += [
            {"file": name, "layer": layer, "rows": samples, "dim": dim, "path": str(targets[name][layer])}
            for layer, dim in zip(layers, dims)
        ]
    return {"protocol": "extract", "options": {"layers": list(layers), "to": args.to}, "results": rows}


def _targets(folder: Path, name: str, layers: tuple[str, ...], to: str) -> dict[str, Path]:
    parts = (*layers, "labels")
    return {part: folder / (f"{name}.safetensors" if to == "safetensors" else f"{name}_{part}.npy") for part in parts}


def _write_npy(
    target: EvalTarget, path: str, targets: dict[str, Path], layers: tuple[str, ...], shapes: list[tuple[int, int]]
) -> None:
    """A file for each layer, written shard by shard: five layers of ImageNet's training set are 226 GB."""
    loader, handles, starts = target.loader(path), [], []
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            cache.check_disk_space(targets[layers[0]].parent, sum(4 * rows * dim for rows, dim in shapes), REMEDY)
            for layer, shape in zip(layers, shapes):
                temporary = stack.enter_context(files.atomic_write(targets[layer]))
                handles.append(stack.enter_context(open(temporary, "wb")))
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(handles[-1], header)
                starts.append(handles[-1].tell())
            with files.atomic_write(targets["labels"]) as temporary, open(temporary, "wb") as f:
                np.save(f, loader.labels())

        def put(first: int, parts: list[torch.Tensor]) -> None:
            for file, start, part in zip(handles, starts, parts):  # not memory maps: a full disk would kill the process
                file.seek(start + 4 * first * part.shape[1])
                file.write(part.cpu().contiguous().numpy().astype("<f4", copy=False))

        on_main(begin, REMEDY)
        cache.for_each_shard(
            target.cache_folder(),
            target.extractor(layers),
            loader,
            lambda first, parts: on_main(partial(put, first, parts), REMEDY),
            target.weights,
        )


def _write_safetensors(path: Path, parts: dict[str, torch.Tensor], about: dict) -> None:
    state = {name: part.cpu().contiguous() for name, part in parts.items()}
    files.write_safetensors(path, state, {"format": "pt", "fastssl.features": json.dumps(about)})
