"""Everything that a run needs, built and checked before its first step."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch import Tensor, nn

from fastssl import backbones, config, contract, cuda_graph, dist, norm, optim, weights, zero
from fastssl.amp import LossScaler, autocast
from fastssl.checkpoint import run_folder
from fastssl.compiled import compile_forward
from fastssl.config import Run
from fastssl.gradients import ALL_REDUCE_ELEMENTS
from fastssl.loader import Batch, Loader
from fastssl.meters import Meter
from fastssl.sampler import Sampler
from fastssl.step import static_step
from fastssl.trainer import Context, Trainer

if TYPE_CHECKING:
    from fastssl.hooks import Hook


def build(run: Run, hooks: Sequence[Hook] = (), device: str | None = None, loader: Loader | None = None) -> Trainer:
    """The trainer of `run` at step 0; ValueError for what cannot be trained.  `loader`: None opens data.train."""
    config.validate(run)
    contract.check_config(run.method)
    hooks = [contract.check_hook(hook) for hook in (*hooks, *run.hooks)]
    backbones.check_sizes(run.backbone, [v.size for v in (*run.data.views, run.data.eval_view) if v is not None])
    device_used = dist.init(device)
    set_deterministic(run.deterministic)
    if device_used.type == "cuda":  # losses are in fp32: beside a 16-bit network their products may use tensor cores
        torch.set_float32_matmul_precision("highest" if run.optim.precision == "fp32" else "high")
    loader = open_loader(run, device_used) if loader is None else loader
    if run.backbone.in_channels != 3:
        raise ValueError(
            f"backbone.in_channels={run.backbone.in_channels}: views have 3 channels, those of grey images too; leave "
            "it at 3"
        )
    torch.manual_seed(run.seed)  # the same weights, queue and bank on every rank
    method = prepare(build_method(run, loader), run, device_used)
    optim_config = optim.frozen(run.optim, getattr(method, "freeze_epochs", {}))
    optimizer, schedule = optim.build(
        method.named_parameters(), optim_config, steps_per_epoch=loader.steps, impl=run.speed.kernels
    )
    if hasattr(method, "total_steps"):
        method.total_steps = schedule.total_steps
    torch.manual_seed(run.seed + 1 + dist.rank())  # dropout and the like differ by rank
    engine = start_deepspeed(method, optimizer, run)
    zero.partitions(engine)  # ValueError for an optimizer whose partitions checkpoints cannot store
    optim.attach(engine)
    scaler = LossScaler(run.optim.precision, "cpu" if run.speed.zero else device_used, run.optim.skip_nonfinite)
    t = Trainer(
        run=run,
        folder=run_folder.path(run),
        device=device_used,
        method=method,
        deepspeed=engine,
        schedule=schedule,
        loader=loader,
        meter=Meter(device_used, batch=run.optim.batch, precision=run.optim.precision),
        loss_scaler=scaler,
        step_inputs=cuda_graph.StepInputs(len(engine.optimizer.param_groups), device_used),
        hooks=hooks,
        statistics=norm.StatisticsBackup(method) if scaler.checked else None,
        not_compiled=not_compiled(run, device_used),
    )
    set_capturable_step(t)
    return t


def set_capturable_step(t: Trainer) -> None:
    """Decide whether a step bypasses DeepSpeed and whether it is captured as a CUDA graph; print why not."""
    why = needs_deepspeed(t)
    if why is None:
        t.capturable_step = cuda_graph.CapturableStep(partial(static_step, t), not_captured(t))
        why = t.capturable_step.reason
    mode = t.run.speed.graph
    if dist.is_main() and why and (mode == "on" or (mode == "auto" and t.device.type == "cuda")):
        print(f"speed.graph={mode}: the step is not a CUDA graph: {why}")


def needs_deepspeed(t: Trainer) -> str | None:
    """Why a step must go through DeepSpeed; None: it need not."""
    run, settings = t.run, sorted(set(t.run.deepspeed) - {"zero_optimization"})
    if run.speed.zero:
        return f"ZeRO {run.speed.zero} reads numbers from the device; use speed.zero=0"
    if t.deepspeed.optimizer is not t.deepspeed.basic_optimizer:
        return f"the optimizer is DeepSpeed's {type(t.deepspeed.optimizer).__name__}"
    if settings:
        return f"deepspeed={{{settings[0]!r}: ...}} acts in DeepSpeed's own step"
    if t.loss_scaler.checked and "found_inf" not in inspect.signature(t.method.after_step).parameters:
        return f"{type(t.method).__name__}.after_step has no found_inf: the host must know of an overflow"
    return None


def not_captured(t: Trainer) -> str | None:
    """Why a step that could be captured is not; None: it is."""
    run = t.run
    if run.speed.graph == "off":
        return "speed.graph=off"
    if t.loader.sampler.micro_per_step > 1:
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
    return f"{waits[0]} of a view's extra waits for the device" if waits else getattr(t.method, "not_capturable", None)


def not_compiled(run: Run, device: torch.device) -> str | None:
    """Why the method's forward is not compiled; None: it is.  With speed.compile=auto it is where results of
    bench/losses.py show equal losses and a shorter step (docs/measure.md)."""
    mode, set_on = run.speed.compile, "speed.compile=on compiles it"
    if mode != "auto":
        return None if mode == "on" else "speed.compile=off"
    if run.speed.zero == 3:
        return "the hooks of ZeRO 3 break the graph"
    if device.type != "cuda":
        return f"not measured on a CPU; {set_on}"
    # docs/performance.md has shorter steps (Barlow Twins with ViT-S/16, SimCLR with ResNet-18), but no losses.
    return f"its losses have not been compared with the plain ones on a GPU; {set_on}"


def build_method(run: Run, loader: Loader) -> nn.Module:
    """The method around its backbone.  Pretrained weights are loaded after the backbone's initialisation and before the
    method copies it; ValueError for a method that overwrites them."""
    backbone, pretrained = backbones.build(run.backbone, run.method), run.backbone.pretrained
    if (run.backbone.frozen or run.backbone.norm == "frozen") and not pretrained:
        raise ValueError(
            "backbone.frozen and backbone.norm='frozen' keep pretrained weights as they are: give backbone.pretrained"
        )
    if pretrained:
        report = weights.load_backbone(pretrained, backbone)
        if dist.is_main():
            print(report)
    with weights.check_pretrained_kept(backbone) if pretrained else contextlib.nullcontext():
        context = Context(loader.samples, run.optim.batch, loader.classes, run.seed, run.speed.kernels)
        method = run.method.build(backbone, context)
    contract.check_method(method, run.method)
    check_views(method, run.data.views)
    min_batch = getattr(method, "min_batch", 1)
    if run.optim.batch < min_batch and dist.is_main():
        warnings.warn(
            f"optim.batch={run.optim.batch}: the loss of {type(method).__name__} compares the images of a batch and "
            f"needs {min_batch} or more, of all GPUs together (speed.micro_batch limits the memory)",
            stacklevel=2,
        )
    return method


def open_loader(run: Run, device: torch.device) -> Loader:
    """data.train, with the micro-batches of this rank."""
    batch, speed = run.optim.batch, run.speed
    sampler = Sampler(run.seed, micro_per_step=batch // dist.world() // micro_batch(run))
    return Loader(run.data.train, batch, sampler, device=device, workers=speed.workers, resident=speed.resident)


def micro_batch(run: Run) -> int:
    """Images per rank and forward pass; ValueError where the batch cannot be divided."""
    batch, world = run.optim.batch, dist.world()
    if batch % world:
        raise ValueError(f"optim.batch={batch} is not a multiple of the {world} ranks")
    local = batch // world
    images = min(run.speed.micro_batch or local, local)  # with many ranks the local batch may be smaller
    if local % images:
        raise ValueError(f"speed.micro_batch={images} does not divide a rank's part, {local} of optim.batch={batch}")
    return images


def check_views(method: nn.Module, views: tuple) -> None:
    if method.views is not None and len(views) != method.views:
        raise ValueError(
            f"{type(method).__name__} needs a recipe of {method.views} views, data.views gives {len(views)}"
        )


def prepare(method: nn.Module, run: Run, device: torch.device) -> nn.Module:
    """Synchronised batch norm, memory format, device, compilation, autocast and checks, in the order that they need."""
    if run.sync_bn:
        method = norm.convert_sync_bn(method, device)
    if run.speed.channels_last:
        backbones.channels_last_(method)
    if not run.optim.residual_in_fp32:
        backbones.use_autocast_dtype_(method, run.backbone.name)
    method.to(device).train()
    forward = method.forward
    if not_compiled(run, device) is None:
        forward = compile_forward(forward, required=run.speed.compile == "on")

    def autocast_forward(views: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        # Autocast here and not in DeepSpeed: weights, normalisation and statistics stay fp32 at every ZeRO stage.
        with autocast(device, run.optim.precision):
            out = contract.check_output(method, forward(views, batch), len(batch.index))
        return {name: v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for name, v in out.items()}

    method.forward = autocast_forward
    loss = method.loss
    method.loss = lambda out, batch: contract.check_losses(method, loss(out, batch))
    return method


def start_deepspeed(method: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around the method."""
    deepspeed.utils.logger.setLevel("WARNING")
    # Its shared-memory all-reduce for CPUs is compiled for half a minute at the first start; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch(run),
        "gradient_accumulation_steps": 1,  # step.py accumulates, with the loss of the whole batch
        # without this DeepSpeed 0.19 clips at 1.0
        "gradient_clipping": 0.0 if run.optim.clip_each else run.optim.clip,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.speed.zero,
            "overlap_comm": False,
            # elements: DeepSpeed's default allocates 2 GB even for a ResNet-50, whose gradients have 0.1 GB
            "reduce_bucket_size": min(
                ALL_REDUCE_ELEMENTS, sum(p.numel() for p in method.parameters() if p.requires_grad)
            ),
            "stage3_param_persistence_threshold": 0,  # ema_ updates shards: full copies would be outdated
        },
    }
    for key, value in run.deepspeed.items():
        ours = ds_config.get(key)
        ds_config[key] = {**ours, **value} if isinstance(ours, dict) else value
    return deepspeed.initialize(model=method, optimizer=optimizer, config=ds_config, dist_init_required=False)[0]


def set_deterministic(on: bool) -> None:
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(on)
    # By default it fills all empty memory: at ZeRO 1 and 2 DeepSpeed's bucket of 2 GB in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on
