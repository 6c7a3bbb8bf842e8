"""Draws the parameters of a view of a sample in a kernel, with the same random words and results as `draw` of
params.py.

Boxes are computed in float64 as there, so that both select the same pixels.
"""

import triton
import triton.language as tl

from . import params

# fields in which the views of one launch may differ: a float64 row of the table of specs
FIELDS = (
    "offset",
    "stream",
    "cell",
    "quarter_turns",
    "scale0",
    "scale1",
    "log_ratio0",
    "log_ratio1",
    "ratio0",
    "ratio1",
    "flip",
    "rotate",
    "jitter_p",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray",
    "blur",
    "sigma0",
    "sigma1",
    "solarize",
    "threshold",
    "mean_r",
    "mean_g",
    "mean_b",
    "std_r",
    "std_g",
    "std_b",
)
FIELD = {name: i for i, name in enumerate(FIELDS)}
NUM_FIELDS = tl.constexpr(len(FIELDS))
NUM_COLUMNS = tl.constexpr(len(params.COLUMNS))
STREAM, CELL = tl.constexpr(FIELD["stream"]), tl.constexpr(FIELD["cell"])
SCALE, LOG_RATIO, RATIO = (tl.constexpr(FIELD[name]) for name in ("scale0", "log_ratio0", "ratio0"))
FLIP, ROTATE, JITTER_P = (tl.constexpr(FIELD[name]) for name in ("flip", "rotate", "jitter_p"))
STRENGTH, GRAY, BLUR = (tl.constexpr(FIELD[name]) for name in ("brightness", "gray", "blur"))
SIGMA, SOLARIZE = tl.constexpr(FIELD["sigma0"]), tl.constexpr(FIELD["solarize"])
# blocks of Philox, and kinds of crop
TRIES, FLAGS_BLOCK, JITTER_BLOCK = tl.constexpr(params.TRIES), tl.constexpr(params.FLAGS), tl.constexpr(params.JITTER)
OTHER_BLOCK, PATCH_BLOCK = tl.constexpr(params.OTHER), tl.constexpr(params.PATCH)
LANES = tl.constexpr(16)  # TRIES, as a power of 2
RESIZED, PATCH, RANDOM, SQUASH = (tl.constexpr(params.CROPS.index(k)) for k in ("resized", "patch", "random", "squash"))


@triton.jit
def uniform(word):
    return word.to(tl.float64) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def between(word, low, high):
    return low + (high - low) * uniform(word)


@triton.jit
def below(word, n):
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def nearest(x):
    """float64 to the nearest integer, halves to even: the sum with 2**52 has no bits for a fraction."""
    return ((x + 4503599627370496.0) - 4503599627370496.0).to(tl.int32)


@triton.jit
def centre(n, SIZE: tl.constexpr):
    d = n - SIZE
    return tl.where(d < 0, -((-d) // 2), (d >> 1) + ((d & 1) & ((d >> 1) & 1)))


@triton.jit
def offset(n, word, SIZE: tl.constexpr):
    return tl.where(n < SIZE, centre(n, SIZE), below(word, tl.maximum(n - SIZE + 1, 1)))


@triton.jit
def random_resized(spec_ptr, seed, counter, H, W):
    stream, sample, epoch = counter
    lane = tl.arange(0, LANES)
    block = lane.to(tl.uint32)
    w_area, w_ratio, w_top, w_left = tl.philox(seed, block, block * 0 + stream, block * 0 + sample, block * 0 + epoch)
    area = (H * W).to(tl.float64) * between(w_area, tl.load(spec_ptr + SCALE), tl.load(spec_ptr + SCALE + 1))
    ratio = tl.exp(between(w_ratio, tl.load(spec_ptr + LOG_RATIO), tl.load(spec_ptr + LOG_RATIO + 1)))
    tw, th = nearest(tl.sqrt(area * ratio)), nearest(tl.sqrt(area / ratio))
    fits = (tw > 0) & (tw <= W) & (th > 0) & (th <= H) & (lane < TRIES)
    first = tl.min(tl.where(fits, lane, LANES), 0)
    hit = lane == first
    w_top = tl.sum(tl.where(hit, w_top.to(tl.int64), 0), 0)
    w_left = tl.sum(tl.where(hit, w_left.to(tl.int64), 0), 0)
    th, tw = tl.sum(tl.where(hit, th, 0), 0), tl.sum(tl.where(hit, tw, 0), 0)
    low, high = tl.load(spec_ptr + RATIO), tl.load(spec_ptr + RATIO + 1)
    Hd, Wd = H.to(tl.float64), W.to(tl.float64)
    fw = tl.where(Wd / Hd > high, nearest(Hd * high), W)
    fh = tl.where(Wd / Hd < low, nearest(Wd / low), H)
    found = first < LANES
    h, w = tl.where(found, th, fh), tl.where(found, tw, fw)
    top = tl.where(found, below(w_top, H - h + 1), (H - h) // 2)
    left = tl.where(found, below(w_left, W - w + 1), (W - w) // 2)
    return top, left, h, w


@triton.jit
def draw_crop(
    spec_ptr,
    seed,
    counter,
    H,
    W,
    CROP: tl.constexpr,
    SIZE: tl.constexpr,
    RESIZE: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """float32 y0, x0, h, w of the box that becomes the view, and top, left, bottom, right of the region outside which
    taps are left out."""
    if CROP == RESIZED:
        y, x, h, w = random_resized(spec_ptr, seed, counter, H, W)
        y0, x0, bh, bw = y.to(tl.float32), x.to(tl.float32), h.to(tl.float32), w.to(tl.float32)
        return y0, x0, bh, bw, y0, x0, (y + h).to(tl.float32), (x + w).to(tl.float32)
    else:
        Hf, Wf = H.to(tl.float32), W.to(tl.float32)
        zero = Hf * 0
        if CROP == SQUASH:
            return zero, zero, Hf, Wf, zero, zero, Hf, Wf
        else:
            stream, sample, epoch = counter
            nh, nw = H, W
            if RESIZE > 0:
                short = tl.minimum(H, W)
                nh, nw = H * RESIZE // short, W * RESIZE // short
            _, _, w_top, w_left = tl.philox(seed, sample * 0, stream, sample, epoch)
            if CROP == PATCH:
                cell = tl.load(spec_ptr + CELL).to(tl.int32)
                side: tl.constexpr = WINDOW // 3
                block = sample * 0 + PATCH_BLOCK + cell.to(tl.uint32)
                v_top, v_left, _, _ = tl.philox(seed, block, stream, sample, epoch)
                top = offset(nh, w_top, WINDOW) + side * (cell // 3) + below(v_top, cell * 0 + (side - SIZE + 1))
                left = offset(nw, w_left, WINDOW) + side * (cell % 3) + below(v_left, cell * 0 + (side - SIZE + 1))
            elif CROP == RANDOM:
                top, left = offset(nh + 2 * PAD, w_top, SIZE) - PAD, offset(nw + 2 * PAD, w_left, SIZE) - PAD
            else:
                top, left = centre(nh, SIZE), centre(nw, SIZE)
            fy, fx = H.to(tl.float64) / nh.to(tl.float64), W.to(tl.float64) / nw.to(tl.float64)
            y0, x0 = (top.to(tl.float64) * fy).to(tl.float32), (left.to(tl.float64) * fx).to(tl.float32)
            return y0, x0, (SIZE * fy).to(tl.float32), (SIZE * fx).to(tl.float32), zero, zero, Hf, Wf


@triton.jit
def draw_colour(spec_ptr, seed, counter):
    """flip, angle, order, brightness, contrast, saturation, hue, gray, sigma, solarize: float32."""
    stream, sample, epoch = counter
    zero = sample * 0
    w_flip, w_jitter, w_gray, w_blur = tl.philox(seed, zero + FLAGS_BLOCK, stream, sample, epoch)
    w_b, w_c, w_s, w_h = tl.philox(seed, zero + JITTER_BLOCK, stream, sample, epoch)
    w_order, w_sigma, w_solarize, w_angle = tl.philox(seed, zero + OTHER_BLOCK, stream, sample, epoch)
    order = tl.where(uniform(w_jitter) < tl.load(spec_ptr + JITTER_P), below(w_order, zero + 24), -1)
    sb, sc, ss = tl.load(spec_ptr + STRENGTH), tl.load(spec_ptr + STRENGTH + 1), tl.load(spec_ptr + STRENGTH + 2)
    sh, turn = tl.load(spec_ptr + STRENGTH + 3), tl.load(spec_ptr + ROTATE)
    b = between(w_b, tl.maximum(1 - sb, 0.0), 1 + sb).to(tl.float32)
    c = between(w_c, tl.maximum(1 - sc, 0.0), 1 + sc).to(tl.float32)
    s = between(w_s, tl.maximum(1 - ss, 0.0), 1 + ss).to(tl.float32)
    h = between(w_h, -sh, sh).to(tl.float32)
    angle = between(w_angle, -turn, turn).to(tl.float32)
    sigma = between(w_sigma, tl.load(spec_ptr + SIGMA), tl.load(spec_ptr + SIGMA + 1)).to(tl.float32)
    sigma = tl.where(uniform(w_blur) < tl.load(spec_ptr + BLUR), sigma, 0.0)
    flip = (uniform(w_flip) < tl.load(spec_ptr + FLIP)).to(tl.float32)
    gray = (uniform(w_gray) < tl.load(spec_ptr + GRAY)).to(tl.float32)
    solarize = (uniform(w_solarize) < tl.load(spec_ptr + SOLARIZE)).to(tl.float32)
    return flip, angle, order, b, c, s, h, gray, sigma, solarize


@triton.jit
def counter(spec_ptr, index_ptr, i_sample, epoch, epoch_ptr, EPOCH_PTR: tl.constexpr):
    """Three of the four words of Philox's counter: stream, sample, epoch."""
    if EPOCH_PTR:
        epoch = tl.load(epoch_ptr)
    return tl.load(spec_ptr + STREAM).to(tl.uint32), tl.load(index_ptr + i_sample).to(tl.uint32), epoch.to(tl.uint32)


@triton.jit
def load_size(sizes_ptr, i_sample):
    """Height and width of an image."""
    return tl.load(sizes_ptr + 2 * i_sample).to(tl.int32), tl.load(sizes_ptr + 2 * i_sample + 1).to(tl.int32)


@triton.jit(do_not_specialize=["seed", "epoch"])
def draw_kernel(
    sizes_ptr,  # (B, 2) int: height and width of each image
    index_ptr,  # (B,) int64: number of each sample
    specs_ptr,  # (V, NUM_FIELDS) float64
    table_ptr,  # (V, B, NUM_COLUMNS) float32 out: the parameter table
    seed,
    epoch,
    epoch_ptr,  # () int64, if EPOCH_PTR
    CROP: tl.constexpr,
    SIZE: tl.constexpr,
    RESIZE: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    EPOCH_PTR: tl.constexpr,
):
    """One program writes one row of the table; grid (B, V)."""
    i_sample, i_view = tl.program_id(0), tl.program_id(1)
    spec_ptr = specs_ptr + i_view * NUM_FIELDS
    sample_counter = counter(spec_ptr, index_ptr, i_sample, epoch, epoch_ptr, EPOCH_PTR)
    H, W = load_size(sizes_ptr, i_sample)
    box = draw_crop(spec_ptr, seed, sample_counter, H, W, CROP, SIZE, RESIZE, PAD, WINDOW)
    row = box + draw_colour(spec_ptr, seed, sample_counter)
    row_ptr = table_ptr + (i_view * tl.num_programs(0) + i_sample) * NUM_COLUMNS
    for i in tl.static_range(NUM_COLUMNS):
        tl.store(row_ptr + i, row[i])
