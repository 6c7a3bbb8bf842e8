"""The kernels that compute views.  Up to 64 pixels, one program of `whole_kernel` computes a view.  Larger or rotated
views need several passes, which store parameters, crops, contrast means and unblurred tiles in memory:
draws.draw_kernel, crop_kernel (for rotations), colour_kernel (once or twice), blur_kernel.

Operations on a tile are in crop.py, colour.py and blur.py, its layout in planes.py, the random numbers in draws.py.
"""

import triton
import triton.language as tl

from . import blur, colour, crop, draws, params, planes

NUM_COLUMNS, NUM_FIELDS = draws.NUM_COLUMNS, draws.NUM_FIELDS
OFFSET, TURNS, THRESHOLD = (tl.constexpr(draws.FIELD[n]) for n in ("offset", "quarter_turns", "threshold"))
MEAN = tl.constexpr(draws.FIELD["mean_r"])
# columns of the parameter table that the passes read
FLIP, ORDER = (tl.constexpr(params.COL[n]) for n in ("flip", "order"))
ANGLE, GRAY, SIGMA, SOLARIZE = (tl.constexpr(params.COL[n]) for n in ("angle", "gray", "sigma", "solarize"))


@triton.jit
def view_ptr_of(out_ptr, spec_ptr, batch, i_sample, SIZE: tl.constexpr):
    """The pointer to the output of one view of one sample."""
    return out_ptr + tl.load(spec_ptr + OFFSET).to(tl.int64) * batch + i_sample.to(tl.int64) * (SIZE * SIZE * 3)


@triton.jit(do_not_specialize=["seed", "epoch"])
def whole_kernel(
    pixels_ptr,  # (B, max_pixels, 3) uint8
    max_pixels,
    sizes_ptr,  # (B, 2) int: height and width of each image
    index_ptr,  # (B,) int64: number of each sample
    specs_ptr,  # (V, NUM_FIELDS) float64: what differs between the views
    out_ptr,  # the views of all samples, one after another (see triton.augment_op)
    seed,
    epoch,
    epoch_ptr,  # () int64, if EPOCH_PTR
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
    """A whole view in registers; grid (B, V)."""
    i_sample, i_view = tl.program_id(0), tl.program_id(1)
    spec_ptr = specs_ptr + i_view * NUM_FIELDS
    counter = draws.counter(spec_ptr, index_ptr, i_sample, epoch, epoch_ptr, EPOCH_PTR)
    H, W = draws.load_size(sizes_ptr, i_sample)
    box = draws.draw_crop(spec_ptr, seed, counter, H, W, CROP, SIZE, RESIZE, PAD, WINDOW)
    flip, _, order, fb, fc, fs, fh, gray, sigma, solarize = draws.draw_colour(spec_ptr, seed, counter)
    iy, ix = planes.tile_coordinates(0, 0, TILE)
    mask = (iy < SIZE) & (ix < SIZE)
    image_ptr = pixels_ptr + i_sample.to(tl.int64) * max_pixels * 3
    rgb = crop.crop_tile(image_ptr, W, iy, ix, box, flip, SIZE, BICUBIC, REFLECT)
    threshold = tl.load(spec_ptr + THRESHOLD).to(tl.float32)
    rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, 0, JITTER_AT)
    if JITTERS:  # noqa: SIM102 - one is decided at compile time, the other is a branch
        if order >= 0:
            rgb = colour.jitter_colours(rgb, order, 0, 4, (fb, fc, fs, fh), 0.0, mask, SIZE, True)
    rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, JITTER_AT + 1, BLUR_AT)
    if BLURS:  # noqa: SIM102
        if sigma > 0:
            rgb = blur.blur_whole(rgb, sigma, SIZE, TILE)
    rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, BLUR_AT + 1, 4)
    view_ptr = view_ptr_of(out_ptr, spec_ptr, tl.num_programs(0), i_sample, SIZE)
    turns = tl.load(spec_ptr + TURNS).to(tl.int32)
    planes.store_view(view_ptr, iy, ix, mask, rgb, turns, spec_ptr + MEAN, SIZE)


@triton.jit
def program_tile(batch, SIDE: tl.constexpr, STEP: tl.constexpr):
    """For programs (tile of a sample, view): sample, view, number of the pair, number of the tile, its first row and
    column."""
    pid, i_view = tl.program_id(0), tl.program_id(1)
    tile, i_sample = pid % (SIDE * SIDE), pid // (SIDE * SIDE)
    i_pair = (i_view * batch + i_sample).to(tl.int64)
    return i_sample, i_view, i_pair, tile, tile // SIDE * STEP, tile % SIDE * STEP


@triton.jit
def crop_of_row(
    pixels_ptr,
    max_pixels,
    sizes_ptr,
    row_ptr,  # (NUM_COLUMNS,) float32: a row of the parameter table
    i_sample,
    iy,
    ix,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
):
    return crop.crop_tile(
        pixels_ptr + i_sample.to(tl.int64) * max_pixels * 3,
        tl.load(sizes_ptr + 2 * i_sample + 1).to(tl.int32),
        iy,
        ix,
        [tl.load(row_ptr + i) for i in (0, 1, 2, 3, 4, 5, 6, 7)],  # y0 to right
        tl.load(row_ptr + FLIP),
        SIZE,
        BICUBIC,
        REFLECT,
    )


@triton.jit
def crop_kernel(
    pixels_ptr,  # (B, max_pixels, 3) uint8
    max_pixels,
    sizes_ptr,  # (B, 2) int
    table_ptr,  # (V, B, NUM_COLUMNS) float32
    crops_ptr,  # (V, B, 3, SIZE, SIZE) int16 out
    batch,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Stores the crop of rotated views, whose pixels the rotation interpolates."""
    i_sample, _, i_pair, _, first_y, first_x = program_tile(batch, SIDE, TILE)
    iy, ix = planes.tile_coordinates(first_y, first_x, TILE)
    row_ptr = table_ptr + i_pair * NUM_COLUMNS
    rgb = crop_of_row(pixels_ptr, max_pixels, sizes_ptr, row_ptr, i_sample, iy, ix, SIZE, BICUBIC, REFLECT)
    mask = (iy < SIZE) & (ix < SIZE)
    planes.store_planes(crops_ptr + i_pair * (SIZE * SIZE * 3), iy, ix, mask, rgb, SIZE)


@triton.jit
def colour_kernel(
    pixels_ptr,  # (B, max_pixels, 3) uint8
    max_pixels,
    sizes_ptr,  # (B, 2) int
    table_ptr,  # (V, B, NUM_COLUMNS) float32
    specs_ptr,  # (V, NUM_FIELDS) float64
    crops_ptr,  # (V, B, 3, SIZE, SIZE) int16: read if ROTATE or LOAD_CROP, written if MEANS without ROTATE
    sums_ptr,  # (V, B, SIDE * SIDE) float32: each tile's sum of gray, written if MEANS
    unblurred_ptr,  # (V, B, 3, SIZE, SIZE) int16 out, for samples that blur
    out_ptr,  # the views of all samples, one after another
    batch,
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
    LOAD_CROP: tl.constexpr,
    TILE: tl.constexpr,
    SIDE: tl.constexpr,
    TILES: tl.constexpr,
):
    """First pass, MEANS: for samples that jitter, the operations before contrast and the sum of their gray; the tile is
    stored unless other tiles still read the crop to rotate it.  Last pass: the finished tile, or for samples that blur
    the tile before its blur.

    LOAD_CROP: the first pass stored the tile.
    """
    i_sample, i_view, i_pair, tile, first_y, first_x = program_tile(batch, SIDE, TILE)
    row_ptr, spec_ptr = table_ptr + i_pair * NUM_COLUMNS, specs_ptr + i_view * NUM_FIELDS
    order = tl.load(row_ptr + ORDER).to(tl.int32)
    iy, ix = planes.tile_coordinates(first_y, first_x, TILE)
    mask = (iy < SIZE) & (ix < SIZE)
    crops_ptr += i_pair * (SIZE * SIZE * 3)
    if ROTATE:
        rgb = crop.rotated_tile(crops_ptr, iy, ix, tl.load(row_ptr + ANGLE), SIZE)
    elif LOAD_CROP:
        rgb = planes.load_planes(crops_ptr, iy, ix, mask, SIZE)
    else:
        rgb = crop_of_row(pixels_ptr, max_pixels, sizes_ptr, row_ptr, i_sample, iy, ix, SIZE, BICUBIC, REFLECT)
    gray, solarize = tl.load(row_ptr + GRAY), tl.load(row_ptr + SOLARIZE)
    threshold = tl.load(spec_ptr + THRESHOLD).to(tl.float32)
    factors = [tl.load(row_ptr + ORDER + i) for i in (1, 2, 3, 4)]
    if not LOAD_CROP:
        rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, 0, JITTER_AT)
    if MEANS:
        if order >= 0:
            _, contrast_at = colour.jitter_order(order)
            rgb = colour.jitter_colours(rgb, order, 0, contrast_at, factors, 0.0, mask, SIZE, False)
            gray_sum = tl.sum(tl.where(mask, colour.luma(rgb), 0.0), 0)
            tl.store(sums_ptr + i_pair * (SIDE * SIDE) + tile, gray_sum)
        if not ROTATE:
            planes.store_planes(crops_ptr, iy, ix, mask, rgb, SIZE)
    else:
        if JITTERS:  # noqa: SIM102
            if order >= 0:
                t = tl.arange(0, TILES)
                sums = tl.load(sums_ptr + i_pair * (SIDE * SIDE) + t, mask=t < SIDE * SIDE, other=0.0)
                mean = tl.sum(sums, 0) * (1.0 / (SIZE * SIZE))
                first = 0
                if LOAD_CROP:
                    _, first = colour.jitter_order(order)
                rgb = colour.jitter_colours(rgb, order, first, 4, factors, mean, mask, SIZE, False)
        rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, JITTER_AT + 1, BLUR_AT)
        blurred = False
        if BLURS:
            blurred = tl.load(row_ptr + SIGMA) > 0
            if blurred:
                planes.store_half_planes(unblurred_ptr + i_pair * (SIZE * SIZE * 3), iy, ix, mask, rgb, SIZE)
        if not blurred:
            rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, BLUR_AT + 1, 4)
            view_ptr = view_ptr_of(out_ptr, spec_ptr, batch, i_sample, SIZE)
            turns = tl.load(spec_ptr + TURNS).to(tl.int32)
            planes.store_view(view_ptr, iy, ix, mask, rgb, turns, spec_ptr + MEAN, SIZE)


@triton.jit
def blur_kernel(
    table_ptr,  # (V, B, NUM_COLUMNS) float32
    specs_ptr,  # (V, NUM_FIELDS) float64
    unblurred_ptr,  # (V, B, 3, SIZE, SIZE) int16
    out_ptr,  # the views of all samples, one after another
    batch,
    SIZE: tl.constexpr,
    OPS: tl.constexpr,
    BLUR_AT: tl.constexpr,
    TILE: tl.constexpr,
    HALO: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Blur and the operations after it, for samples that blur; TILE includes the halo on both sides."""
    i_sample, i_view, i_pair, _, first_y, first_x = program_tile(batch, SIDE, TILE - 2 * HALO)
    row_ptr, spec_ptr = table_ptr + i_pair * NUM_COLUMNS, specs_ptr + i_view * NUM_FIELDS
    sigma = tl.load(row_ptr + SIGMA)
    if sigma > 0:
        tile_ptr = unblurred_ptr + i_pair * (SIZE * SIZE * 3)
        rgb = blur.blur_tile(tile_ptr, first_y, first_x, sigma, SIZE, TILE, HALO)
        threshold = tl.load(spec_ptr + THRESHOLD).to(tl.float32)
        gray, solarize = tl.load(row_ptr + GRAY), tl.load(row_ptr + SOLARIZE)
        rgb = colour.gray_and_solarize(rgb, gray, solarize, threshold, OPS, BLUR_AT + 1, 4)
        y, x = planes.tile_coordinates(0, 0, TILE)
        iy, ix = first_y + y, first_x + x
        mask = (y < TILE - 2 * HALO) & (x < TILE - 2 * HALO) & (iy < SIZE) & (ix < SIZE)
        view_ptr = view_ptr_of(out_ptr, spec_ptr, batch, i_sample, SIZE)
        turns = tl.load(spec_ptr + TURNS).to(tl.int32)
        planes.store_view(view_ptr, iy, ix, mask, rgb, turns, spec_ptr + MEAN, SIZE)
