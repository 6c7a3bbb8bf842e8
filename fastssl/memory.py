"""Out of device memory: which setting to change, and the number of images that fits, found by trying."""

from __future__ import annotations

import gc
from dataclasses import fields

import torch
from torch import Tensor

from fastssl import dist
from fastssl.loader import Batch
from fastssl.step import batch_views
from fastssl.trainer import Trainer

USABLE_FRACTION = 0.9  # of the device's memory: what a step of so many images may take, beside fragments and the loss


def advice(t: Trainer) -> str:
    """What to change after a torch.OutOfMemoryError.  Its traceback must be deleted first: it holds the step's tensors.

    On one rank a forward and backward pass is made with half of the images, a quarter, and so on until one fits.  On
    several ranks the others wait in a collective, so that nothing can be tried."""
    local = t.run.optim.batch // dist.world() // t.loader.sampler.micro_per_step
    smaller = [n for n in range(local // 2, 0, -1) if local % n == 0]
    if dist.world() > 1:
        return _settings(smaller[0], local, "is the next smaller one") if smaller else _too_large()
    t.method.zero_grad(set_to_none=True)
    t.capturable_step = None  # with the memory of a CUDA graph
    gc.collect()
    if t.device.type == "cuda":
        torch.cuda.empty_cache()
    source = t.loader.epoch(0)
    batch = next(source)
    source.close()
    size = local
    for n in smaller:
        if n <= size // 2 or n == 1:
            size = n
            used = _try(t, batch, n)
            if used is not None:
                return _settings(n, local, f"fits{used}")
    return _too_large()


def _settings(images: int, local: int, how: str) -> str:
    return (
        f"set speed.micro_batch={images} (now {local}), which {how}: the batch stays as it is, in parts, and batch "
        "norm takes the statistics of each part; or a smaller optim.batch, or speed.zero=1 to 3 on several GPUs"
    )


def _too_large() -> str:
    return (
        "a single image does not fit: use smaller views (data.views), a smaller backbone.name, or speed.zero=1 to 3 on "
        "several GPUs"
    )


def _try(t: Trainer, batch: Batch, images: int) -> str | None:
    """Make a forward and backward pass with so many images; returns the memory that it took, in words, or None where
    it does not fit."""
    parts = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    part = Batch(**{name: v[:images] if isinstance(v, Tensor) else v for name, v in parts.items()})
    cuda = t.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats(t.device)
        out = t.method.forward(batch_views(t, part), part)
        surrogate = sum(value.float().sum() for value in out.values() if value.requires_grad)
        surrogate.backward()
    except torch.OutOfMemoryError:
        return None
    finally:
        out = surrogate = None
        t.method.zero_grad(set_to_none=True)
    if not cuda:
        return ""
    used, total = torch.cuda.max_memory_allocated(t.device), torch.cuda.mem_get_info(t.device)[1]
    return f" ({used / 2**30:.1f} of {total / 2**30:.1f} GiB)" if used < USABLE_FRACTION * total else None
