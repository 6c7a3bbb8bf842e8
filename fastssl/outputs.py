"""A method's outputs for the whole training set, during training; methods that cluster use them."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from fastssl import backbones, dist, norm, step
from fastssl import views as recipes
from fastssl.inference import forward_batches
from fastssl.loader import Batch
from fastssl.trainer import Trainer


def extract_outputs(t: Trainer, name: str, augmented: bool = False, training: bool = False) -> tuple[Tensor, Tensor]:
    """Output `name` of the method on this rank's shard of the training set: rows (n, ...) and sample numbers (n,).

    By default in evaluation mode and for the evaluation view; `augmented`: for the views that it is trained on.
    `training`: in training mode and in the epoch's order, so that batch norm takes the statistics of mixed batches; the
    images that are left over for an incomplete batch are normalised by the running statistics.  Running statistics are
    restored at the end.
    """
    dist.sync_buffers(t.method)
    loader, data, statistics = t.loader.in_file_order(), t.run.data, norm.SavedStatistics(t.method)
    loader.sampler = replace(loader.sampler, shuffle=training)
    views = data.views if augmented else (data.eval_view or recipes.default_view(data.views[0], loader.card),)

    def forward(batch: Batch) -> list[Tensor]:
        complete = (batch.step + 1) * loader.batch <= loader.samples
        if training and not complete:
            dist.sync_buffers(t.method)
        with contextlib.nullcontext() if training and complete else backbones.evaluating(t.deepspeed):
            return [t.deepspeed(step.batch_views(t, batch, views), batch)[name]]

    batches = [(rows, batch.index) for batch, (rows,) in forward_batches(forward, loader, epoch=t.epoch)]
    statistics.restore()
    rows, index = (torch.cat(part) for part in zip(*batches))
    return rows, index
