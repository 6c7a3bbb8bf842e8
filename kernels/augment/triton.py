"""The views as a custom op: which launches make them, and their launch.  The kernels are in passes.py.

Views that differ only in numbers (probabilities, strengths, streams, mean) share launches: two groups for SwAV's eight
views.  Times: docs/kernels.md.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tiling import cdiv, next_power_of_2
from . import draws, params, passes

MAX_WHOLE_SIZE = 64  # pixels: views up to here are one tile
TILE = 32  # 224 and 96 are multiples
BLUR_TILE = 64  # with halo; 128 would spill
CROP_WARPS, LOAD_WARPS = 8, 4  # num_warps of a pass that computes the crop, and of one that loads it
MAX_HALO = 24  # pixels: the widest blur radius of views of several tiles, sigma 6


class Batch(NamedTuple):
    pixels: Tensor  # (B, max_pixels, 3) uint8
    sizes: Tensor  # (B, 2) int
    index: Tensor  # (B,) int64
    seed: int
    epoch: int
    epoch_ptr: Tensor | None  # () int64, instead of epoch


class Group(NamedTuple):
    """Views that differ only in numbers."""

    views: tuple[params.View, ...]
    first: int  # row of the table of specs

    @property
    def jitters(self) -> bool:
        return any(v.jitter_p and any(v.jitter) for v in self.views)

    @property
    def rotates(self) -> bool:
        return any(v.rotate for v in self.views)

    @property
    def halo(self) -> int:
        return max(v.blur_radius for v in self.views)


def _group_key(view: params.View) -> tuple:
    same = "size", "crop", "resize", "pad", "pad_mode", "window", "interpolation", "order"
    return *(getattr(view, name) for name in same), view.rotate > 0


def padded_numel(view: params.View) -> int:
    """Elements of one sample's view in the output, padded so that every view begins at a multiple of 16 bytes."""
    return cdiv(3 * view.size**2, 8) * 8


@functools.lru_cache(maxsize=64)
def plan(views_json: str) -> tuple[tuple[Group, ...], list[list[float]]]:
    """Groups of views, and the specs of the views in the groups' order (see draws.FIELDS)."""
    views = [params.View(**fields) for fields in json.loads(views_json)]
    offsets = [sum(padded_numel(u) for u in views[:i]) for i in range(len(views))]
    streams = params.streams(views)
    keys, groups = [_group_key(v) for v in views], []
    specs: list[list[float]] = []
    for key in dict.fromkeys(keys):
        members = [i for i, k in enumerate(keys) if k == key]
        groups.append(Group(tuple(views[i] for i in members), len(specs)))
        specs += [_spec(views[i], offsets[i], streams[i]) for i in members]
    return tuple(groups), specs


def _spec(view: params.View, offset: int, stream: int) -> list[float]:
    log_ratio = [math.log(r) for r in view.ratio]
    box = (offset, stream, view.cell or 0, view.quarter_turns, *view.scale, *log_ratio, *view.ratio)
    colours = (view.flip, view.rotate, view.jitter_p, *view.jitter, view.gray, view.blur, *view.blur_sigma)
    return [float(x) for x in (*box, *colours, view.solarize, view.solarize_threshold, *view.mean, *view.std)]


@functools.lru_cache(maxsize=64)
def specs_on(views_json: str, device: torch.device) -> Tensor:
    return torch.tensor(plan(views_json)[1], dtype=torch.float64, device=device)


def launch_all(batch: Batch, views_json: str, dtype: torch.dtype) -> Tensor:
    out = _empty(batch.pixels, views_json, dtype)
    if len(batch.pixels):
        specs = specs_on(views_json, batch.pixels.device)
        for group in plan(views_json)[0]:
            whole = group.views[0].size <= MAX_WHOLE_SIZE and not group.rotates
            (_launch_whole if whole else _launch_tiles)(group, batch, specs[group.first :], out)
    return out


@torch.library.custom_op("fastssl::augment", mutates_args=())
def augment_op(
    pixels: Tensor,
    sizes: Tensor,
    index: Tensor,
    epoch_ptr: Tensor | None,
    views_json: str,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> Tensor:
    """All views in one row of memory: view by view, each sample by sample."""
    return launch_all(Batch(pixels, sizes, index, seed, epoch, epoch_ptr), views_json, dtype)


augment_op.register_fake(
    lambda pixels, sizes, index, epoch_ptr, views_json, seed, epoch, dtype: _empty(pixels, views_json, dtype)
)


def _empty(pixels: Tensor, views_json: str, dtype: torch.dtype) -> Tensor:
    numel = sum(padded_numel(v) for group in plan(views_json)[0] for v in group.views)
    return torch.empty(len(pixels) * numel, dtype=dtype, device=pixels.device)


def constants(view: params.View) -> dict[str, Any]:
    """The kernels' compile-time arguments that are the same for all views of a group."""
    return {
        "CROP": params.CROPS.index(view.crop),
        "SIZE": view.size,
        "RESIZE": view.resize or 0,
        "PAD": view.pad,
        "WINDOW": view.window or 0,
        "BICUBIC": view.interpolation == "bicubic",
        "REFLECT": view.pad_mode == "reflect",
        "OPS": sum(params.OPS.index(op) << (2 * i) for i, op in enumerate(view.order)),
        "JITTER_AT": view.order.index("jitter"),
        "BLUR_AT": view.order.index("blur"),
    }


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **named: Any) -> None:
    """Launch a kernel with those of the `named` arguments that it has."""
    has = {name: value for name, value in named.items() if name in kernel.arg_names}
    kernel[grid](*arguments, **has, num_warps=num_warps)


def _launch_whole(group: Group, batch: Batch, specs: Tensor, out: Tensor) -> None:
    pixels, sizes, index, seed, epoch, epoch_ptr = batch
    view = group.views[0]
    tile = max(16, next_power_of_2(view.size))
    arguments = pixels, pixels.shape[1], sizes, index, specs, out, seed, epoch, epoch_ptr
    launch(
        passes.whole_kernel,
        (len(pixels), len(group.views)),
        *arguments,
        **constants(view),
        JITTERS=group.jitters,
        BLURS=group.halo > 0,
        EPOCH_PTR=epoch_ptr is not None,
        TILE=tile,
        num_warps=min(8 if group.halo else 16, tile * tile // 128),  # a blur of 64 pixels needs registers, not warps
    )


def _launch_tiles(group: Group, batch: Batch, specs: Tensor, out: Tensor) -> None:
    pixels, sizes, index, seed, epoch, epoch_ptr = batch
    view, B, V, device = group.views[0], len(pixels), len(group.views), pixels.device
    S, side = view.size, cdiv(view.size, TILE)
    if group.halo > MAX_HALO:
        raise ValueError(
            f"views: the Triton kernel blurs views of {S} pixels with sigma up to {MAX_HALO // 4}, "
            f"got {max(v.blur_sigma[1] for v in group.views)}; use impl='reference'"
        )

    def memory(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((B * V, *shape) if needed else 0, dtype=dtype, device=device)

    table = memory(True, len(params.COLUMNS))
    sums = memory(group.jitters, side * side)
    crops = memory(group.rotates or group.jitters or group.halo > 0, 3, S, S, dtype=torch.int16)
    # a tile before its blur may overwrite its own crop, unless another tile still reads that to rotate it
    unblurred = memory(group.halo > 0, 3, S, S, dtype=torch.int16) if group.rotates else crops
    named = {**constants(view), "ROTATE": group.rotates, "JITTERS": group.jitters, "BLURS": group.halo > 0}
    named |= {"EPOCH_PTR": epoch_ptr is not None}
    launch(draws.draw_kernel, (B, V), sizes, index, specs, table, seed, epoch, epoch_ptr, **named, num_warps=1)
    grid, images = (B * side * side, V), (pixels, pixels.shape[1], sizes)
    named |= {"TILE": TILE, "SIDE": side, "TILES": next_power_of_2(side * side)}
    if group.rotates:
        launch(passes.crop_kernel, grid, *images, table, crops, B, **named, num_warps=CROP_WARPS)
    for means in (True, False) if group.jitters else (False,):
        load_crop = group.jitters and not means and not group.rotates  # the first pass stored it
        arguments = *images, table, specs, crops, sums, unblurred, out, B
        named |= {"MEANS": means, "LOAD_CROP": load_crop}
        launch(passes.colour_kernel, grid, *arguments, **named, num_warps=LOAD_WARPS if load_crop else CROP_WARPS)
    if group.halo:
        side = cdiv(S, BLUR_TILE - 2 * group.halo)
        named |= {"TILE": BLUR_TILE, "HALO": group.halo, "SIDE": side}
        launch(passes.blur_kernel, (B * side * side, V), table, specs, unblurred, out, B, **named, num_warps=8)


def to_json(views: Sequence[params.View]) -> str:
    return "[" + ", ".join([view.json for view in views]) + "]"


def make_views(
    pixels: Tensor,
    sizes: Tensor,
    index: Tensor,
    views: Sequence[params.View],
    seed: int,
    epoch: int | Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    epoch_ptr, epoch = (epoch, 0) if isinstance(epoch, Tensor) else (None, epoch)
    batch = pixels.contiguous(), sizes.contiguous(), index.contiguous()
    flat = augment_op(*batch, epoch_ptr, to_json(views), seed, epoch, dtype)
    B, start, out = len(pixels), 0, []
    for view in views:
        S = view.size
        out.append(flat[start : start + B * 3 * S * S].view(B, S, S, 3).permute(0, 3, 1, 2))
        start += B * padded_numel(view)
    return out
