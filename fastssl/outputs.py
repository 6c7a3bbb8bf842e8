"""The outputs of the method in training for the whole training set, which methods that cluster ask for."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastssl import backbones, dist, norm, step
from fastssl import views as recipes
from fastssl.loader import Batch
from fastssl.trainer import Trainer


@torch.no_grad()
def extract_outputs(t: Trainer, name: str, augmented: bool = False, training: bool = False) -> tuple[Tensor, Tensor]:
    """Output `name` of the method on this rank's shard of the training set: rows (n, ...) and sample numbers (n,).

    By default in evaluation mode and for the evaluation view; `augmented`: for the views that it is trained on.
    `training`: in training mode and in the epoch's order, so that batch norm takes the statistics of mixed batches; the
    images that are left over for an incomplete batch are normalised by the running statistics.  Running statistics are
    restored at the end.
    """
    dist.sync_buffers(t.method)
    loader, data, statistics = t.loader.in_file_order(), t.run.data, norm.RunningStatistics(t.method)
    loader.shuffle = training
    views = data.views if augmented else (data.eval_view or recipes.default_view(data.views[0], loader.card),)
    rows, index = [], []
    with contextlib.closing(loader.epoch(t.epoch)) as source:
        for i in range(loader.steps):
            batch, complete = next(source, None), (i + 1) * loader.batch <= loader.samples
            if training and not complete:
                dist.sync_buffers(t.method)
            with contextlib.nullcontext() if training and complete else backbones.evaluating(t.ds):
                if batch is not None:
                    rows.append(t.ds(step.batch_views(t, batch, views), batch)[name])
                    index.append(batch.index)
                else:  # the last batch has no image for this rank, and under ZeRO-3 forward takes all ranks
                    blank = Batch(*[torch.zeros(1, dtype=torch.int64, device=t.device)] * 4, t.epoch, 0)
                    some = t.ds([torch.zeros(1, 3, v.size, v.size, device=t.device) for v in views], blank)[name]
                    rows.append(some[:0])
    statistics.restore()
    return torch.cat(rows), torch.cat(index or [blank.index[:0]])
