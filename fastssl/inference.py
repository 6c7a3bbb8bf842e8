"""Running a network over the images of a file without gradients, the same way for features, monitors and clustering."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.ending import progress
from fastssl.loader import Batch, Loader


@torch.no_grad()
def forward_batches(
    forward: Callable[[Batch], list[Tensor]],
    loader: Loader,
    *,
    epoch: int = 0,
    start: int = 0,
    stop: int | None = None,
    order: np.ndarray | None = None,
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """(batch, forward(batch)) of this rank's micro-batches, for the loader's steps from `start` to before `stop`
    (None: to the end of the epoch).  `forward` returns tensors of one row for each image.

    All ranks call `forward` equally often, since under ZeRO-3 a forward takes all of them: where the last batch of a
    file has no image for this rank, `forward` is given a black one, and the batch and its outputs have 0 rows.
    `order`: rows of the file to go through, as in `Loader.epoch`.  Nothing before `start` is decoded.
    """
    with contextlib.closing(loader.epoch(epoch, start, order)) as batches:
        for step in range(start, loader.steps if stop is None else stop):
            for _ in range(loader.sampler.micro_per_step):
                batch = next(batches, None)
                progress.made()
                if batch is not None:
                    yield batch, forward(batch)
                else:
                    outputs = forward(_one_image(loader, epoch, step, 1))
                    yield _one_image(loader, epoch, step, 0), [part[:0] for part in outputs]


def _one_image(loader: Loader, epoch: int, step: int, count: int) -> Batch:
    """A batch of `count` (0 or 1) black images of one pixel."""
    index, labels = torch.zeros(1, dtype=torch.int64), torch.from_numpy(loader.labels()[:1])
    parts = (torch.zeros(1, 1, 3, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.int32), index, labels)
    pixels, sizes, index, label = (part[:count].to(loader.device) for part in parts)
    return Batch(pixels, sizes, index, label, epoch, step)
