"""One training step, exact on any number of ranks and micro-batches.

A loss that is a mean over samples is accumulated over micro-batches as usual.  For any other loss: the forward of every
micro-batch without autograd; the loss over all outputs and its gradient with respect to them; the forward again with
autograd and the same random numbers, and the backward of sum(output * gradient) (GradCache,
https://arxiv.org/abs/2101.06983).  All micro-batches have the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastssl import contract, dist, norm
from fastssl.amp import DTYPES
from fastssl.checkpoint.state import random_states, set_random_states
from fastssl.gradients import average_gradients, clip_
from fastssl.kernels.augment import make_views
from fastssl.loader import Batch
from fastssl.meters import Flops
from fastssl.trainer import Outputs, Trainer

Timer = Callable[[str], AbstractContextManager]  # times what runs inside: Meter.phase


def step(t: Trainer, micro_batches: list[Batch]) -> Outputs:
    """One optimizer step on this rank's shard of a global batch: learning rates, gradients, update, then `after_step`
    of the method and of each hook.  Returns the detached outputs of the shard (zeros for a step that is skipped,
    optim.skip_nonfinite); what is to be logged is in `t.scalars`.

    The host never waits for the device here, except in `deepspeed_step` and in hooks.
    """
    t.scalars = {"lr": t.schedule.set_lr(t.deepspeed.optimizer, t.step)}
    batch = micro_batches[0] if len(micro_batches) == 1 else merge_without_pixels(micro_batches)
    make_step = deepspeed_step if t.capturable_step is None else pytorch_step
    out, scalars = make_step(t, micro_batches, batch)
    t.log(scalars)
    t.step += 1
    done = hooks_in_graph(t)
    for hook in t.hooks:
        if all(hook is not other for other in done):  # not ==, which a dataclass defines
            contract.call_hook(hook, "after_step", t, out, batch)
    return out


def save_statistics(t: Trainer) -> None:
    """Copy the running statistics of batch norm, where the step may be skipped."""
    if t.statistics is not None:
        t.statistics.save()


def hooks_in_graph(t: Trainer) -> list:
    """The hooks that `static_step` calls, which the CUDA graph captures; `step` calls the others after it.  With
    speed.graph="auto" there are none, because that has not been measured."""
    possible = t.capturable_step is not None and t.loader.sampler.micro_per_step == 1 and t.run.speed.graph == "on"
    return [hook for hook in t.hooks if possible and getattr(hook, "capturable", False)]


def deepspeed_step(t: Trainer, micro_batches: list[Batch], batch: Batch) -> tuple[Outputs, dict[str, Any]]:
    """A step by DeepSpeed's backward and update, which read numbers from the device.  Returns detached outputs and the
    scalars to log."""
    t.loss_scaler.pass_to_zero(t.deepspeed)
    save_statistics(t)
    if len(micro_batches) == 1:
        with t.meter.phase("views"):
            views = batch_views(t, batch)
        with t.meter.phase("forward"):
            out = t.deepspeed(views, batch)
            losses = t.method.loss(out, batch)
        with t.meter.phase("backward"):
            t.loss_scaler.backward(t.deepspeed, losses["loss"])
    else:
        out, losses = accumulate(t, micro_batches, batch)
    out = detached(out)
    with t.meter.phase("optimizer"):
        applied = t.loss_scaler.step(t.deepspeed)
        if applied:
            t.method.after_step(out, batch, t.step / t.total_steps)
        elif t.statistics is not None:
            t.statistics.restore_where(torch.ones((), dtype=torch.bool, device=t.device))
    return zeros_if_skipped(t, out), detached(losses) | {"loss_scale": t.loss_scaler.value, "applied": applied}


def pytorch_step(t: Trainer, micro_batches: list[Batch], batch: Batch) -> tuple[Outputs, dict[str, Any]]:
    """A step at ZeRO 0, in which the host does not wait for the device.  With one micro-batch and a captured CUDA
    graph, it replays the graph.  DeepSpeed's forward, backward and step are not called; only its counters are kept up
    to date."""
    assert t.capturable_step is not None, "without it DeepSpeed makes the step"
    t.step_inputs.write(batch, t.deepspeed.optimizer.param_groups, t.step / t.total_steps)
    method_key = t.method.graph_key(batch.epoch) if hasattr(t.method, "graph_key") else None
    frozen = tuple(group["frozen"] for group in t.deepspeed.optimizer.param_groups)  # by optim.Schedule
    if len(micro_batches) > 1:
        save_statistics(t)
        out, scalars = update(t, *accumulate(t, micro_batches, batch), batch, t.meter.phase)
    elif t.capturable_step.prepare_replay(batch, (method_key, frozen)):
        with t.meter.phase("step"):
            out, scalars = t.capturable_step.replay(batch)
    else:
        out, scalars = t.capturable_step.function(batch, t.meter.phase)
    t.deepspeed.global_steps += 1
    t.deepspeed.micro_steps += 1
    t.deepspeed.global_samples += t.deepspeed.train_batch_size()
    return out, scalars


def static_step(t: Trainer, batch: Batch, timer: Timer) -> tuple[Outputs, dict[str, Any]]:
    """The step as a function of tensors: it reads nothing from the device and, beside shapes, nothing that changes on
    the host, so that it can be captured.  Returns detached outputs and the scalars to log."""
    inputs = t.step_inputs
    tensor_batch = replace(  # the numbers are tensors, which `t.step_inputs` overwrites before every step
        batch, epoch=inputs.epoch, step=inputs.step, position=None if batch.position is None else inputs.position
    )
    method_batch = tensor_batch  # what the method's forward, loss and after_step get
    if hasattr(t.method, "graph_key"):  # it branches on the epoch, on the host; each key has its own graph
        method_batch = replace(tensor_batch, epoch=batch.epoch)
    elif hasattr(t.method, "not_capturable"):  # it may use the numbers on the host
        method_batch = batch
    save_statistics(t)
    with timer("views"):
        views = batch_views(t, tensor_batch)
    with timer("forward"):
        out = t.method.forward(views, method_batch)
        losses = t.method.loss(out, method_batch)
    with timer("backward"):
        t.method.zero_grad()  # gradients that a failed capture may have left
        t.loss_scaler.scaled(losses["loss"]).backward()
    out, scalars = update(t, out, losses, method_batch, timer)
    observed = replace(t, scalars=dict(scalars), step=t.step + 1)  # what hooks log is packed with the other scalars
    for hook in hooks_in_graph(t):
        contract.call_hook(hook, "after_step", observed, out, tensor_batch)
    contract.check_captured({name: value for name, value in observed.scalars.items() if name not in scalars})
    return out, observed.scalars


def update(
    t: Trainer, out: Outputs, losses: dict[str, Tensor], batch: Batch, timer: Timer
) -> tuple[Outputs, dict[str, Any]]:
    """The second half of a step: what follows from this rank's gradients.  Reads nothing from the device.  Returns
    detached outputs and the scalars to log."""
    out, groups = detached(out), t.deepspeed.optimizer.param_groups
    with timer("backward"):
        grads = average_gradients([p for p in t.method.parameters() if p.requires_grad])
    with timer("optimizer"), t.step_inputs.tensor_rates(groups, t.run.optim.weight_decay_end is not None):
        found_inf = t.loss_scaler.unscale_(grads)
        if t.run.optim.clip and not t.run.optim.clip_each:
            clip_(grads, t.run.optim.clip)
        t.deepspeed.optimizer.found_inf = found_inf
        t.deepspeed.optimizer.step()
        t.method.zero_grad()
        overflow = {} if found_inf is None else {"found_inf": found_inf}
        t.method.after_step(out, batch, t.step_inputs.progress, **overflow)
        t.loss_scaler.update_()
        if t.statistics is not None and found_inf is not None:
            t.statistics.restore_where(found_inf != 0)
    if found_inf is None:
        return out, detached(losses) | {"loss_scale": 1.0, "applied": True}
    scalars = detached(losses) | {"loss_scale": t.loss_scaler.scale.clone(), "applied": found_inf == 0}
    return zeros_if_skipped(t, out), scalars


def zeros_if_skipped(t: Trainer, out: Outputs) -> Outputs:
    """The outputs for hooks: zeros in a step that is skipped (optim.skip_nonfinite)."""
    if not t.loss_scaler.skip_nonfinite:
        return out
    skipped = t.loss_scaler.found_inf != 0
    return {name: v.masked_fill(skipped, 0.0) if v.is_floating_point() else v for name, v in out.items()}


def accumulate(t: Trainer, micro_batches: list[Batch], batch: Batch) -> tuple[Outputs, dict[str, Tensor]]:
    """Forward and backward of several micro-batches; outputs and losses of their union `batch`."""
    mean = getattr(t.method, "mean_loss", False)
    return (accumulate_mean if mean else accumulate_cached)(t, micro_batches, batch)


def accumulate_mean(t: Trainer, micro_batches: list[Batch], batch: Batch) -> tuple[Outputs, dict[str, Tensor]]:
    """For a loss that is a mean over samples: one forward and backward for each micro-batch.  All results are
    detached."""
    statistics, outs = norm.SavedStatistics(t.method), []
    scalars: dict[str, Tensor] = {}
    forward, total_weight = _forward(t), getattr(t.method, "total_weight", None)
    weight = len(micro_batches[0].index) / len(batch.index)
    for i, micro in enumerate(micro_batches):
        t.deepspeed.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        with t.meter.phase("views"):
            views = batch_views(t, micro)
        with t.meter.phase("forward"):
            out = forward(views, micro)
            losses = t.method.loss(out, micro)
            if total_weight is not None:
                weight = (total_weight(micro).double() / total_weight(batch)).to(losses["loss"].dtype)
            losses = {name: weight * value for name, value in losses.items()}
        with t.meter.phase("backward"):
            _backward(t, losses["loss"])
        statistics.add()
        outs.append(detached(out))
        for name, value in detached(losses).items():
            scalars[name] = scalars.get(name, 0) + value
    statistics.apply_mean(len(micro_batches))
    return {name: torch.cat([o[name] for o in outs]) for name in outs[0]}, scalars


def accumulate_cached(t: Trainer, micro_batches: list[Batch], batch: Batch) -> tuple[Outputs, dict[str, Tensor]]:
    """For any loss, by a gradient cache: the loss of all micro-batches together, and two forwards for each."""
    statistics, states, outs = norm.SavedStatistics(t.method), [], []
    forward = _forward(t)
    for micro in micro_batches:
        with t.meter.phase("views"):
            views = batch_views(t, micro)
        with t.meter.phase("forward"), torch.no_grad():
            states.append(random_states(t.device))
            outs.append(forward(views, micro))
    statistics.restore()
    with t.meter.phase("forward"):
        leaves = {name: torch.cat([o[name] for o in outs]) for name in outs[0]}
        floats = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf.is_floating_point()}
        losses = t.method.loss(leaves, batch)
    with t.meter.phase("backward"):
        grads = torch.autograd.grad(losses["loss"], list(floats.values()), allow_unused=True)
        grads = {name: g.chunk(len(micro_batches)) for name, g in zip(floats, grads) if g is not None}
    for i, micro in enumerate(micro_batches):
        t.deepspeed.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        with t.meter.phase("views"):
            views = batch_views(t, micro)
        with t.meter.phase("forward"):
            set_random_states(states[i], t.device)
            out = forward(views, micro)
            surrogate = sum((out[name] * g[i]).sum() for name, g in grads.items() if out[name].requires_grad)
        with t.meter.phase("backward"):
            _backward(t, surrogate)
        statistics.add()
    statistics.apply_mean(len(micro_batches))
    return leaves, losses


def _forward(t: Trainer) -> Callable[[list[Tensor], Batch], Outputs]:
    return t.deepspeed if t.capturable_step is None else t.method.forward


def _backward(t: Trainer, loss: Tensor) -> None:
    """Backward of one micro-batch; `update` or DeepSpeed averages the sum of their gradients over ranks."""
    if t.capturable_step is None:
        t.loss_scaler.backward(t.deepspeed, loss)
    else:
        t.loss_scaler.scaled(loss).backward()


def count_flops(t: Trainer, micro_batches: list[Batch]) -> None:
    """Set `t.meter.flops`, this rank's FLOPs of a step, by a forward and backward that leaves no trace in the run; only
    where the peak of every rank's device is known.  Convolutions and matrix products count, those of a teacher once.

    It is one pass over the first micro-batch, times the number of micro-batches.  `force_eager`: code that Dynamo first
    meets under a dispatch mode would stay uncompiled for the whole run.
    """
    known = torch.tensor(float(t.meter.peak is not None), device=t.device)
    if dist.sum_(known) < dist.world():
        return
    batch, states, statistics = micro_batches[0], random_states(t.device), norm.SavedStatistics(t.method)
    views = batch_views(t, batch)
    with torch.compiler.set_stance("force_eager"), Flops() as counter:
        loss = t.method.loss(t.method(views, batch), batch)["loss"]  # `t.deepspeed` would reduce gradients
        parameters = [p for p in t.method.parameters() if p.requires_grad]
        torch.autograd.grad(loss, parameters, allow_unused=True)
    statistics.restore()
    set_random_states(states, t.device)
    t.meter.flops = counter.total * len(micro_batches)


def batch_views(t: Trainer, batch: Batch, views: tuple | None = None) -> list[Tensor]:
    """The views of a batch, of `data.views` or the recipe given: (B, 3, S, S) each."""
    key = batch.index
    if batch.position is not None:  # a sample that comes twice in an epoch looks different each time
        key = torch.arange(len(key), device=key.device) + batch.position
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


def merge_without_pixels(micro_batches: list[Batch]) -> Batch:
    """The micro-batches as one Batch: sizes, index and label of all rows; pixels has 0 rows (each micro-batch keeps its
    own)."""
    cat = {name: torch.cat([getattr(b, name) for b in micro_batches]) for name in ("sizes", "index", "label")}
    return replace(micro_batches[0], pixels=micro_batches[0].pixels[:0], **cat)


def detached(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
