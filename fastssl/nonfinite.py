"""A loss, gradient or weight that is NaN or infinite: when the run ends, and where the first such value arises.

Checking every tensor would slow every step.  Instead, since a run can be repeated exactly, the steps from the last
checkpoint to the one that failed are repeated, and the tensors of the last two are checked.  The state before the step
and its batch are saved in RUN/nonfinite, from which `fastssl replay` repeats the step.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor

from fastssl import dist, files, zero
from fastssl.checkpoint import disk, state, writer
from fastssl.files import untrusted
from fastssl.loader import Batch
from fastssl.step import step
from fastssl.trainer import Trainer

BAD_STEPS = 3  # steps in a row without a finite loss that end a run whose optim.skip_nonfinite is 0
REMEDY = "lower optim.lr, lengthen optim.warmup_epochs, set optim.clip, or use bf16 or fp32 instead of fp16"
RERUN_S = 600.0  # the longest time that a run which has failed takes to find the first such value
FOLDER = "nonfinite"  # in the run's folder
POSTPONED = "postponed.json"  # in FOLDER: the checkpoint to start from and the step that failed
Source = Callable[[Trainer], Iterator[tuple[int, list[Batch]]]]  # engine.batches


class NotFinite(ValueError):
    """The run cannot continue; `step` is the number (from 1) of the first step whose loss or weights are not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class FiniteLossCheck:
    """Ends the run after too many steps in a row whose loss is not finite, by the records that have arrived from the
    device.  `skip`: optim.skip_nonfinite, the number of such steps that may be skipped."""

    def __init__(self, skip: int = 0) -> None:
        self.limit = skip + 1 if skip else BAD_STEPS
        self.bad: list[dict] = []  # records of the last steps, none of which is finite
        self.error: NotFinite | None = None

    def check(self, records: list[dict]) -> None:
        """NotFinite after too many steps in a row that are not finite.  Steps that fp16 skipped do not count, unless
        the loss scale is 1 and cannot be lowered."""
        for record in records if self.error is None else ():
            overflow = record.get("applied") is False
            if "loss" not in record or (overflow and record.get("loss_scale", 1.0) > 1.0):
                continue
            self.bad = [] if math.isfinite(record["loss"]) and not overflow else [*self.bad, record]
            if (problem := self.problem()) and len(self.bad) >= self.limit:
                self.error = NotFinite(problem, self.bad[0]["step"])
                break
        if self.error is not None:
            raise self.error

    def problem(self) -> str | None:
        """What is wrong with the last losses; None: nothing."""
        if not self.bad:
            return None
        first = self.bad[0]
        where = f"since step {first['step']} (epoch {first['epoch']}): {REMEDY}"
        if math.isfinite(first["loss"]):
            return f"gradients are not finite, with a loss scale of 1, {where}"
        return f"the loss is {first['loss']} {where}"


class Finding(NamedTuple):
    """The first tensor of a step that is not finite, on one rank."""

    order: int  # how many tensors were checked before it
    text: str


class Trace:
    """Inside `with`, every tensor of a step is checked, in the order of computation: views, the output of every module,
    losses, gradients.  Then call `check_weights`.  `found`: the first that is not finite."""

    def __init__(self, t: Trainer):
        self.t, self._count = t, 0
        self.found: Finding | None = None
        self._batch: Batch | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        method, self._kept = self.t.method, (self.t.method.forward, self.t.method.loss)

        def forward(views: list[Tensor], batch: Batch) -> dict[str, Tensor]:
            self._batch = batch
            for i, view in enumerate(views):
                self.check(f"view {i}", view)
            return self._kept[0](views, batch)

        def loss(out: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
            losses = self._kept[1](out, batch)
            for name, value in losses.items():
                if isinstance(value, Tensor):
                    self.check(f"{name} of the loss", value)
            return losses

        method.forward, method.loss = forward, loss
        for name, module in method.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(lambda g, n=name: self.check(f"gradient of {n}", g)))
        return self

    def __exit__(self, *_: object) -> None:
        self.t.method.forward, self.t.method.loss = self._kept
        for handle in self._handles:
            handle.remove()

    def check_weights(self) -> None:
        for name, parameter in self.t.method.named_parameters():
            self.check(f"{name} after the update", getattr(parameter, "ds_tensor", parameter).detach())

    def check(self, name: str, value: Tensor) -> None:
        self._count += 1
        if self.found is None and value.is_floating_point() and not value.isfinite().all():
            self.found = Finding(self._count, f"{name}, {describe(value.detach(), self._batch)}")

    def _hook(self, name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else (output,):
                if isinstance(value, Tensor):
                    self.check(f"output of {name}", value)
                    if value.requires_grad:
                        value.register_hook(lambda g: self.check(f"gradient of the output of {name}", g))

        return hook


def describe(value: Tensor, batch: Batch | None) -> str:
    """Shape, how many values are NaN and infinite, and the samples that the rows belong to, where they are fewer than
    those of the batch."""
    nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
    text = f"shape {tuple(value.shape)}: {nan} NaN and {inf} infinite of {value.numel()} values"
    samples = 0 if batch is None else len(batch.index)
    if batch is None or not samples or not value.ndim or len(value) % samples:
        return text
    rows = (~value.isfinite()).flatten(1).any(1) if value.ndim > 1 else ~value.isfinite()
    wrong = batch.index[rows.nonzero().flatten() % samples].unique().tolist()
    if len(wrong) == samples:
        return f"{text}, of all {samples} samples"
    return f"{text}, of the samples {', '.join(map(str, wrong[:10]))}{' ...' * (len(wrong) > 10)}"


def postpone(folder: Path, checkpoint: Path | None, failed_step: int, seconds: float) -> bool:
    """Whether a rerun takes too long for a run that has failed; what it needs is then saved for `fastssl replay`."""
    if seconds > RERUN_S:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        files.write_json(
            folder / FOLDER / POSTPONED, {"checkpoint": checkpoint and str(checkpoint), "step": failed_step}
        )
    return seconds > RERUN_S


def rerun(t: Trainer, checkpoint: Path | None, failed_step: int, batches: Source) -> str:
    """Repeat the steps from `checkpoint` (None: the start) to `failed_step` with `t`, a new trainer, and check the last
    two; the one in which the first value arises is saved.  Returns what was found, the same on every rank."""
    if checkpoint is not None:
        state.load(t, checkpoint)
    folder, first = t.folder / FOLDER, max(failed_step - 1, t.step + 1)
    if dist.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    t.folder = folder
    for _, micro_batches in batches(t):
        if t.step + 1 < first:
            step(t, micro_batches)
            continue
        path = writer.save(t)
        torch.save([vars(b) for b in micro_batches], folder / f"batch_rank_{dist.rank()}.pt")
        found = traced(t, micro_batches)
        if found is not None:
            return f"{found}; the state before the step and its batch are in {folder}"
        if t.step >= failed_step:
            break
        dist.on_main(shutil.rmtree, path)
    return "it did not arise again when the steps were repeated"


def traced(t: Trainer, micro_batches: list[Batch]) -> str | None:
    """Make one step and check its tensors: where the first value that is not finite arose; None: nowhere."""
    with Trace(t) as trace:
        step(t, micro_batches)
    trace.check_weights()
    findings: list[Finding | None] = [trace.found]
    if dist.world() > 1:
        findings = [None] * dist.world()
        td.all_gather_object(findings, trace.found)
    first = min(((f[0], r, f[1]) for r, f in enumerate(findings) if f is not None), default=None)
    if first is None:
        return None
    rank = f" (rank {first[1]})" if dist.world() > 1 else ""
    return f"the first tensor that is not finite, in step {t.step}{rank}: {first[2]}"


def replay(t: Trainer, batches: Source) -> str:
    """Make the saved step of the run again with `t`, a new trainer, or find it first; what was found."""
    folder = t.folder / FOLDER
    postponed = dist.on_main(lambda: untrusted.read_json(p) if (p := folder / POSTPONED).exists() else None)
    if postponed is not None:
        path = postponed["checkpoint"]
        return rerun(t, path and Path(path), postponed["step"], batches)
    path = dist.on_main(disk.newest, folder)
    if path is None:
        raise ValueError(f"{folder} holds no step: it is saved when a run ends because of a loss that is not finite")
    state.load(t, path)
    found = traced(t, _saved_batches(folder, t))
    return found or f"all tensors of step {t.step} are finite with these settings"


def _saved_batches(folder: Path, t: Trainer) -> list[Batch]:
    """This rank's micro-batches of the saved step, which may have been made by another number of ranks."""
    files = sorted(folder.glob("batch_rank_*.pt"), key=lambda p: int(p.stem.rpartition("_")[2]))
    parts = [part for file in files for part in untrusted.read_pt(file)]
    names = {f.name for f in fields(Batch)}
    if not parts or any(not isinstance(part, dict) or part.keys() != names for part in parts):
        raise ValueError(f"{folder}: its batches are damaged or incomplete; train again to save them")
    merged = {k: torch.cat([p[k] for p in parts]) for k in ("pixels", "sizes", "index", "label")}
    rows, count = dist.shard(len(merged["index"])), t.loader.sampler.micro_per_step
    mine = {k: v[rows].to(t.device).chunk(count) for k, v in merged.items()}
    first, out = parts[0], []
    for i in range(count):
        before = rows.start + sum(len(x) for x in mine["index"][:i])
        position = None if first["position"] is None else first["position"] + before
        part = {k: v[i] for k, v in mine.items()}
        out.append(Batch(**part, epoch=first["epoch"], step=first["step"], position=position))
    return out


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint of at most `step` steps."""
    found = [path for path in disk.list_checkpoints(folder) if disk.step_of(path) <= step]
    return next((path for path in found if disk.damage(path) is None), None)


def weights_problem(t: Trainer) -> str | None:
    """What is wrong with the weights; None: nothing."""
    if zero.all_finite(t.method):
        return None
    return f"weights are not finite after step {t.step} (epoch {t.epoch}): {REMEDY}"
