"""What a method is, what its config builds it from, and the state of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastssl import backbones, dist, graph, zero
from fastssl.amp import LossScale
from fastssl.config import Run
from fastssl.loader import Batch, Loader
from fastssl.meters import Meter
from fastssl.optim import Schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Outputs = dict[str, Tensor]  # of a method's forward: each has one row per sample
ExtractOutputs = Callable[..., tuple[Tensor, Tensor]]  # outputs.extract_outputs of the run


@dataclass(frozen=True)
class Context:
    """What a method's config is given, beside the backbone, to build the method."""

    samples: int  # of data.train
    batch: int  # images of a global batch, over all ranks and micro-batches
    classes: list[str] | None = None  # their names; None: data.train has no labels
    seed: int = 0  # of the run: whatever the method draws must follow from it
    kernels: str = "auto"  # speed.kernels, the `impl` of every kernel that the method calls


class Method(Protocol):
    """What the engine needs of a method, which is an nn.Module built by `Config.build(backbone, context)`.

    Every tensor that `forward` returns has one row per sample; "features" among them are the backbone's, detached.
    What `loss` returns holds "loss", a scalar tensor with a gradient, and scalars to log.

    A method may also have these attributes (the value where it has none):

    - `mean_loss` (False): True where the loss and the scalars are means over samples and the term of a sample depends
      on its own outputs and on buffers alone.  A micro-batch then needs one forward instead of two.
    - `total_weight(batch) -> 0-dim tensor` (the number of samples): what the sum over the samples of `batch` is divided
      by in a `mean_loss` that is weighted; equal on all ranks and computed without a forward.
    - `min_batch` (1): the fewest images of a global batch that the loss can compare.
    - `exact_views` (False): True where pixels are targets, too: views are then float32 at every precision.
    - `evaluated` ("backbone"): name of the submodule to evaluate and export (a teacher: "target.0").
    - `freeze_epochs` ({}): {pattern of parameter names: epochs in which the optimizer leaves them and their state as
      they are}.
    - `total_steps`: set to the run's number of steps after `build`.
    - `before_epoch(epoch, extract_outputs) -> str | None`: called before the first step of an epoch, by methods that
      cluster; returns a line for the log.  `extract_outputs`: fastssl.outputs.
    - `order(epoch) -> (N,) sample numbers`: to train on instead of the epoch's permutation; a function of the epoch and
      of buffers that stay as they are until the next `before_epoch`.
    - `phase(epoch) -> Hashable`: for a method that decides by the epoch on the host.  Its step is captured again as a
      CUDA graph where the value changes, and `batch.epoch` is a number.
    - `not_capturable`: the reason why its step cannot be captured.

    Initial values of the backbone belong into `Config.init_backbone(backbone)`, which is called before
    `backbone.pretrained` is loaded.
    """

    views: int | None  # how many views the recipe must give; None: any number
    backbone: nn.Module

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        """Every trainable parameter must take part."""

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]: ...

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        """Moves what gradients do not train: a momentum encoder, a queue, a memory bank.

        `progress` is the fraction of the run's steps before this one.  The step may be captured in a CUDA graph:
        `progress`, `batch.epoch` and `batch.step` are then 0-dim tensors on the device.  Where `found_inf` is not zero,
        gradients have overflowed in fp16 and nothing may change; without this argument `after_step` is not called then,
        for which the host waits for the device in every step."""


@dataclass
class Trainer:
    """The state of a run: what the training loop changes and hooks may read."""

    run: Run
    folder: Path
    device: torch.device
    method: nn.Module  # a Method
    ds: DeepSpeedEngine  # around `method`
    schedule: Schedule
    loader: Loader
    meter: Meter
    scale: LossScale
    values: graph.Values  # the numbers of the current step, on the device
    hooks: list = field(default_factory=list)
    graphed: graph.Graphed | None = None  # the step that bypasses DeepSpeed's; None: DeepSpeed makes it
    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    scalars: dict[str, Any] = field(default_factory=dict)  # to log, of the current step

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps

    def log(self, scalars: dict[str, Any]) -> None:
        """Add numbers, or 0-dim tensors, to the record of this step.  Tensors are averaged over ranks: log them on
        every rank."""
        self.scalars.update(scalars)

    @contextlib.contextmanager
    def plain_backbone(self) -> Iterator[nn.Module]:
        """The backbone to evaluate, as an ordinary module with equal buffers on all ranks; under ZeRO-3 a copy."""
        dist.sync_buffers(self.method)
        module = self.method.get_submodule(getattr(self.method, "evaluated", "backbone"))
        if self.run.speed.zero < 3:
            yield module
            return
        copy = backbones.build(self.run.backbone).to(self.device)
        copy.load_state_dict(zero.full_state_dict(module, everywhere=True))
        yield copy
