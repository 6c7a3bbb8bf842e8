"""`fit` trains a run; the training loop is one function, `train`."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fastssl import agreement, bottleneck, config, contract, dist, ending, memory, nonfinite
from fastssl import hooks as monitors
from fastssl.amp import emulated
from fastssl.build import build
from fastssl.checkpoint import run_folder, state
from fastssl.checkpoint.resume import describe_changes, find_checkpoint
from fastssl.checkpoint.writer import Writer, interval_in_steps
from fastssl.config import Run
from fastssl.files import untrusted
from fastssl.loader import Batch, Loader
from fastssl.log import Log
from fastssl.nonfinite import FiniteLossCheck, NotFinite
from fastssl.outputs import extract_outputs
from fastssl.step import count_flops, step
from fastssl.trainer import Trainer


def fit(
    run: Run,
    hooks: list | None = None,
    *,
    resume: bool | Literal["auto"] = False,
    resume_from: str | Path | None = None,
    force: bool = False,
    device: str | None = None,
    loader: Loader | None = None,
    config_file: str | Path | None = None,
) -> Trainer:
    """Train `run` to its end.  On a signal it writes a checkpoint and raises `ending.Stopped`, a SystemExit
    (docs/runs.md).

    `hooks`: the monitors; None: those that `run.log` names (kNN, probe, collapse).  `resume`: continue from the newest
    complete checkpoint of the run's folder, an error if there is none; "auto": or start a new run, or continue from
    `resume_from`, if the folder has no checkpoints.  `resume_from`: continue from this checkpoint.  `force`: delete the
    folder's checkpoints and start at step 0.  `device`: "cpu" or "cuda"; None: CUDA if there is one.  `loader`: None
    opens `data.train`.  `config_file`: that of `run`, which its folder records.

    Returns the trainer after the last step.  ValueError where the device has too little memory or a loss is not finite.
    """
    config.validate(run)
    device_used = dist.init(device)
    run = without_emulation(run, device_used)
    agreement.compare(run)
    hooks = monitors.from_config(run) if hooks is None else hooks
    with run_folder.locked(run, config_file), contextlib.ExitStack() as at_exit:
        agreement.check_folder(run_folder.path(run), run_folder.LOCK)
        start = find_checkpoint(run, resume, resume_from, force, config_file)
        t = build(run, hooks, device, loader)
        log = Log(t.folder, every=run.log.every, total_steps=t.total_steps, tensorboard=run.log.tensorboard)
        at_exit.callback(log.close_files)
        if start:
            run_folder.check_data(t, start)
            notes = state.load(t, start) + describe_changes(t, start)
            run_folder.prepare(t, start, clear=not resume)
            log.truncate(t.step)
            for note in notes:
                log.text(note)
            log.text(f"continuing {start}")
        else:
            run_folder.prepare(t)
            log.text(t.schedule.table)
        run_folder.record_environment(t, config_file)
        log.text(opening_line(t))
        if choice := bottleneck.automatic_settings(t):
            log.text(choice)
        not_finite: tuple[str, int] | None = None  # the message, and the step that failed
        out_of_memory: str | None = None
        started_at, first_step = time.monotonic(), t.step
        with ending.Signals(t.device) as signals, ending.progress.watched(run.timeout_s), Writer(t) as writer:
            try:
                train(t, log, signals, writer)
            except NotFinite as error:
                not_finite = str(error), error.step
            except torch.OutOfMemoryError as error:
                out_of_memory = untrusted.one_line(error)
        if out_of_memory is not None:
            raise ValueError(f"out of memory after step {t.step}: {memory.advice(t)} ({out_of_memory})")
        if not_finite is None:
            log.text(closing_line(t))
            return t
        message, failed_step = not_finite
        seconds_per_step = (time.monotonic() - started_at) / max(t.step - first_step, 1)
        loader, folder = t.loader, t.folder
        del t, writer
        gc.collect()  # the trainer is in cycles, and find_nonfinite builds another one in its memory
        found = find_nonfinite(run, device, loader, folder, start, failed_step, seconds_per_step)
        raise ValueError(f"{message}; {found}")


def find_nonfinite(
    run: Run,
    device: str | None,
    loader: Loader,
    folder: Path,
    start: Path | None,
    failed_step: int,
    seconds_per_step: float,
) -> str:
    """Which tensor made step `failed_step` of the run in `folder` fail, as a part of the message.

    `start`: the checkpoint that the run has continued from, used where the folder has none before that step.
    Where repeating the steps would take too long, the command that does it."""
    done_before = max(failed_step - 2, 0)  # the step before may have given the weights that make this one fail
    before = dist.on_main(nonfinite.checkpoint_before, folder, done_before) or start
    steps = done_before - (state.read(before)["step"] if before else 0)
    if dist.on_main(nonfinite.postpone, folder, before, failed_step, steps * seconds_per_step):
        return f"`fastssl replay` with the same arguments repeats {steps} steps and finds where it arises"
    return nonfinite.rerun(build_plain(run, device, loader), before, failed_step, batches)


def without_emulation(run: Run, device: torch.device) -> Run:
    """`run`, in fp32 where a CPU would emulate its precision, which is then printed."""
    if not emulated(run.optim.precision, device):
        return run
    if dist.is_main():
        print(
            f"optim.precision={run.optim.precision}: this CPU has no instructions for it and would emulate it, "
            "many times slower; training in fp32"
        )
    return replace(run, optim=replace(run.optim, precision="fp32", residual_in_fp32=True))


def build_plain(run: Run, device: str | None, loader: Loader | None = None) -> Trainer:
    """A trainer of the same steps without monitors, compilation and CUDA graphs, to look at single steps."""
    run = without_emulation(run, dist.init(device))
    return build(replace(run, hooks=(), speed=replace(run.speed, compile="off", graph="off")), (), device, loader)


def train(t: Trainer, log: Log, signals: ending.Signals, writer: Writer) -> None:
    """The training loop, from step `t.step` to the last."""
    first_step, step_times, loss_check = t.step, bottleneck.StepTimes(), FiniteLossCheck(t.run.optim.skip_nonfinite)
    with contextlib.closing(batches(t, partial(begin_epoch, text=log.text))) as source:
        for epoch, micro_batches in source:
            if t.step == first_step:
                count_flops(t, micro_batches)
            step(t, micro_batches)
            ending.progress.made(t.step)
            timings = t.meter.end_step(t.step)
            try:
                loss_check.check(log.step(t.step, epoch, t.scalars, timings))
            except NotFinite:
                # not raised yet: other ranks may not have this record; all of them receive FAIL after the same step
                signals.request(ending.FAIL)
            if writer.failed:
                signals.request(ending.FAIL)
            if warning := step_times.add(t, timings):
                log.text(warning)
            received = signals.received()
            if received == ending.FAIL:
                loss_check.check(log.flush(t.meter.flush()))
                writer.finish()  # on every rank, this or the check before raises
            due = received or checkpoint_due(t)
            if due:
                timings = t.meter.flush()
                loss_check.check(log.flush(timings))
                step_times.add(t, timings)
            if t.step % t.loader.steps == 0 or t.step == t.total_steps:
                end_epoch(t, log)  # before the checkpoint: a run that continues from it does not come here again
            if due:
                loss_check.check(log.flush())
                save(t, log, writer, loss_check, stopping=bool(received))
            if received and t.step < t.total_steps:
                log.text(
                    f"stopped by {signal.Signals(received).name} at step {t.step} of {t.total_steps}; "
                    f"checkpoint {writer.finish()}; continue with --resume"
                )
                log.close()
                raise ending.Stopped(received)
    writer.finish()
    timings = t.meter.flush()
    step_times.add(t, timings)
    log.close(timings)
    if summary := step_times.summary(t):
        log.text(summary)


def begin_epoch(t: Trainer, start: int = 0, text: Callable[[str], None] = print) -> np.ndarray | None:
    """Call every hook's `before_epoch`, and the method's if no step of the epoch has been made (`start` steps have).
    If a run resumes inside an epoch, the labels of a clustering method are in its saved buffers.  Returns the method's
    order of the samples, if it has one."""
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
    """Yields (epoch, this rank's micro-batches) for each step from `t.step` to the last of the run.

    Where an epoch begins, or continues after a resume, `t.epoch` is set and `begin(t, step in the epoch)` is called,
    which returns the order of the samples (None: the epoch's permutation)."""
    position = t.step
    while position < t.total_steps:
        t.epoch, start = divmod(position, t.loader.steps)
        count = min(t.loader.steps - start, t.total_steps - position)
        with contextlib.closing(t.loader.epoch(t.epoch, start, begin(t, start))) as source:
            for _ in range(count - 1):
                yield t.epoch, _next_micro_batches(t, source)
            last = _next_micro_batches(t, source)
        yield t.epoch, last  # after the loader is closed: at the end of an epoch hooks may read its file
        del last  # its memory is used again
        position += count


def _next_micro_batches(t: Trainer, source: Iterator[Batch]) -> list[Batch]:
    with t.meter.phase("data"):
        return list(itertools.islice(source, t.loader.sampler.micro_per_step))


def end_epoch(t: Trainer, log: Log) -> None:
    """Call the hooks and log what they measure."""
    t.scalars = {}
    for hook in t.hooks:
        contract.call_hook(hook, "after_epoch", t)
    log.epoch(t.step, t.epoch, t.scalars)


def checkpoint_due(t: Trainer) -> bool:
    """Whether a checkpoint is written after this step: the last one, or one of the intervals of `run.log`."""
    log, steps = t.run.log, t.loader.steps
    interval = log.checkpoint_steps or interval_in_steps(log.checkpoint_epochs, steps)
    kept = interval_in_steps(log.keep_every, steps)
    return t.step == t.total_steps or any(n and t.step % n == 0 for n in (interval, kept))


def save(t: Trainer, log: Log, writer: Writer, loss_check: FiniteLossCheck, stopping: bool) -> None:
    """Start writing a checkpoint.  If the loss or a weight is not finite, none is written, because it would replace a
    good one: NotFinite if the run ends here (`stopping`, or the last step), else a line in the log."""
    # a step that was skipped has changed nothing
    problem = (None if t.run.optim.skip_nonfinite else loss_check.problem()) or nonfinite.weights_problem(t)
    if problem is None:
        writer.save()
        return
    if stopping or t.step == t.total_steps:
        # with finite losses so far, the weights of this step will make the next one fail
        failed_step = loss_check.bad[0]["step"] if loss_check.bad else t.step + 1
        raise NotFinite(f"{problem}; no checkpoint of step {t.step} is written", failed_step)
    log.text(f"step {t.step}: no checkpoint is written: {problem}")


def opening_line(t: Trainer) -> str:
    """What is trained on what, in one line."""
    optim, world, epochs = t.run.optim, dist.world(), t.total_steps / t.loader.steps
    device = torch.cuda.get_device_name(t.device) if t.device.type == "cuda" else "CPU"
    classes = f", {len(t.loader.classes)} classes" if t.loader.classes else ""
    return (
        f"{type(t.method).__name__}, {t.run.backbone.name}: {t.loader.samples} images{classes}, {t.total_steps} "
        f"steps of {optim.batch} images ({epochs:.4g} epochs); {world} {'rank' if world == 1 else 'ranks'} on "
        f"{device}, {optim.precision}; run folder {t.folder}"
    )


def closing_line(t: Trainer) -> str:
    """Where the result is and the command to look at it."""
    if not t.loader.classes:
        return f"done: {t.folder}; next: fastssl report {t.folder}"
    test = "" if t.run.data.test else " --test TEST.beton"
    return f"done: {t.folder}; next: fastssl eval knn {t.folder}{test}"
