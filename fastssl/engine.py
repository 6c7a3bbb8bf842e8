"""`fit` trains a run; the training loop is one function, `train`."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastssl import bottleneck, config, dist, ending, zero
from fastssl import hooks as monitors
from fastssl.amp import emulated
from fastssl.build import build
from fastssl.checkpoint import run_folder, state
from fastssl.checkpoint.resume import find_checkpoint
from fastssl.config import Run
from fastssl.loader import Batch, Loader
from fastssl.log import Log
from fastssl.outputs import extract_outputs
from fastssl.step import count_flops, step
from fastssl.trainer import Trainer

BAD_STEPS = 3  # steps in a row without a finite loss that end a run
REMEDY = "lower optim.lr, lengthen optim.warmup_epochs, set optim.clip, or use bf16 or fp32 instead of fp16"


def fit(
    run: Run,
    hooks: list | None = None,
    *,
    resume: bool | str | Path = False,
    force: bool = False,
    device: str | None = None,
    loader: Loader | None = None,
) -> Trainer:
    """Train `run` to its end, or to a signal: SystemExit then, after a checkpoint (docs/runs.md).

    `hooks`: None for those that `run.log` asks for (kNN, probe, collapse); a list takes their place.  `resume`: True
    continues from the newest complete checkpoint of the run's folder, a path from that one.  `force`: start anew over
    the folder's checkpoints.  `loader`: None opens `data.train`."""
    config.validate(run)
    if emulated(run.optim.precision, dist.init(device)):
        if dist.is_main():
            print(
                f"optim.precision={run.optim.precision}: this CPU has no instructions for it and would emulate it, "
                "many times slower; training in fp32"
            )
        run = replace(run, optim=replace(run.optim, precision="fp32"))
    hooks = monitors.from_config(run) if hooks is None else hooks
    with run_folder.locked(run), contextlib.ExitStack() as at_exit:
        path = find_checkpoint(run, resume, force)
        t = build(run, hooks, device, loader)
        log = Log(t.folder, every=run.log.every, total_steps=t.total_steps, tensorboard=run.log.tensorboard)
        at_exit.callback(log.close_files)
        if path:
            notes = state.load(t, path)
            run_folder.prepare(t, path, clear=resume is not True)
            log.truncate(t.step)
            for note in notes:
                log.text(note)
            log.text(f"continuing {path}")
        else:
            run_folder.prepare(t)
            log.text(t.schedule.table)
        run_folder.record_environment(t)
        log.text(opening(t))
        if choice := bottleneck.automatic_settings(t):
            log.text(choice)
        with ending.Signals(t.device) as signals:
            train(t, log, signals)
        log.text(closing(t))
    return t


def train(t: Trainer, log: Log, signals: ending.Signals) -> None:
    """The training loop, from step `t.step` to the last."""
    first, times, losses = t.step, bottleneck.Bottleneck(), FiniteLoss()
    with contextlib.closing(batches(t, partial(begin_epoch, text=log.text))) as source:
        for epoch, micro_batches in source:
            if t.step == first:
                count_flops(t, micro_batches)
            step(t, micro_batches)
            timings = t.meter.end_step(t.step)
            losses.check(log.step(t.step, epoch, t.scalars, timings))
            if warning := times.add(t, timings):
                log.text(warning)
            number = signals.received()
            if number or checkpoint_due(t):
                timings = t.meter.flush()
                losses.check(log.flush(timings))
                times.add(t, timings)
                saved = save(t, log, losses.problem(), needed=bool(number))
            if number and t.step < t.total_steps:
                log.text(
                    f"stopped by {signal.Signals(number).name} at step {t.step} of {t.total_steps}; "
                    f"checkpoint {saved}; continue with --resume"
                )
                log.close()
                raise ending.Stopped(number)
            if t.step % t.loader.steps == 0 or t.step == t.total_steps:
                end_epoch(t, log)
    timings = t.meter.flush()
    times.add(t, timings)
    log.close(timings)
    if summary := times.summary(t):
        log.text(summary)


def begin_epoch(t: Trainer, start: int = 0, text: Callable[[str], None] = print) -> np.ndarray | None:
    """Call what happens before step `start` of an epoch; returns the method's order of the samples, if it has one.  A
    run that continues inside an epoch finds the labels of a method that clusters in its buffers."""
    for hook in t.hooks:
        hook.before_epoch(t)
    if start == 0 and hasattr(t.method, "before_epoch"):
        note = t.method.before_epoch(t.epoch, partial(extract_outputs, t))
        if note:
            text(f"epoch {t.epoch}: {note}")
    return t.method.order(t.epoch) if hasattr(t.method, "order") else None


def batches(
    t: Trainer, begin: Callable[[Trainer, int], np.ndarray | None] = begin_epoch
) -> Generator[tuple[int, list[Batch]]]:
    """(epoch, this rank's micro-batches) of one step after another, from `t.step` to the last of the run.

    Where an epoch begins, or goes on after a resume, `t.epoch` is set and `begin(t, step in the epoch)` is called,
    which returns the order of the samples (None: the epoch's permutation)."""
    position = t.step
    while position < t.total_steps:
        t.epoch, start = divmod(position, t.loader.steps)
        count = min(t.loader.steps - start, t.total_steps - position)
        with contextlib.closing(t.loader.epoch(t.epoch, start, begin(t, start))) as source:
            for _ in range(count - 1):
                yield t.epoch, _next(t, source)
            last = _next(t, source)
        yield t.epoch, last  # the loader is free: at the end of an epoch hooks read its file
        position += count


def _next(t: Trainer, source: Iterator[Batch]) -> list[Batch]:
    with t.meter.phase("data"):
        return list(itertools.islice(source, t.loader.sampler.micro))


def end_epoch(t: Trainer, log: Log) -> None:
    """Call the hooks and log what they measure."""
    t.scalars = {}
    for hook in t.hooks:
        hook.after_epoch(t)
    log.epoch(t.step, t.epoch, t.scalars)


class FiniteLoss:
    """Whether the loss is still finite, by the records that have arrived from the device."""

    def __init__(self) -> None:
        self.bad: list[dict] = []  # records of the last steps, whose loss is NaN or infinite

    def check(self, records: list[dict]) -> None:
        """ValueError where the loss is not finite in BAD_STEPS steps in a row.  Steps that fp16 skipped because its
        scale was too high do not count."""
        for record in records:
            skipped = record.get("applied") is False and record.get("loss_scale", 1.0) > 1.0
            if "loss" not in record or skipped:
                continue
            self.bad = [] if math.isfinite(record["loss"]) else [*self.bad, record]
            if len(self.bad) >= BAD_STEPS:
                raise ValueError(self.problem())

    def problem(self) -> str | None:
        """What is wrong with the last losses; None: nothing."""
        if not self.bad:
            return None
        first = self.bad[0]
        return f"the loss is {first['loss']} since step {first['step']} (epoch {first['epoch']}): {REMEDY}"


def checkpoint_due(t: Trainer) -> bool:
    """Whether a checkpoint is written after this step: the last one, or one of the intervals of `run.log`."""
    log = t.run.log
    interval = log.checkpoint_steps or round(log.checkpoint_epochs * t.loader.steps)
    kept = round(log.keep_every * t.loader.steps)
    return t.step == t.total_steps or any(n and t.step % n == 0 for n in (interval, kept))


def save(t: Trainer, log: Log, problem: str | None, needed: bool) -> Path | None:
    """Write a checkpoint, unless the loss (`problem`) or a weight is not finite: it would take the place of a good one.
    Then ValueError where the run ends here (`needed`, the last step), else a line in the log."""
    if problem is None and not zero.all_finite(t.method):
        problem = f"weights are not finite after step {t.step} (epoch {t.epoch}): {REMEDY}"
    if problem is None:
        return state.save(t)
    if needed or t.step == t.total_steps:
        raise ValueError(f"{problem}; no checkpoint of step {t.step} is written")
    log.text(f"step {t.step}: no checkpoint is written: {problem}")
    return None


def opening(t: Trainer) -> str:
    """What is trained on what, in one line."""
    optim, world, epochs = t.run.optim, dist.world(), t.total_steps / t.loader.steps
    device = torch.cuda.get_device_name(t.device) if t.device.type == "cuda" else "CPU"
    classes = f", {len(t.loader.classes)} classes" if t.loader.classes else ""
    return (
        f"{type(t.method).__name__}, {t.run.backbone.name}: {t.loader.samples} images{classes}, {t.total_steps} "
        f"steps of {optim.batch} images ({epochs:.4g} epochs); {world} {'rank' if world == 1 else 'ranks'} on "
        f"{device}, {optim.precision}; run folder {t.folder}"
    )


def closing(t: Trainer) -> str:
    """Where the result is and the command to look at it."""
    if not t.loader.classes:
        return f"done: {t.folder}; next: fastssl report {t.folder}"
    test = "" if t.run.data.test else " --test TEST.beton"
    return f"done: {t.folder}; next: fastssl eval knn {t.folder}{test}"
