"""Augmentation: computes all views of a batch on the device, from images that were decoded once.

Takes uint8 images of any size and returns normalised channels_last views.  The random numbers of a view depend only on
seed, epoch, sample index and the view's stream, not on the batch, the number of ranks or the step of a resumed run.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..common import TRITON_DTYPES, Impl, choose
from . import extra, reference
from .params import COL, COLUMNS, IMAGENET_MEAN, IMAGENET_STD, View, draw, streams


@torch.no_grad()
def make_views(
    pixels: Tensor,
    sizes: Tensor,
    index: Tensor,
    views: Iterable[View],
    *,
    seed: int,
    epoch: int | Tensor,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> list[Tensor]:
    """One (B, 3, size, size) tensor in channels_last layout for each of `views`.

    pixels: uint8 (B, P, 3), image i in its first h * w pixels, row-major.  sizes: int (B, 2), (h, w) of each.
    index: int64 (B,), numbers of the samples in the data set; with seed and epoch they determine the random numbers.
    epoch: a number, or a 0-dim int64 tensor on the device, so that a captured CUDA graph can be
    replayed in another epoch.
    """
    views = tuple(views)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] != 3:
        raise ValueError(f"views: pixels must be uint8 of shape (B, P, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    if sizes.shape != (pixels.shape[0], 2) or index.shape != (pixels.shape[0],):
        raise ValueError(
            f"views: for {pixels.shape[0]} images sizes must be (B, 2) and index (B,), "
            f"got {tuple(sizes.shape)} and {tuple(index.shape)}"
        )
    if sizes.device != pixels.device or index.device != pixels.device:
        raise ValueError(f"views: pixels are on {pixels.device}, sizes on {sizes.device}, index on {index.device}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"views: seed={seed}: needs 0 <= seed < 2**63")
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"views: dtype={dtype}: choose float32, float16 or bfloat16")
    if any(view.extra for view in views):  # these are cropped in float32 first
        cut = functools.partial(make_views, pixels, sizes, index, seed=seed, epoch=epoch, impl=impl)
        plain = list(zip(views, extra.without_extra(views), streams(views)))
        finished = iter(cut([bare for view, bare, _ in plain if not view.extra], dtype=dtype))
        crops = iter(cut([bare for view, bare, _ in plain if view.extra]))
        return [
            extra.finish(next(crops), view, extra.Random(index, seed, epoch, stream), dtype)
            if view.extra
            else next(finished)
            for view, _, stream in plain
        ]
    if choose(impl, pixels) == "triton":
        from . import triton

        return triton.make_views(pixels, sizes, index, views, seed, epoch, dtype)
    table = draw(sizes, index, views, seed=seed, epoch=epoch)
    if impl == "auto" and pixels.device.type == "cpu":
        from . import cpu  # imports numba

        return cpu.make_views(pixels, sizes, views, table, dtype)
    return reference.make_views(pixels, sizes, views, table, dtype)
