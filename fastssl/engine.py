"""The training loop and its step.  The loop is one function, phases in execution order; the step is exact on any number
of ranks and micro-batches.  A loss that is a mean over samples is accumulated as usual.  For any other, K micro-batches
are embedded without gradients, the loss of the whole global batch gives the gradient of every embedding once, and each
micro-batch is replayed against it (GradCache, https://arxiv.org/abs/2101.06983).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from fastssl import backbones, config, contract, dist, ending, graph, limits, norm, optim, weights, zero
from fastssl import checkpoint as state
from fastssl import hooks as monitors
from fastssl import views as recipes
from fastssl.amp import DTYPES, LossScale, emulated
from fastssl.config import Run
from fastssl.kernels.augment import make_views
from fastssl.loader import Batch, Loader
from fastssl.log import REMEDY, Log
from fastssl.meters import Meter


class Method(Protocol):
    """What the engine asks of a method, an nn.Module.  Every tensor that `forward` returns has one row per sample.

    A method that clusters may also have `before_epoch(epoch, survey) -> str to log or None`, called before the first
    step of an epoch, with `survey` as below; and `order(epoch) -> (N,) sample numbers` to train on instead of the
    epoch's permutation, a function of `epoch` and of buffers that stay until the next `before_epoch`.  `freeze_epochs`
    is {pattern of parameters' names: epochs in which the optimizer leaves them and its state for them}.  `evaluated` is
    the name of the backbone to evaluate and export where that is another one than `backbone` (a teacher's: "target.0");
    `exact_views`: True where pixels are targets, too, and must not be rounded to 16 bits with the network's;
    `total_steps`, where a method has it, becomes the run's; `least_batch` the fewest images of a global batch that its
    loss can compare (1 where it is absent).
    `mean_loss = True` says that the loss and the scalars beside it are means over samples, and that each sample's term
    depends on its own outputs and on buffers alone, not on other samples of the batch.  Micro-batches then need one
    forward each instead of two.  Where the mean is a weighted one, `total_weight(batch) -> 0-dim tensor` gives the
    number by which the sum over the samples of `batch` is divided, equal on all ranks and computed without a forward.
    `progress` is the share of the run's steps that came before this one, as BYOL's and DINO's schedules have it.
    A step may be captured in a CUDA graph, and is the same function when it is not: `progress` and the batch's `epoch`
    and `step` are then 0-dim tensors on the device.  A method that decides by the epoch on the host has
    `phase(epoch) -> hashable`, anew captured where it changes, and is given the number; one that cannot be captured has
    `not_static`, the reason.  Where `found_inf` is not zero (fp16 overflowed), `after_step` changes nothing; without
    this argument it is not called then, for which the host waits for the device every step.
    Initial values for the backbone belong into its Config's `init_backbone(backbone)`, which is called before
    `backbone.pretrained` is loaded.
    """

    views: int | None  # how many views its recipe must give; None: any number
    backbone: nn.Module

    def forward(self, views: list[Tensor], batch: Batch) -> dict[str, Tensor]: ...  # every trainable parameter acts
    def loss(self, out: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]: ...  # "loss", and scalars to log

    def after_step(
        self, out: dict[str, Tensor], batch: Batch, progress: float | Tensor, found_inf: Tensor | None = None
    ) -> None: ...  # EMA, queue, bank


@dataclass
class Trainer:
    """The state of a run: what the loop moves and what hooks may look at."""

    run: Run
    folder: Path
    device: torch.device
    method: nn.Module
    ds: Any  # DeepSpeed's engine around `method`
    schedule: optim.Schedule
    loader: Loader
    total_steps: int
    step: int = 0  # optimizer steps done, skipped ones included
    epoch: int = 0
    scale: LossScale | None = None
    values: graph.Values | None = None  # of the step in progress, on the device
    graphed: graph.Graphed | None = None  # the step that goes around DeepSpeed's; None: DeepSpeed makes it
    hooks: list = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)  # of the step in progress

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps

    def log(self, scalars: dict[str, Any]) -> None:
        """Add numbers to this step's record."""
        self.scalars.update(scalars)

    @contextlib.contextmanager
    def plain_backbone(self):
        """The backbone as an ordinary module with equal buffers on all ranks, for evaluation; ZeRO-3's is a copy."""
        dist.sync_buffers(self.method)
        module = self.method.get_submodule(getattr(self.method, "evaluated", "backbone"))
        if self.run.speed.zero < 3:
            yield module
            return
        copy = backbones.build(self.run.backbone).to(self.device)
        copy.load_state_dict(zero.full_state_dict(module, everywhere=True))
        yield copy


def fit(
    run: Run,
    hooks: list | None = None,
    *,
    resume: bool | str | Path = False,
    force: bool = False,
    device: str | None = None,
) -> Trainer:
    """Train `run` to its end, or to a signal: SystemExit then, after a checkpoint (docs/runs.md).

    `hooks`: None for those that `run.log` asks for (kNN, probe, collapse); a list takes their place.  `resume`: True
    continues from the newest complete checkpoint of the run's folder, a path from that one.  `force`: start anew over
    the folder's checkpoints."""
    config.validate(run)
    where = dist.init(device)
    if emulated(run.optim.precision, where):
        if dist.is_main():
            print(
                f"optim.precision={run.optim.precision}: this CPU has no instructions for it and would emulate it, "
                "many times slower; training in fp32"
            )
        run = replace(run, optim=replace(run.optim, precision="fp32"))
    hooks = monitors.of(run) if hooks is None else hooks
    with state.claimed(run):
        checkpoint = state.find(run, resume, force)
        t = build(run, hooks, device)
        log = Log(t.folder, every=run.log.every, total_steps=t.total_steps, tensorboard=run.log.tensorboard)
        if checkpoint:
            state.load(t, checkpoint, log.text)
            state.begin(t, checkpoint, clear=resume is not True)
            log.truncate(t.step)
            log.text(f"continuing {checkpoint}")
        else:
            state.begin(t)
            log.text(t.schedule.table)
        state.note_environment(t)
        log.text(opening(t))
        if choice := limits.chosen(t):
            log.text(choice)
        with ending.Signals(t.device) as signals:
            train(t, log, signals)
        log.text(closing(t))
    return t


def train(t: Trainer, log: Log, signals: ending.Signals) -> None:
    """The loop: from step `t.step` to the last."""
    spent = limits.Limits()
    meter = Meter(t.device, batch=t.run.optim.batch, precision=t.run.optim.precision)
    count = t.run.optim.batch // dist.world() // micro_batch(t.run)
    while t.step < t.total_steps:
        t.epoch, start = divmod(t.step, t.loader.steps)
        for hook in t.hooks:
            hook.before_epoch(t)
        order = before_epoch(t, start, log.text)
        with contextlib.closing(t.loader.epoch(t.epoch, start, order)) as source:
            for _ in range(start, min(t.loader.steps, t.total_steps - t.step + start)):
                with meter.phase("data"):
                    batches = list(itertools.islice(source, count))
                t.scalars = {"lr": t.schedule.set_lr(t.ds.optimizer, t.step)}
                out, batch = train_step(t, batches, meter)
                t.step += 1
                for hook in t.hooks:
                    hook.after_step(t, out, batch)
                records = meter.end_step(t.step)
                log.step(t.step, t.epoch, t.scalars, records)
                if warning := spent.add(t, records):
                    log.text(warning)
                stop = signals.agreed()
                if stop or checkpoint_due(t):
                    records = meter.flush()
                    log.flush(records)
                    spent.add(t, records)
                    saved = save(t, log, needed=bool(stop))
                if stop and t.step < t.total_steps:
                    log.text(
                        f"stopped by {signal.Signals(stop).name} at step {t.step} of {t.total_steps}; "
                        f"checkpoint {saved}; continue with --resume"
                    )
                    log.close()
                    raise ending.Stopped(stop)
        if t.step % t.loader.steps == 0 or t.step == t.total_steps:
            t.scalars = {}
            for hook in t.hooks:
                hook.after_epoch(t)
            log.epoch(t.step, t.epoch, t.scalars)
    records = meter.flush()
    spent.add(t, records)
    log.close(records)
    if summary := spent.summary(t):
        log.text(summary)


def save(t: Trainer, log: Log, needed: bool) -> Path | None:
    """Write a checkpoint, unless the last loss or a weight is not finite: it would take the place of a good one.  Then
    ValueError where the run ends here (`needed`, the last step), else a line in the log."""
    problem = log.lost()
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


def before_epoch(t: Trainer, start: int, say: Callable[[str], None] = print) -> np.ndarray | None:
    """Let a method that clusters do so; returns its order of the samples.  A run that continues inside an epoch finds
    the labels in the method's buffers."""
    if start == 0 and hasattr(t.method, "before_epoch"):
        note = t.method.before_epoch(t.epoch, partial(survey, t))
        if note:
            say(f"epoch {t.epoch}: {note}")
    return t.method.order(t.epoch) if hasattr(t.method, "order") else None


@torch.no_grad()
def survey(t: Trainer, name: str, augmented: bool = False, training: bool = False) -> tuple[Tensor, Tensor]:
    """Output `name` of the method, in evaluation mode, on this rank's share of the training set: rows (n, ...) and
    sample numbers (n,).  It is shown the evaluation view, or (`augmented`) the views that it will be trained on.

    `training`: in training mode and in the epoch's order, so that batch norm takes the statistics of mixed batches; the
    images that are left over for an incomplete batch see the running statistics.  These are as before in the end."""
    dist.sync_buffers(t.method)
    loader, data, statistics = t.loader.in_file_order(), t.run.data, norm.RunningStatistics(t.method)
    loader.shuffle = training
    views = data.views if augmented else (data.eval_view or recipes.default_view(data.views[0], loader.card),)
    rows, index = [], []
    with contextlib.closing(loader.epoch(t.epoch)) as source:
        for step in range(loader.steps):
            batch, whole = next(source, None), (step + 1) * loader.batch <= loader.samples
            if training and not whole:
                dist.sync_buffers(t.method)
            with contextlib.nullcontext() if training and whole else backbones.evaluating(t.ds):
                if batch is not None:
                    rows.append(t.ds(make(t, batch, views), batch)[name])
                    index.append(batch.index)
                else:  # the last batch has no image for this rank, and under ZeRO-3 forward takes all ranks
                    blank = Batch(*[torch.zeros(1, dtype=torch.int64, device=t.device)] * 4, t.epoch, 0)
                    some = t.ds([torch.zeros(1, 3, v.size, v.size, device=t.device) for v in views], blank)[name]
                    rows.append(some[:0])
    statistics.restore()
    return torch.cat(rows), torch.cat(index or [blank.index[:0]])


def train_step(t: Trainer, batches: list[Batch], meter: Meter) -> tuple[dict[str, Tensor], Batch]:
    """One optimizer step on this rank's share of a global batch, given as micro-batches, up to the method's
    `after_step`.  Returns the share's detached outputs and its batch; the method's scalars are logged."""
    progress = t.step / t.total_steps
    if t.graphed is not None:
        return direct_step(t, batches, progress, meter)
    t.scale.announce(t.ds)
    if len(batches) == 1:
        (batch,) = batches
        with meter.phase("views"):
            views = make(t, batch)
        with meter.phase("forward"):
            out = t.ds(views, batch)
            losses = t.method.loss(out, batch)
        with meter.phase("backward"):
            t.scale.backward(t.ds, losses["loss"])
    else:
        batch = merge(batches)
        out, losses = of_micro_batches(t, batches, batch, meter)
    out = {name: value.detach() for name, value in out.items()}
    with meter.phase("optimizer"):
        applied = t.scale.step(t.ds)
        if applied:
            t.method.after_step(out, batch, progress)
    t.log({name: value.detach() if isinstance(value, Tensor) else value for name, value in losses.items()})
    t.log({"loss_scale": t.scale.value, "applied": applied})
    return out, batch


def direct_step(t: Trainer, batches: list[Batch], progress: float, meter: Meter) -> tuple[dict[str, Tensor], Batch]:
    """`train_step` at ZeRO 0, where the host waits for nothing; one micro-batch as a replay of a CUDA graph if there is
    one.  DeepSpeed only counts it: its own step reads numbers from the device, and does work for one rank that several
    need."""
    batch = batches[0] if len(batches) == 1 else merge(batches)
    t.values.write(batch, t.ds.optimizer.param_groups, progress)
    phase = t.method.phase(batch.epoch) if hasattr(t.method, "phase") else None
    frozen = tuple(group["frozen"] for group in t.ds.optimizer.param_groups)  # by optim.Schedule
    if len(batches) > 1:
        out, losses = of_micro_batches(t, batches, batch, meter)
        out, scalars = update(t, out, losses, batch, meter.phase)
    elif t.graphed.ready(batch, (phase, frozen)):
        with meter.phase("step"):
            out, scalars = t.graphed.replay(batch)
    else:
        out, scalars = t.graphed.function(batch, meter.phase)
    t.ds.global_steps += 1
    t.ds.micro_steps += 1
    t.ds.global_samples += t.ds.train_batch_size()
    t.log(scalars)
    return out, batch


def static_step(t: Trainer, batch: Batch, phase: Callable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The step as a function of tensors: reads nothing from the device and, beside shapes, nothing that changes on the
    host, so that it may be captured.  Returns detached outputs and the scalars to log."""
    values = t.values
    keyed = replace(batch, epoch=values.epoch, step=values.step, place=None if batch.place is None else values.place)
    seen = keyed
    if hasattr(t.method, "phase"):  # it decides on the host by the epoch's number; a graph holds for one phase
        seen = replace(keyed, epoch=batch.epoch)
    elif hasattr(t.method, "not_static"):
        seen = batch
    with phase("views"):
        views = make(t, keyed)
    with phase("forward"):
        out = t.method.forward(views, seen)
        losses = t.method.loss(out, seen)
    with phase("backward"):
        t.method.zero_grad()  # of a capture that broke off
        t.scale.scaled(losses["loss"]).backward()
    return update(t, out, losses, seen, phase)


def update(t: Trainer, out: dict[str, Tensor], losses: dict, batch: Batch, phase: Callable):
    """The second half of a step: what follows from this rank's gradients.  Reads nothing from the device.  Returns
    detached outputs and the scalars to log."""
    values, groups = t.values, t.ds.optimizer.param_groups
    out = {name: value.detach() for name, value in out.items()}
    params = [p for p in t.method.parameters() if p.requires_grad]
    with phase("backward"):
        grads = average_gradients(params)
    with phase("optimizer"), values.lent(groups, t.run.optim.weight_decay_end is not None):
        found_inf = t.scale.unscale_(grads)
        if t.run.optim.clip and not t.run.optim.clip_each:
            clip_(grads, t.run.optim.clip)
        t.ds.optimizer.found_inf = found_inf
        t.ds.optimizer.step()
        t.method.zero_grad()
        if found_inf is None:
            t.method.after_step(out, batch, values.progress)
        else:
            t.method.after_step(out, batch, values.progress, found_inf=found_inf)
        t.scale.update_()
    scalars = {name: value.detach() if isinstance(value, Tensor) else value for name, value in losses.items()}
    return out, scalars | (
        {"loss_scale": t.scale.scale.clone(), "applied": found_inf == 0}
        if t.scale.dynamic
        else {"loss_scale": 1.0, "applied": True}
    )


@torch.no_grad()
def average_gradients(params: list[Tensor], most: int = 500_000_000) -> list[Tensor]:
    """Every parameter's gradient, averaged over ranks in place, in blocks of about `most` elements as DeepSpeed's; a
    parameter without one gets zeros, for its weight decay."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    block, size = [], 0
    for i, g in enumerate(grads if dist.world() > 1 else ()):
        block.append(g)
        size += g.numel()
        if size > most or i == len(grads) - 1:
            flat = dist.sum_(torch.cat([b.flatten() for b in block])).mul_(1 / dist.world())
            parts = flat.split([b.numel() for b in block])
            torch._foreach_copy_(block, [part.view_as(b) for part, b in zip(parts, block)])
            block, size = [], 0
    return grads


@torch.no_grad()
def clip_(grads: list[Tensor], most: float) -> None:
    """Shorten the gradient of all parameters together to the length `most`."""
    norm = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))


def of_micro_batches(t: Trainer, batches: list[Batch], batch: Batch, meter: Meter) -> tuple[dict[str, Tensor], dict]:
    """Forward and backward of several micro-batches; outputs and scalars of their union `batch`."""
    accumulate = accumulated_step if getattr(t.method, "mean_loss", False) else cached_step
    return accumulate(t, batches, batch, meter)


def backward(t: Trainer, loss: Tensor) -> None:
    """Of a micro-batch: `update` or DeepSpeed averages the sum of all over ranks."""
    if t.graphed is None:
        t.scale.backward(t.ds, loss)
    else:
        t.scale.scaled(loss).backward()


def accumulated_step(t: Trainer, batches: list[Batch], batch: Batch, meter: Meter):
    """Forward and backward of one micro-batch after the other, for a loss that is a mean over samples.  Returns the
    outputs and the scalars of all of them together, detached."""
    statistics, outs, scalars = norm.RunningStatistics(t.method), [], {}
    forward, weigh = t.ds if t.graphed is None else t.method.forward, getattr(t.method, "total_weight", None)
    share = len(batches[0].index) / len(batch.index)
    for i, micro in enumerate(batches):
        t.ds.set_gradient_accumulation_boundary(i == len(batches) - 1)
        with meter.phase("views"):
            views = make(t, micro)
        with meter.phase("forward"):
            out = forward(views, micro)
            losses = t.method.loss(out, micro)
            if weigh is not None:
                share = (weigh(micro).double() / weigh(batch)).to(losses["loss"].dtype)
            losses = {name: share * value for name, value in losses.items()}
        with meter.phase("backward"):
            backward(t, losses["loss"])
        statistics.add()
        outs.append({name: value.detach() for name, value in out.items()})
        for name, value in losses.items():
            scalars[name] = scalars.get(name, 0) + (value.detach() if isinstance(value, Tensor) else value)
    statistics.settle(len(batches))
    return {name: torch.cat([o[name] for o in outs]) for name in outs[0]}, scalars


def cached_step(t: Trainer, batches: list[Batch], batch: Batch, meter: Meter):
    """Forward and backward of several micro-batches with the loss of all of them together."""
    statistics, states, outs = norm.RunningStatistics(t.method), [], []
    forward = t.ds if t.graphed is None else t.method.forward
    for micro in batches:
        with meter.phase("views"):
            views = make(t, micro)
        with meter.phase("forward", counted=False), torch.no_grad():
            states.append(state.random_states(t.device))
            outs.append(forward(views, micro))
    statistics.restore()
    with meter.phase("forward"):
        leaves = {name: torch.cat([o[name] for o in outs]) for name in outs[0]}
        floats = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf.is_floating_point()}
        losses = t.method.loss(leaves, batch)
    with meter.phase("backward"):
        grads = torch.autograd.grad(losses["loss"], list(floats.values()), allow_unused=True)
        grads = {name: g.chunk(len(batches)) for name, g in zip(floats, grads) if g is not None}
    for i, micro in enumerate(batches):
        last = i == len(batches) - 1
        t.ds.set_gradient_accumulation_boundary(last)
        with meter.phase("views"):
            views = make(t, micro)
        with meter.phase("forward"):
            state.set_random_states(states[i], t.device)
            out = forward(views, micro)
            surrogate = sum((out[name] * g[i]).sum() for name, g in grads.items() if out[name].requires_grad)
        with meter.phase("backward"):
            backward(t, surrogate)
        statistics.add()
    statistics.settle(len(batches))
    return leaves, losses


def make(t: Trainer, batch: Batch, views: tuple | None = None) -> list[Tensor]:
    key = batch.index
    if batch.place is not None:  # a sample that comes twice in an epoch looks different each time
        key = torch.arange(len(key), device=key.device) + batch.place
    dtype = torch.float32 if getattr(t.method, "exact_views", False) else DTYPES[t.run.optim.precision]
    return make_views(
        batch.pixels,
        batch.sizes,
        key,
        views or t.run.data.views,
        seed=t.run.seed,
        epoch=batch.epoch,
        dtype=dtype,
        impl=t.run.speed.kernels,
    )


def merge(batches: list[Batch]) -> Batch:
    """Index and labels of all micro-batches; their pixels stay apart."""
    cat = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("sizes", "index", "label")}
    return replace(batches[0], pixels=batches[0].pixels[:0], **cat)


def build(run: Run, hooks: list = (), device: str | None = None) -> Trainer:
    """Everything that a run needs, checked before any step is made."""
    config.validate(run)
    contract.check_config(run.method)
    hooks = [contract.check_hook(hook) for hook in (*hooks, *run.hooks)]
    backbones.check_sizes(run.backbone, [v.size for v in (*run.data.views, run.data.eval_view) if v is not None])
    where = dist.init(device)
    deterministic(run.deterministic)
    if where.type == "cuda":  # losses are computed in fp32; beside a 16-bit network their products may use tensor cores
        torch.set_float32_matmul_precision("highest" if run.optim.precision == "fp32" else "high")
    micro = micro_batch(run)
    loader = Loader(
        run.data.train,
        run.optim.batch,
        seed=run.seed,
        device=where,
        workers=run.speed.workers,
        micro=run.optim.batch // dist.world() // micro,
        resident=run.speed.resident,
    )
    if run.backbone.in_channels != 3:
        raise ValueError(
            f"backbone.in_channels={run.backbone.in_channels}: views have 3 channels, of grey images too; leave it at 3"
        )
    torch.manual_seed(run.seed)  # the same weights, queue and bank on every rank
    method = prepare(build_method(run, loader), run, where)
    settings = optim.frozen(run.optim, getattr(method, "freeze_epochs", {}))
    optimizer, schedule = optim.build(
        method.named_parameters(), settings, steps_per_epoch=loader.steps, impl=run.speed.kernels
    )
    if hasattr(method, "total_steps"):
        method.total_steps = schedule.total_steps
    torch.manual_seed(run.seed + 1 + dist.rank())  # dropout and the like differ by rank
    ds = start_deepspeed(method, optimizer, run, micro)
    optim.attach(ds)
    t = Trainer(
        run,
        state.run_folder(run),
        where,
        method,
        ds,
        schedule,
        loader,
        schedule.total_steps,
        scale=LossScale(run.optim.precision, "cpu" if run.speed.zero else where),
        hooks=hooks,
    )
    t.values = graph.Values(len(ds.optimizer.param_groups), where)
    why = by_deepspeed(t)
    if why is None:
        t.graphed = graph.Graphed(partial(static_step, t), not_captured(t))
    why = why or t.graphed.reason
    if dist.is_main() and why and (run.speed.graph == "on" or (run.speed.graph == "auto" and where.type == "cuda")):
        print(f"speed.graph={run.speed.graph}: the step is not a CUDA graph: {why}")
    return t


def by_deepspeed(t: Trainer) -> str | None:
    """Why a step must go through DeepSpeed; None: it need not."""
    run, more = t.run, sorted(set(t.run.deepspeed) - {"zero_optimization"})
    if run.speed.zero:
        return f"ZeRO {run.speed.zero} reads numbers from the device; use speed.zero=0"
    if t.ds.optimizer is not t.ds.basic_optimizer:
        return f"the optimizer is DeepSpeed's {type(t.ds.optimizer).__name__}"
    if more:
        return f"deepspeed={{{more[0]!r}: ...}} acts in DeepSpeed's own step"
    if run.optim.precision == "fp16" and "found_inf" not in inspect.signature(t.method.after_step).parameters:
        return f"{type(t.method).__name__}.after_step has no found_inf: the host must know of an overflow"
    return None


def not_captured(t: Trainer) -> str | None:
    """Why a step that could be captured is not; None: it is."""
    run = t.run
    if run.speed.graph == "off":
        return "speed.graph=off"
    if t.loader.micro > 1:
        return "it has several micro-batches (speed.micro_batch)"
    if t.device.type != "cuda":
        return "it needs a CUDA device"
    if run.speed.graph == "auto" and dist.world() > 1:
        return "not measured on several ranks yet; speed.graph=on captures it"
    if run.speed.graph == "auto" and not type(t.method).__module__.startswith("fastssl.methods."):
        return f"{type(t.method).__name__} may count on the host; if it does not, speed.graph=on captures it"
    if run.speed.kernels == "reference":
        return "speed.kernels=reference reads numbers from the device"
    waits = [type(op).__name__ for view in run.data.views for op in view.extra if getattr(op, "waits", False)]
    return f"{waits[0]} of a view's extra waits for the device" if waits else getattr(t.method, "not_static", None)


def build_method(run: Run, loader: Loader) -> nn.Module:
    """The method around its backbone.  Weights are loaded after everything that initialises the backbone and before
    anything that copies it; a method that writes to it later is refused."""
    backbone, pretrained = backbones.build(run.backbone, run.method), run.backbone.pretrained
    if (run.backbone.frozen or run.backbone.norm == "frozen") and not pretrained:
        raise ValueError(
            "backbone.frozen and backbone.norm='frozen' keep pretrained weights as they are: give backbone.pretrained"
        )
    if pretrained:
        report = weights.load_backbone(pretrained, backbone)
        if dist.is_main():
            print(report)
    with weights.unchanged(backbone) if pretrained else contextlib.nullcontext():
        method = run.method.build(
            backbone, samples=loader.samples, classes=loader.classes, batch=run.optim.batch, kernels=run.speed.kernels
        )
    contract.check_method(method, run.method)
    check_views(method, run.data.views)
    if run.optim.batch < getattr(method, "least_batch", 1) and dist.is_main():
        warnings.warn(
            f"optim.batch={run.optim.batch}: the loss of {type(method).__name__} compares the images of a "
            "batch, and one image has none to be compared with; use a larger optim.batch (it counts the "
            "images of all GPUs together; speed.micro_batch bounds the memory)",
            stacklevel=2,
        )
    return method


def micro_batch(run: Run) -> int:
    """Images per rank and pass, checked."""
    batch, world = run.optim.batch, dist.world()
    if batch % world:
        raise ValueError(f"optim.batch={batch} is not a multiple of the {world} ranks")
    share = batch // world
    micro = min(run.speed.micro_batch or share, share)  # with more ranks a share may be smaller: one pass holds it
    if share % micro:
        raise ValueError(f"speed.micro_batch={micro} does not divide a rank's share, {share} of optim.batch={batch}")
    return micro


def check_views(method: nn.Module, views: tuple) -> None:
    if method.views is not None and len(views) != method.views:
        raise ValueError(
            f"{type(method).__name__} needs a recipe of {method.views} views, data.views gives {len(views)}"
        )


def prepare(method: nn.Module, run: Run, device: torch.device) -> nn.Module:
    """Layout, synchronised batch norm, precision and compilation, in the order in which they must happen."""
    if run.sync_bn:
        method = norm.convert_sync_bn(method, device)
    if run.speed.channels_last:
        backbones.channels_last_(method)
    method.to(device).train()
    forward, dtype = method.forward, DTYPES[run.optim.precision]
    if run.speed.compile:
        if run.speed.zero == 3:
            raise ValueError("speed.compile=True: the hooks of speed.zero=3 break the graph; use ZeRO 0 to 2")
        forward = torch.compile(forward)

    def precise(views: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        # Autocast here and not in DeepSpeed: weights, normalisation and statistics stay fp32 at every ZeRO stage.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = contract.check_output(method, forward(views, batch), len(batch.index))
        return {name: v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for name, v in out.items()}

    method.forward, loss = precise, method.loss
    method.loss = lambda out, batch: contract.check_losses(method, loss(out, batch))
    return method


def start_deepspeed(method: nn.Module, optimizer: torch.optim.Optimizer, run: Run, micro: int):
    deepspeed.utils.logger.setLevel("WARNING")
    # Its shared-memory all-reduce for CPUs is compiled for half a minute at the first start; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,  # the engine accumulates, with the loss of the whole batch
        # DeepSpeed 0.19 clips at 1.0 when nothing is said
        "gradient_clipping": 0.0 if run.optim.clip_each else run.optim.clip,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step; ours never does
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.speed.zero,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,  # EMA moves shards; a kept whole copy would go stale
        },
    }
    for key, value in run.deepspeed.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return deepspeed.initialize(model=method, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def deterministic(on: bool) -> None:
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on


def checkpoint_due(t: Trainer) -> bool:
    log = t.run.log
    every = log.checkpoint_steps or round(log.checkpoint_epochs * t.loader.steps)
    kept = round(log.keep_every * t.loader.steps)
    return t.step == t.total_steps or any(n and t.step % n == 0 for n in (every, kept))
