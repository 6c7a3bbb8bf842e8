"""All views of a batch, cut on the device from images that were decoded once.

uint8 images of any size in, normalised channels_last views out.  A sample's views depend on (seed, epoch, its index,
the view's stream) alone: not on the batch, the rank count or the restart point.
"""

import torch
from torch import Tensor

from ..common import TRITON_DTYPES, choose
from . import extra, reference
from .params import COL, COLUMNS, IMAGENET_MEAN, IMAGENET_STD, View, draw

__all__ = ["COL", "COLUMNS", "IMAGENET_MEAN", "IMAGENET_STD", "View", "draw", "make_views"]


@torch.no_grad()
def make_views(
    pixels: Tensor,
    sizes: Tensor,
    index: Tensor,
    views,
    *,
    seed: int,
    epoch: int | Tensor,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> list[Tensor]:
    """One (B, 3, size, size) tensor in channels_last layout for each of `views`.

    pixels: uint8 (B, P, 3), image i in its first h * w pixels, row-major.  sizes: int (B, 2), (h, w) of each.
    index: int64 (B,), the samples' numbers in the data set, the key of their random numbers with seed and epoch.
    epoch: a number, or an int64 scalar on the device so that a captured CUDA graph can be replayed in another epoch.
    impl: "reference" (anywhere), "triton" (CUDA), or "auto"."""
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
    if any(view.extra for view in views):
        return _with_extra(pixels, sizes, index, views, seed, epoch, dtype, impl)
    if choose(impl, pixels) == "reference":
        table = draw(sizes, index, views, seed=seed, epoch=epoch)
        return reference.make_views(pixels, sizes, views, table, dtype)
    from . import triton

    return triton.make_views(pixels, sizes, index, views, seed, epoch, dtype)


def _with_extra(pixels, sizes, index, views, seed, epoch, dtype, impl) -> list[Tensor]:
    """Views of which some have operations beyond the kernel's: those are cut in float32, the others as ever."""
    plain, places = extra.split(views)
    streams, out = [view.stream for view in plain], [None] * len(views)
    for some, kind in ((places, torch.float32), ([i for i in range(len(views)) if i not in places], dtype)):
        made = make_views(pixels, sizes, index, [plain[i] for i in some], seed=seed, epoch=epoch, dtype=kind, impl=impl)
        for i, x in zip(some, made):
            out[i] = extra.finish(x, views[i], streams[i], index, seed, epoch, dtype) if i in places else x
    return out
