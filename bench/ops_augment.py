"""Augmentation for bench/ops.py: our kernel, its definition, torchvision v2 and, if installed, kornia.

torchvision v2 draws one set of parameters for the whole batch, which is less work and another result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from other_views import kornia_views, torchvision_view
from torch import Tensor
from torchvision.transforms import v2

from fastssl import views as recipes
from fastssl.kernels.augment import View, make_views

MEAN_AREA = 0.434  # mean area of random resized crops of scale (0.08, 1), relative to an image of 500 x 375


@dataclass(frozen=True)
class Case:
    recipe: str
    size: int
    batch: int
    height: int
    width: int
    dtype: torch.dtype = torch.float16


CASES = [
    Case("simclr", 224, 256, 375, 500),
    Case("moco_v2", 224, 256, 375, 500),
    Case("byol", 224, 256, 375, 500),
    Case("swav", 224, 64, 375, 500),
    Case("simclr", 32, 512, 32, 32),
    Case("simclr", 224, 256, 375, 500, torch.bfloat16),
]


def views_of(case: Case) -> tuple[View, ...]:
    recipe = getattr(recipes, case.recipe)
    return recipe() if case.recipe == "swav" else recipe(case.size)


def inputs(case: Case, batch: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    batch = batch or case.batch
    small = torch.randint(0, 256, (batch, 3, 12, 16), generator=g, dtype=torch.uint8).cuda().float()
    image = torch.nn.functional.interpolate(small, (case.height, case.width), mode="bilinear").round().byte()
    sizes = torch.tensor([[case.height, case.width]] * batch, dtype=torch.int32).cuda()
    return image, (image.permute(0, 2, 3, 1).reshape(batch, -1, 3).contiguous(), sizes, torch.arange(batch).cuda())


def check(case: Case) -> dict[str, float]:
    """Before normalisation, pixels differ by at most 1/255 from the definition with the same random numbers."""
    _, x = inputs(case, min(case.batch, 32))
    views = views_of(case)
    ours, truth = (make_views(*x, views, seed=0, epoch=1, impl=impl) for impl in ("triton", "reference"))
    worst = 0.0
    for view, a, b in zip(views, ours, truth):
        std = torch.tensor(view.std, device=a.device)[:, None, None]
        worst = max(worst, float(((a - b) * std).abs().max()))
    assert worst <= 1 / 255 + 1e-6, f"{case}: off by {worst * 255:.2f}/255"
    return {"views x 255": worst * 255}


def implementations(case: Case) -> dict[str, Callable[[], Any]]:
    image, x = inputs(case)
    views = views_of(case)
    step = partial(make_views, *x, views, seed=0, epoch=1, dtype=case.dtype)
    result: dict[str, Callable[[], Any]] = {
        "ours": partial(step, impl="triton"),
        "eager": partial(step, impl="reference"),
    }
    if case.recipe != "simclr":
        return result
    one = torchvision_view(v2, views[0], v2.ToDtype(case.dtype, scale=True))
    result["torchvision v2"] = lambda: [one(image) for _ in views]
    with contextlib.suppress(ImportError):
        made = kornia_views(views, "cuda")
        result["kornia"] = lambda: [view.to(case.dtype) for view in made(image)]
    return result


def work(case: Case) -> tuple[None, int]:
    crop = MEAN_AREA * case.height * case.width * 3
    return None, int(case.batch * sum(crop + 3 * view.size**2 * case.dtype.itemsize for view in views_of(case)))


TARGETS = {CASES[0]: 512}  # one microsecond a view
