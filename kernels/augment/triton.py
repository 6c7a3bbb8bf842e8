"""The views as a custom op.  Up to 64 pixels one launch does it all, a program a view; above, and where views rotate,
two to five launches share parameters, crops, contrast means and what is still to be blurred through memory.  Not
measured yet on a GPU.

Views that differ only in numbers (probabilities, strengths, streams, mean) share launches: two groups for SwAV's eight
views.  The maths is in pixels.py, the random numbers in draws.py.
"""

import functools
import json
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import cdiv, next_power_of_2
from . import draws, params
from . import pixels as px

WHOLE_LIMIT = 64  # pixels: up to here a view is one tile
TILE = 32  # 224 and 96 are multiples
BLUR_TILE = 64  # with halo; 128 would spill
CUT_OPTIONS, KEPT_OPTIONS = {"num_warps": 8}, {"num_warps": 4}  # of a pass that cuts the crop, and of one that reads it
HALO_LIMIT = 24  # pixels: the widest blur radius of views of several tiles, sigma 6
COLUMNS, WIDTH = draws.COLUMNS, draws.WIDTH
OFFSET, TURNS, THRESHOLD = (tl.constexpr(draws.AT[n]) for n in ("offset", "quarter_turns", "threshold"))
MEAN = tl.constexpr(draws.AT["mean_r"])
# columns of the table that the passes read
CLIP, FLIP, ORDER = (tl.constexpr(params.COL[n]) for n in ("top", "flip", "order"))
ANGLE, GRAY, SIGMA, SOLARIZE = (tl.constexpr(params.COL[n]) for n in ("angle", "gray", "sigma", "solarize"))


@triton.jit(do_not_specialize=["seed", "epoch"])
def whole_kernel(
    pixels,
    room,
    sizes,
    index,
    specs,
    out,
    seed,
    epoch,
    epoch_ptr,
    CROP: tl.constexpr,
    SIZE: tl.constexpr,
    RESIZE: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
    JITTERS: tl.constexpr,
    BLURS: tl.constexpr,
    OPS: tl.constexpr,
    JITTER_AT: tl.constexpr,
    BLUR_AT: tl.constexpr,
    EPOCH_PTR: tl.constexpr,
    TILE: tl.constexpr,
):
    """A whole view in registers; grid (B, views)."""
    i_b, i_v = tl.program_id(0), tl.program_id(1)
    spec = specs + i_v * WIDTH
    stream, sample, epoch = draws.counter(spec, index, i_b, epoch, epoch_ptr, EPOCH_PTR)
    H, W = tl.load(sizes + 2 * i_b).to(tl.int32), tl.load(sizes + 2 * i_b + 1).to(tl.int32)
    y0, x0, h, w, top, left, bottom, right = draws.draw_crop(
        spec, seed, stream, sample, epoch, H, W, CROP, SIZE, RESIZE, PAD, WINDOW
    )
    flip, _, order, fb, fc, fs, fh, gray, sigma, solarize = draws.draw_colour(spec, seed, stream, sample, epoch)
    iy, ix = px.tile(0, 0, TILE)
    mask = (iy < SIZE) & (ix < SIZE)
    image = pixels + i_b.to(tl.int64) * room * 3
    r, g, b = px.crop(image, W, iy, ix, y0, x0, h, w, top, left, bottom, right, flip, SIZE, BICUBIC, REFLECT)
    threshold = tl.load(spec + THRESHOLD).to(tl.float32)
    r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, 0, JITTER_AT)
    if JITTERS:  # noqa: SIM102 - one is compiled away, the other is a branch
        if order >= 0:
            r, g, b = px.jitter(r, g, b, order, 0, 4, fb, fc, fs, fh, 0.0, mask, SIZE, True)
    r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, JITTER_AT + 1, BLUR_AT)
    if BLURS:  # noqa: SIM102
        if sigma > 0:
            r, g, b = px.blur_whole(r, g, b, sigma, SIZE, TILE)
    r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, BLUR_AT + 1, 4)
    view = out + tl.load(spec + OFFSET).to(tl.int64) * tl.num_programs(0) + i_b.to(tl.int64) * (SIZE * SIZE * 3)
    px.store(view, iy, ix, mask, r, g, b, tl.load(spec + TURNS).to(tl.int32), spec, MEAN, SIZE)


@triton.jit
def place(B, SIDE: tl.constexpr, STEP: tl.constexpr):
    """Of program (tile of sample, view): sample, view, image = both, tile number, its first row and column."""
    pid, i_v = tl.program_id(0), tl.program_id(1)
    tile, i_b = pid % (SIDE * SIDE), pid // (SIDE * SIDE)
    return i_b, i_v, (i_v * B + i_b).to(tl.int64), tile, tile // SIDE * STEP, tile % SIDE * STEP


@triton.jit
def cut(pixels, room, sizes, row, i_b, iy, ix, SIZE: tl.constexpr, BICUBIC: tl.constexpr, REFLECT: tl.constexpr):
    """Pixels (iy, ix) of the crop that the table's row describes."""
    return px.crop(
        pixels + i_b.to(tl.int64) * room * 3,
        tl.load(sizes + 2 * i_b + 1).to(tl.int32),
        iy,
        ix,
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + CLIP),
        tl.load(row + CLIP + 1),
        tl.load(row + CLIP + 2),
        tl.load(row + CLIP + 3),
        tl.load(row + FLIP),
        SIZE,
        BICUBIC,
        REFLECT,
    )


@triton.jit
def crop_kernel(
    pixels,
    room,
    sizes,
    table,
    scratch,
    B,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Only for views that rotate: the crop, so that the rotation has pixels to interpolate."""
    i_b, _, image, _, oy, ox = place(B, SIDE, TILE)
    iy, ix = px.tile(oy, ox, TILE)
    r, g, b = cut(pixels, room, sizes, table + image * COLUMNS, i_b, iy, ix, SIZE, BICUBIC, REFLECT)
    px.keep(scratch + image * (SIZE * SIZE * 3), iy, ix, (iy < SIZE) & (ix < SIZE), r, g, b, SIZE)


@triton.jit
def colour_kernel(
    pixels,
    room,
    sizes,
    table,
    specs,
    scratch,
    sums,
    unblurred,
    out,
    B,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
    ROTATE: tl.constexpr,
    JITTERS: tl.constexpr,
    BLURS: tl.constexpr,
    OPS: tl.constexpr,
    JITTER_AT: tl.constexpr,
    BLUR_AT: tl.constexpr,
    MEANS: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
    TILES: tl.constexpr,
):
    """MEANS: of samples that jitter, the tile's sum of the gray that contrast will meet; the tile as contrast will meet
    it is kept (not where other tiles still rotate the crop).  Else the finished tile, or of samples that blur, the tile
    before its blur.

    KEPT: a first pass kept the tile.
    """
    i_b, i_v, image, tile, oy, ox = place(B, SIDE, TILE)
    row, spec = table + image * COLUMNS, specs + i_v * WIDTH
    order = tl.load(row + ORDER).to(tl.int32)
    iy, ix = px.tile(oy, ox, TILE)
    mask = (iy < SIZE) & (ix < SIZE)
    scratch += image * (SIZE * SIZE * 3)
    if ROTATE:
        r, g, b = px.rotated(scratch, iy, ix, tl.load(row + ANGLE), SIZE)
    elif KEPT:
        r, g, b = px.kept(scratch, iy, ix, mask, SIZE)
    else:
        r, g, b = cut(pixels, room, sizes, row, i_b, iy, ix, SIZE, BICUBIC, REFLECT)
    gray, solarize, threshold = tl.load(row + GRAY), tl.load(row + SOLARIZE), tl.load(spec + THRESHOLD).to(tl.float32)
    fb, fc = tl.load(row + ORDER + 1), tl.load(row + ORDER + 2)
    fs, fh = tl.load(row + ORDER + 3), tl.load(row + ORDER + 4)
    if not KEPT:
        r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, 0, JITTER_AT)
    if MEANS:
        if order >= 0:
            _, contrast_at = px.permutation(order)
            r, g, b = px.jitter(r, g, b, order, 0, contrast_at, fb, fc, fs, fh, 0.0, mask, SIZE, False)
            tl.store(sums + image * (SIDE * SIDE) + tile, tl.sum(tl.where(mask, px.luma(r, g, b), 0.0), 0))
        if not ROTATE:
            px.keep(scratch, iy, ix, mask, r, g, b, SIZE)
    else:
        if JITTERS:  # noqa: SIM102
            if order >= 0:
                t = tl.arange(0, TILES)
                mean = tl.sum(tl.load(sums + image * (SIDE * SIDE) + t, mask=t < SIDE * SIDE, other=0.0), 0)
                mean *= 1.0 / (SIZE * SIZE)
                first = 0
                if KEPT:
                    _, first = px.permutation(order)
                r, g, b = px.jitter(r, g, b, order, first, 4, fb, fc, fs, fh, mean, mask, SIZE, False)
        r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, JITTER_AT + 1, BLUR_AT)
        blurred = False
        if BLURS:
            blurred = tl.load(row + SIGMA) > 0
            if blurred:
                px.keep_unblurred(unblurred + image * (SIZE * SIZE * 3), iy, ix, mask, r, g, b, SIZE)
        if not blurred:
            r, g, b = px.pointwise(r, g, b, gray, solarize, threshold, OPS, BLUR_AT + 1, 4)
            view = out + tl.load(spec + OFFSET).to(tl.int64) * B + i_b.to(tl.int64) * (SIZE * SIZE * 3)
            px.store(view, iy, ix, mask, r, g, b, tl.load(spec + TURNS).to(tl.int32), spec, MEAN, SIZE)


@triton.jit
def blur_kernel(
    table,
    specs,
    unblurred,
    out,
    B,
    SIZE: tl.constexpr,
    OPS: tl.constexpr,
    BLUR_AT: tl.constexpr,
    TILE: tl.constexpr,
    HALO: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Blur and what follows it, for samples that blur; a tile is TILE wide with its halo."""
    i_b, i_v, image, _, oy, ox = place(B, SIDE, TILE - 2 * HALO)
    row, spec = table + image * COLUMNS, specs + i_v * WIDTH
    sigma = tl.load(row + SIGMA)
    if sigma > 0:
        r, g, b = px.blur_tile(unblurred + image * (SIZE * SIZE * 3), oy, ox, sigma, SIZE, TILE, HALO)
        threshold = tl.load(spec + THRESHOLD).to(tl.float32)
        r, g, b = px.pointwise(r, g, b, tl.load(row + GRAY), tl.load(row + SOLARIZE), threshold, OPS, BLUR_AT + 1, 4)
        y, x = px.tile(0, 0, TILE)
        iy, ix = oy + y, ox + x
        mask = (y < TILE - 2 * HALO) & (x < TILE - 2 * HALO) & (iy < SIZE) & (ix < SIZE)
        view = out + tl.load(spec + OFFSET).to(tl.int64) * B + i_b.to(tl.int64) * (SIZE * SIZE * 3)
        px.store(view, iy, ix, mask, r, g, b, tl.load(spec + TURNS).to(tl.int32), spec, MEAN, SIZE)


class Group(NamedTuple):
    """Views that differ in numbers alone."""

    views: tuple[params.View, ...]
    first: int  # row of the table of numbers

    @property
    def jitters(self):
        return any(v.jitter_p and any(v.jitter) for v in self.views)

    @property
    def rotates(self):
        return any(v.rotate for v in self.views)

    @property
    def halo(self):
        """The widest blur's radius, 0 without blur."""
        size = self.views[0].size
        return max(min(math.ceil(4 * v.blur_sigma[1]), size - 1) if v.blur else 0 for v in self.views)


def _kind(view):
    return (
        view.size,
        view.crop,
        view.resize,
        view.pad,
        view.pad_mode,
        view.window,
        view.interpolation,
        view.order,
        view.rotate > 0,
    )


def extent(view) -> int:
    """Elements of one sample's view in the output, padded so that every view starts on 16 bytes."""
    return cdiv(3 * view.size**2, 8) * 8


@functools.lru_cache(maxsize=64)
def plan(text: str) -> tuple[tuple[Group, ...], list[list[float]]]:
    """Groups of views, and their numbers in the groups' order."""
    views = [params.View(**fields) for fields in json.loads(text)]
    starts = [sum(extent(u) for u in views[:i]) for i in range(len(views))]
    stream = params.streams(views)
    kinds, groups, numbers = [_kind(v) for v in views], [], []
    for kind in dict.fromkeys(kinds):
        members = [i for i, k in enumerate(kinds) if k == kind]
        groups.append(Group(tuple(views[i] for i in members), len(numbers)))
        numbers += [_numbers(views[i], starts[i], stream[i]) for i in members]
    return tuple(groups), numbers


def _numbers(view, start: int, stream: int) -> list[float]:
    log_ratio = [math.log(r) for r in view.ratio]
    return [
        float(x)
        for x in (
            start,
            stream,
            view.cell or 0,
            view.quarter_turns,
            *view.scale,
            *log_ratio,
            *view.ratio,
            view.flip,
            view.rotate,
            view.jitter_p,
            *view.jitter,
            view.gray,
            view.blur,
            *view.blur_sigma,
            view.solarize,
            view.solarize_threshold,
            *view.mean,
            *view.std,
        )
    ]


@functools.lru_cache(maxsize=64)
def specs_on(text: str, device: torch.device) -> Tensor:
    return torch.tensor(plan(text)[1], dtype=torch.float64, device=device)


def launch_all(pixels, sizes, index, epoch_ptr, text, seed, epoch, dtype) -> Tensor:
    out = _empty(pixels, text, dtype)
    if len(pixels):
        specs = specs_on(text, pixels.device)
        for group in plan(text)[0]:
            small = group.views[0].size <= WHOLE_LIMIT and not group.rotates
            launch = _launch_whole if small else _launch_tiles
            launch(group, pixels, sizes, index, specs[group.first :], out, seed, epoch, epoch_ptr)
    return out


@torch.library.custom_op("fastssl::augment", mutates_args=())
def augment_op(
    pixels: Tensor,
    sizes: Tensor,
    index: Tensor,
    epoch_ptr: Tensor | None,
    text: str,
    seed: int,
    epoch: int,
    dtype: torch.dtype,
) -> Tensor:
    """All views in one row of memory: view by view, each sample by sample."""
    return launch_all(pixels, sizes, index, epoch_ptr, text, seed, epoch, dtype)


@augment_op.register_fake
def _(pixels, sizes, index, epoch_ptr, text, seed, epoch, dtype):
    return _empty(pixels, text, dtype)


def _empty(pixels, text, dtype):
    room = sum(extent(v) for group in plan(text)[0] for v in group.views)
    return torch.empty(len(pixels) * room, dtype=dtype, device=pixels.device)


def _drawing(view) -> dict:
    return {
        "CROP": params.CROPS.index(view.crop),
        "SIZE": view.size,
        "RESIZE": view.resize or 0,
        "PAD": view.pad,
        "WINDOW": view.window or 0,
    }


def _cutting(view) -> dict:
    return {"BICUBIC": view.interpolation == "bicubic", "REFLECT": view.pad_mode == "reflect"}


def _ordering(view) -> dict:
    ops = sum(params.OPS.index(op) << (2 * i) for i, op in enumerate(view.order))
    return {"OPS": ops, "JITTER_AT": view.order.index("jitter"), "BLUR_AT": view.order.index("blur")}


def _launch_whole(group, pixels, sizes, index, specs, out, seed, epoch, epoch_ptr):
    view = group.views[0]
    tile = max(16, next_power_of_2(view.size))
    whole_kernel[(len(pixels), len(group.views))](
        pixels,
        pixels.shape[1],
        sizes,
        index,
        specs,
        out,
        seed,
        epoch,
        epoch_ptr,
        **_drawing(view),
        **_cutting(view),
        **_ordering(view),
        JITTERS=group.jitters,
        BLURS=group.halo > 0,
        EPOCH_PTR=epoch_ptr is not None,
        TILE=tile,
        num_warps=min(8 if group.halo else 16, tile * tile // 128),  # a blur of 64 pixels needs registers, not warps
    )


def _launch_tiles(group, pixels, sizes, index, specs, out, seed, epoch, epoch_ptr):
    view, B, V, device = group.views[0], len(pixels), len(group.views), pixels.device
    n, S, side = B * V, view.size, cdiv(view.size, TILE)
    if group.halo > HALO_LIMIT:
        raise ValueError(
            f"views: the Triton kernel blurs views of {S} pixels with sigma up to {HALO_LIMIT // 4}, "
            f"got {max(v.blur_sigma[1] for v in group.views)}; use impl='reference'"
        )

    def memory(wanted, *shape, dtype=torch.float32):
        return torch.empty((n, *shape) if wanted else 0, dtype=dtype, device=device)

    table = memory(True, len(params.COLUMNS))
    sums = memory(group.jitters, side * side)
    scratch = memory(group.rotates or group.jitters or group.halo, 3, S, S, dtype=torch.int16)
    # a tile before its blur may replace its own crop, unless a rotation of another tile still reads that
    unblurred = memory(group.halo, 3, S, S, dtype=torch.int16) if group.rotates else scratch
    draws.draw_kernel[(B, V)](
        sizes,
        index,
        specs,
        table,
        seed,
        epoch,
        epoch_ptr,
        **_drawing(view),
        EPOCH_PTR=epoch_ptr is not None,
        num_warps=1,
    )
    grid = (B * side * side, V)
    if group.rotates:
        crop_kernel[grid](
            pixels,
            pixels.shape[1],
            sizes,
            table,
            scratch,
            B,
            SIZE=S,
            **_cutting(view),
            TILE=TILE,
            SIDE=side,
            num_warps=8,
        )
    for means in (True, False) if group.jitters else (False,):
        kept = group.jitters and not means and not group.rotates  # read the crop that the first pass kept
        colour_kernel[grid](
            pixels,
            pixels.shape[1],
            sizes,
            table,
            specs,
            scratch,
            sums,
            unblurred,
            out,
            B,
            SIZE=S,
            **_cutting(view),
            ROTATE=group.rotates,
            JITTERS=group.jitters,
            BLURS=group.halo > 0,
            **_ordering(view),
            MEANS=means,
            KEPT=kept,
            TILE=TILE,
            SIDE=side,
            TILES=next_power_of_2(side * side),
            **(KEPT_OPTIONS if kept else CUT_OPTIONS),
        )
    if group.halo:
        over = cdiv(S, BLUR_TILE - 2 * group.halo)
        blur_kernel[(B * over * over, V)](
            table,
            specs,
            unblurred,
            out,
            B,
            SIZE=S,
            OPS=_ordering(view)["OPS"],
            BLUR_AT=_ordering(view)["BLUR_AT"],
            TILE=BLUR_TILE,
            HALO=group.halo,
            SIDE=over,
            num_warps=8,
        )


def as_text(views) -> str:
    return "[" + ", ".join([view.json for view in views]) + "]"


def make_views(pixels, sizes, index, views, seed, epoch, dtype) -> list[Tensor]:
    epoch_ptr, epoch = (epoch, 0) if isinstance(epoch, Tensor) else (None, epoch)
    flat = augment_op(
        pixels.contiguous(), sizes.contiguous(), index.contiguous(), epoch_ptr, as_text(views), seed, epoch, dtype
    )
    B, start, outs = len(pixels), 0, []
    for view in views:
        S = view.size
        outs.append(flat[start : start + B * 3 * S * S].view(B, S, S, 3).permute(0, 3, 1, 2))
        start += B * extent(view)
    return outs
