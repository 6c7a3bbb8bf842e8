"""The interface of a method (`Method`), what it is built from (`Context`), and the state of a run (`Trainer`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastssl import backbones, cuda_graph, dist, norm, zero
from fastssl.amp import LossScaler
from fastssl.config import Run
from fastssl.kernels import Impl
from fastssl.loader import Batch, Loader
from fastssl.meters import Meter
from fastssl.optim import Schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Outputs = dict[str, Tensor]  # what a method's forward returns: each tensor has one row per sample
ExtractOutputs = Callable[..., tuple[Tensor, Tensor]]  # `outputs.extract_outputs` without its first argument


@dataclass(frozen=True)
class Context:
    """What `Config.build` of a method receives beside the backbone."""

    samples: int  # number of images in data.train
    batch: int  # images of a global batch, over all ranks and micro-batches
    classes: list[str] | None = None  # their names; None: data.train has no labels
    seed: int = 0  # of the run; all random numbers of the method must depend on it
    kernels: Impl = "auto"  # speed.kernels, the `impl` of every kernel that the method calls


class Method(Protocol):
    """The interface of a method, an nn.Module that `Config.build(backbone, context)` returns.

    Every tensor that `forward` returns has one row per sample; "features" are those of the backbone, detached.  `loss`
    returns a dict with "loss", a scalar tensor with a gradient, and scalars to log.

    Optional attributes (default in parentheses):

    - `mean_loss` (False): True if the loss and the scalars are means over samples, and the term of a sample depends
      only on its own outputs and on buffers.  A micro-batch then needs one forward instead of two.
    - `total_weight(batch) -> 0-dim tensor` (the number of samples): the divisor of a weighted `mean_loss`; equal on all
      ranks and computed without a forward.
    - `min_batch` (1): smallest global batch for which the loss is defined.
    - `exact_views` (False): True if pixels are also targets; the views are then float32 at every precision.
    - `evaluated` ("backbone"): name of the submodule to evaluate and export ("target.0" for a teacher).
    - `freeze_epochs` ({}): {regular expression of parameter names: number of first epochs without updates of these
      parameters and of their optimizer state}.
    - `total_steps`: set to the run's number of steps after `build`.
    - `before_epoch(epoch, extract_outputs) -> str | None`: called before the first step of each epoch, for methods that
      cluster; returns a line for the log.  `extract_outputs`: see fastssl.outputs.
    - `order(epoch) -> (N,) sample numbers`: the order of the epoch's samples instead of a permutation; depends only on
      the epoch and on buffers that do not change until the next `before_epoch`.
    - `graph_key(epoch) -> Hashable`: for methods with Python branches on the epoch.  The CUDA graph of the step is
      captured again when the value changes, and `batch.epoch` is an int.
    - `not_capturable`: the reason why the step cannot be captured in a CUDA graph.

    `Config.init_backbone(backbone)` may initialise the backbone; it is called before `backbone.pretrained` is loaded.
    """

    views: int | None  # number of views of the recipe; None: any
    backbone: nn.Module

    def forward(self, views: list[Tensor], batch: Batch) -> Outputs:
        """Outputs of the views (B, 3, S, S), by name; S may differ between views.  The loss must depend on every
        trainable parameter."""

    def loss(self, out: Outputs, batch: Batch) -> dict[str, Tensor]: ...

    def after_step(self, out: Outputs, batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None) -> None:
        """Update what has no gradient, such as a momentum encoder, a queue or a memory bank.

        `progress` is the fraction of the run's steps before this one, a 0-dim tensor on the device except where
        DeepSpeed makes the step.  Where the step may be captured in a CUDA graph, `batch.epoch` and `batch.step` are
        0-dim tensors, too, also in `forward` and `loss`.  A nonzero `found_inf` means that gradients overflowed in fp16
        and nothing may change.  A method without this argument is not called after such a step; the host then waits for
        the device at every step."""


@dataclass
class Trainer:
    """The state of a run: the training loop changes it, hooks may read it."""

    run: Run
    folder: Path
    device: torch.device
    method: nn.Module  # a Method
    deepspeed: DeepSpeedEngine  # around `method`; at ZeRO 0 only its optimizer and its counters are used
    schedule: Schedule
    loader: Loader
    meter: Meter
    loss_scaler: LossScaler
    step_inputs: cuda_graph.StepInputs  # the numbers of the current step, on the device
    hooks: list = field(default_factory=list)
    # what step.pytorch_step runs, eagerly or as a CUDA graph; None: step.deepspeed_step
    capturable_step: cuda_graph.CapturableStep | None = None
    statistics: norm.StatisticsBackup | None = None  # where steps may be skipped (fp16, optim.skip_nonfinite)
    not_compiled: str | None = None  # why the method's forward is not compiled; None: it is
    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    scalars: dict[str, Any] = field(default_factory=dict)  # to log, of the current step

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

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
