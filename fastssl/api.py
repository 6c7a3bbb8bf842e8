"""fastssl from Python: `fastssl.load`, `fit`, `features` and `convert` (docs/python.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl import dist
from fastssl.config import Run, settings
from fastssl.data_prep.image import Options
from fastssl.data_prep.memory import open_memory
from fastssl.data_prep.write import convert as write
from fastssl.eval.common.target import load_target
from fastssl.eval.options import target_options
from fastssl.parsing import did_you_mean
from fastssl.trainer import Trainer


def fit(run: Run, hooks: Sequence = (), *, resume: bool = False, device: str | None = None) -> Trainer:
    """Train `run` to its end in this process (one of a launcher's: on all ranks) and return the engine's Trainer.  Its
    `folder` has the log and the checkpoints, its `method` is the trained module.

    `hooks` are called beside `run.hooks` and the monitors of `run.log` (kNN, probe, collapse).  `device`: "cpu" or
    "cuda", None for CUDA where there is one.  ValueError for a mistake in the run.
    """
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
    from fastssl import engine
    from fastssl import hooks as monitors

    with _group(device):
        return engine.fit(run, [*monitors.from_config(run), *hooks], resume=resume, device=device)


def features(
    target: Any, data: str | Path = "train", *, layers: Sequence[str] = ("last",), **options: Any
) -> tuple[np.ndarray, ...]:
    """The features that a trained backbone gives for each image, and the labels:
    `x, y = fastssl.features("work_dirs/mine/r50")`.

    target: a run or checkpoint folder, a weight file, or what `fit` returned; None with features="untrained" or
    "pixels".  data: "train" or "test" of the run, or a .beton.  layers: see docs/evaluation.md; an array for
    each.  options: those of `fastssl eval` by their names: batch=256, precision="bf16", backbone="resnet50", which=...
    Returns float32 (N, dim) and int64 (N,), -1 without a label, or float32 (N, C).
    """
    args = target_options(target=None if target is None else str(getattr(target, "folder", target)))
    _check_names("features", options, sorted(vars(args).keys() - {"target", "train", "test", "out"}))
    which = str(data) if str(data) in ("train", "test") else "train"
    vars(args).update(options, **{which: None if str(data) == which else str(data)})
    with _group(args.device):
        args.device = dist.init(args.device)
        loaded = load_target(args, (which,))
        return tuple(part.cpu().numpy() for part in loaded.features(getattr(loaded, which), tuple(layers)))


def convert(
    images: Any,
    out: str | Path,
    labels: Any = None,
    *,
    classes: Sequence[str] | None = None,
    force: bool = False,
    workers: int = 1,
    **options: Any,
) -> str:
    """Write images in memory to the .beton `out`, and return its path for `Data(train=...)`.

    images: a list of PIL images, an array (N, H, W, 3), or a torch Dataset of images or (image, label) pairs; see
    data_prep/memory.py for labels and classes.  options: short_side, max_pixels, mode, quality as in `fastssl convert`.
    ValueError for an image or label that cannot be stored; an existing file is replaced only with force=True.
    """
    _check_names("convert", options, settings.names(Options))
    write(open_memory(images, labels, classes), out, Options(**options), workers=workers, force=force)
    return str(out)


def _check_names(function: str, options: dict, known: Sequence[str]) -> None:
    unknown = next((name for name in options if name not in known), None)
    if unknown:
        raise ValueError(
            f"{function}: unknown option {unknown!r}{did_you_mean(unknown, known)} (arguments: {', '.join(known)})"
        )


@contextmanager
def _group(device: str | None) -> Iterator[None]:
    """Leave the process group at the end if this block joined it, so that the next call may use another device."""
    joined = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not joined:
            dist.shutdown()
