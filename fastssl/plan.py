"""Memory of a rank at every ZeRO stage, predicted before a run: `fastssl doctor --plan CONFIG --gpus 8`.

States are counted from the shapes of the method, built on the meta device.  Activations are measured: a forward pass of
two and of four images on the CPU gives the bytes that autograd keeps, which grow by the same amount with each image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastssl import backbones, config
from fastssl.amp import autocast
from fastssl.config import Run
from fastssl.files.datacard import DataCard
from fastssl.gradients import ALL_REDUCE_ELEMENTS
from fastssl.loader import Batch
from fastssl.parsing import columns
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Context

IMAGENET_SAMPLES = 1_281_167
STATES = {"adamw": 2, "sgd": 1, "lars": 1}  # tensors of the optimizer for each parameter


class Memory(NamedTuple):
    """Bytes on one rank."""

    parameters: int  # trained and frozen ones (a teacher), and from stage 1 on the copy that the optimizer steps
    optimizer: int
    buffers: int  # queues, banks, statistics, this rank's part of tables
    gradients: int
    reduction: int  # the buffer in which they are averaged over ranks


def training_samples(run: Run) -> int:
    """From the data card of the training set; ImageNet's where there is none yet."""
    card = Path(run.data.train).with_suffix(".json")
    return DataCard.read(card).samples if card.is_file() else IMAGENET_SAMPLES


def build_method(run: Run, samples: int, device: str) -> nn.Module:
    """The run's method with random weights."""
    classes = list(map(str, range(1000)))
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about training with the ranks of this process
        backbone = backbones.build(run.backbone, run.method)
        return run.method.build(backbone, Context(samples, run.optim.batch, classes, run.seed, "reference"))


def memory(method: nn.Module, run: Run, stage: int, ranks: int) -> Memory:
    """States and gradients of one of `ranks` ranks; all in float32, as fastssl has them at every precision."""
    trained = [p.numel() for p in method.parameters() if p.requires_grad]
    frozen = [p.numel() for p in method.parameters() if not p.requires_grad]
    total, part = sum(trained), -(-sum(trained) // ranks)
    if stage == 3:  # every tensor is cut by itself
        part = sum(-(-n // ranks) for n in trained)
        parameters = part + sum(-(-n // ranks) for n in frozen)
    else:
        parameters = total + sum(frozen)
    kept = STATES[run.optim.name] if run.optim.name == "adamw" or run.optim.momentum else 0
    tables = [m._storage for m in method.modules() if isinstance(m, ShardedTable)]
    buffers = sum(b.numel() * b.element_size() for b in method.buffers())
    buffers += sum(-(-t.numel() // ranks) * t.element_size() for t in tables)
    return Memory(
        parameters=4 * (parameters + (part if stage else 0)),
        optimizer=4 * kept * (part if stage else total),
        buffers=buffers,
        gradients=4 * (part if stage > 1 else total),
        reduction=4 * min(ALL_REDUCE_ELEMENTS, total) if stage or ranks > 1 else 0,
    )


def activations(run: Run, samples: int) -> tuple[int, int]:
    """(bytes for each image, bytes beside them) that autograd keeps in a forward pass; it runs on the CPU."""
    method = build_method(run, samples, "cpu").train()
    few, more = (_saved_bytes(method, run, n) for n in (2, 4))
    slope = max(0, more - few) // 2
    return slope, max(0, few - 2 * slope)


def _saved_bytes(method: nn.Module, run: Run, images: int) -> int:
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*method.parameters(), *method.buffers())}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(x)  # keeps the address from being used for another tensor
        return x

    kept: list[Tensor] = []
    views = [torch.rand(images, 3, v.size, v.size) for v in run.data.views]
    index = torch.arange(images)
    batch = Batch(torch.zeros(images, 1, 3, dtype=torch.uint8), torch.ones(images, 2), index, index % 2, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with autocast(torch.device("cpu"), run.optim.precision):
            out = method(views, batch)
        method.loss({k: v.float() if v.is_floating_point() else v for k, v in out.items()}, batch)
    return sum(sizes.values())


def report(path: str, overrides: Sequence[str], gpus: int) -> str:
    """A table of GiB on each GPU for the ZeRO stages."""
    run = config.load(path, list(overrides))
    if gpus < 1 or run.optim.batch % gpus:
        raise ValueError(f"--gpus {gpus}: must be 1 or more and divide optim.batch={run.optim.batch}")
    samples = training_samples(run)
    method = build_method(run, samples, "meta")
    micro = min(run.speed.micro_batch or run.optim.batch, run.optim.batch // gpus)
    each, beside = activations(run, samples)
    forward = beside + micro * each
    rows: list[list[Any]] = [["ZeRO", *Memory._fields, "activations", "sum"]]
    for stage in range(4):
        m = memory(method, run, stage, gpus)
        rows.append([stage, *(f"{v / 2**30:.2f}" for v in (*m, forward, sum(m) + forward))])
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    total = sum(p.numel() for p in method.parameters())
    return (
        f"GiB on each of {gpus} GPUs: {total / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained), "
        f"{run.optim.name}, {samples:,} samples, {run.optim.precision}\n{columns(rows)}\n"
        f"activations: {micro} images of {each / 2**20:.1f} MiB, which autograd keeps in a forward pass (measured on "
        "the CPU with 2 and 4 images, extrapolated); speed.micro_batch lowers them.\nNot included: the images, "
        "workspaces of cuDNN, CUDA's context, fragmentation. A checkpoint takes as much memory of the host as the "
        "parameters and this rank's optimizer state."
    )
