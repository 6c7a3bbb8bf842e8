"""The views on a CPU, compiled by numba: every view of a sample is made at once, in memory that stays in the cache.

The same operations as in reference.py, on (3, S, S) in [0, 1], and the same parameters (params.draw).  Images are
shared among torch's number of threads.  Shapes: B samples, S output side.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .params import COL, OPS, View
from .reference import JITTER_ORDERS

Array = np.ndarray

ZERO, ONE = np.float32(0), np.float32(1)
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # luma, ITU-R 601-2
ORDERS = np.array(JITTER_ORDERS)
JITTER, GRAY, BLUR, SOLARIZE = range(len(OPS))
Y0, X0, H, W, TOP, LEFT, BOTTOM, RIGHT = (
    COL[name] for name in ("y0", "x0", "h", "w", "top", "left", "bottom", "right")
)
FLIP, ANGLE, ORDER, BRIGHTNESS, IS_GRAY, SIGMA, IS_SOLARIZED = (
    COL[name] for name in ("flip", "angle", "order", "brightness", "gray", "sigma", "solarize")
)


def make_views(
    pixels: Tensor, sizes: Tensor, views: Sequence[View], tables: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """See reference.make_views."""
    outs = [torch.empty((len(sizes), view.size, view.size, 3), dtype=torch.float32) for view in views]
    images, shapes = pixels.contiguous().numpy(), sizes.contiguous().numpy()
    parts = [
        (images, shapes, table[rows], rows.start, out.numpy(), *_numbers(view))
        for view, table, out in zip(views, tables.numpy(), outs)
        for rows in _ranges(len(sizes))
    ]
    if torch.get_num_threads() == 1:
        for part in parts:
            make_rows(*part)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda part: make_rows(*part), parts))
    return [out.to(dtype).permute(0, 3, 1, 2) for out in outs]


def _ranges(rows: int) -> list[slice]:
    """Slices of equal size, several for a thread, because some samples take longer."""
    size = -(-rows // (4 * torch.get_num_threads())) or 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _numbers(view: View) -> tuple:
    return (
        view.interpolation == "bicubic",
        view.pad_mode == "reflect",
        view.rotate > 0,
        np.array([OPS.index(op) for op in view.order]),
        np.array([bool(strength) for strength in view.jitter]),
        view.blur_radius,
        np.float32(view.solarize_threshold),
        view.quarter_turns,
        np.array([view.mean, view.std], np.float32),
    )


@njit(nogil=True, cache=True)
def make_rows(
    images: Array,
    sizes: Array,
    table: Array,
    start: int,
    out: Array,
    bicubic: bool,
    reflect: bool,
    rotates: bool,
    ops: Array,
    jitters: Array,
    radius: int,
    threshold: float,
    turns: int,
    mean_std: Array,
) -> None:
    """The views out[start:] (S, S, 3) of as many samples as `table` has rows."""
    S = out.shape[1]
    x, y = np.empty((3, S, S), np.float32), np.empty((3, S, S), np.float32)
    for i in range(len(table)):
        row, b = table[i], start + i
        crop(images[b], sizes[b, 1], row, bicubic, reflect, x)
        if rotates:
            rotate(x, row[ANGLE], y)
            x, y = y, x
        for op in ops:
            if op == JITTER and row[ORDER] >= 0:
                for which in ORDERS[int(row[ORDER])]:
                    if jitters[which]:
                        jitter(x, which, row[BRIGHTNESS + which])
            elif op == GRAY and row[IS_GRAY] > 0:
                gray(x)
            elif op == BLUR and row[SIGMA] > 0 and radius > 0:
                blur(x, row[SIGMA], radius, y)
            elif op == SOLARIZE and row[IS_SOLARIZED] > 0:
                solarize(x, threshold)
        store(x, turns, mean_std, out[b])


@njit(nogil=True, cache=True)
def taps(
    S: int,
    start: float,
    length: float,
    low: float,
    high: float,
    mirrored: bool,
    bicubic: bool,
    reflect: bool,
    first: Array,
    count: Array,
    weight: Array,
) -> None:
    """Number of the first source pixel, number of pixels and their weights (S, K) for each of S output pixels."""
    scale = length / S
    stretch = max(scale, 1.0)
    support = stretch * (2 if bicubic else 1)
    for i in range(S):
        centre = start + scale * ((S - 1 - i if mirrored else i) + 0.5)
        if reflect and centre < low:
            centre = 2 * low + 1 - centre
        if reflect and centre >= high:
            centre = 2 * high - 1 - centre
        count[i] = 0
        if centre < low or centre >= high:
            continue
        j0 = max(np.floor(centre - support + 0.5), low)
        j1 = min(np.floor(centre + support + 0.5), high)
        total = 0.0
        for k in range(int(j1 - j0)):
            d = abs(j0 + k + 0.5 - centre) / stretch
            if not bicubic:
                w = max(1.0 - d, 0.0)
            elif d < 1:
                w = (1.5 * d - 2.5) * d * d + 1
            elif d < 2:
                w = ((d - 5) * d + 8) * d * -0.5 + 2
            else:
                w = 0.0
            weight[i, k] = w
            total += w
        first[i], count[i] = int(j0), int(j1 - j0)
        weight[i, : count[i]] /= total


@njit(nogil=True, cache=True)
def crop(image: Array, width: int, row: Array, bicubic: bool, reflect: bool, x: Array) -> None:
    """The box of an image (P, 3) of rows of `width` pixels as (3, S, S) in [0, 1]: columns first, a row at a time."""
    S = x.shape[1]
    longest = int(2 * max(1.0, max(row[H], row[W]) / S) * (2 if bicubic else 1)) + 2
    y_first, y_count, y_weight = np.empty(S, np.int64), np.empty(S, np.int64), np.empty((S, longest))
    x_first, x_count, x_weight = np.empty(S, np.int64), np.empty(S, np.int64), np.empty((S, longest))
    taps(S, row[Y0], row[H], row[TOP], row[BOTTOM], False, bicubic, reflect, y_first, y_count, y_weight)
    taps(S, row[X0], row[W], row[LEFT], row[RIGHT], row[FLIP] > 0, bicubic, reflect, x_first, x_count, x_weight)
    left, right = width, 0  # columns that are needed
    for i in range(S):
        if x_count[i] > 0:
            left, right = min(left, x_first[i]), max(right, x_first[i] + x_count[i])
    flat = image.reshape(-1)
    sums = np.empty(3 * max(right - left, 0), np.float32)
    for i in range(S):
        sums[:] = ZERO
        for k in range(y_count[i]):
            w = np.float32(y_weight[i, k])
            source = flat[3 * ((y_first[i] + k) * width + left) :]
            for j in range(len(sums)):
                sums[j] += w * np.float32(source[j])
        for j in range(len(sums)):
            sums[j] /= np.float32(255)
        for j in range(S):
            r, g, b = ZERO, ZERO, ZERO
            at = 3 * (x_first[j] - left)
            for k in range(x_count[j]):
                w = np.float32(x_weight[j, k])
                r += w * sums[at + 3 * k]
                g += w * sums[at + 3 * k + 1]
                b += w * sums[at + 3 * k + 2]
            x[0, i, j], x[1, i, j], x[2, i, j] = r, g, b
    if bicubic:  # it overshoots
        clamp(x)


@njit(nogil=True, cache=True)
def clamp(x: Array) -> None:
    flat = x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = min(max(flat[i], ZERO), ONE)


@njit(nogil=True, cache=True)
def rotate(x: Array, angle: float, out: Array) -> None:
    """Counter-clockwise by `angle` degrees about the centre, bilinear, black outside."""
    S = x.shape[1]
    a = np.deg2rad(angle)
    cos, sin = np.cos(a), np.sin(a)
    centre = np.float32(0.5) * np.float32(S - 1)
    for i in range(S):
        for j in range(S):
            dy, dx = np.float32(i) - centre, np.float32(j) - centre
            px, py = cos * dx - sin * dy + centre, sin * dx + cos * dy + centre
            left, top = int(np.floor(px)), int(np.floor(py))
            fx, fy = px - np.float32(left), py - np.float32(top)
            for c in range(3):
                out[c, i, j] = ZERO
            for v in range(2):
                for u in range(2):
                    if 0 <= top + v < S and 0 <= left + u < S:
                        w = (fy if v else ONE - fy) * (fx if u else ONE - fx)
                        for c in range(3):
                            out[c, i, j] += w * x[c, top + v, left + u]


@njit(nogil=True, cache=True)
def jitter(x: Array, which: int, factor: float) -> None:
    """Brightness, contrast, saturation or hue, by number."""
    flat = x.reshape(3, -1)
    r, g, b = flat[0], flat[1], flat[2]
    if which == 0:
        brightness(flat.reshape(-1), factor)
    elif which == 1:
        blend(flat.reshape(-1), factor, (ONE - factor) * mean_luma(r, g, b))
    elif which == 2:
        saturation(r, g, b, factor)
    else:
        hue(r, g, b, factor)


@njit(nogil=True, cache=True)
def brightness(x: Array, factor: float) -> None:
    for i in range(len(x)):
        x[i] = min(max(x[i] * factor, ZERO), ONE)


@njit(nogil=True, cache=True)
def blend(x: Array, factor: float, add: float | np.float32) -> None:
    for i in range(len(x)):
        x[i] = min(max(x[i] * factor + add, ZERO), ONE)


@njit(nogil=True, cache=True, fastmath={"reassoc"})  # the sum in vector registers; its order depends on nothing else
def mean_luma(r: Array, g: Array, b: Array) -> np.float32:
    total = 0.0
    for i in range(len(r)):
        total += r[i] * RED + g[i] * GREEN + b[i] * BLUE
    return np.float32(total / len(r))


@njit(nogil=True, cache=True)
def saturation(r: Array, g: Array, b: Array, factor: float) -> None:
    rest = ONE - factor
    for i in range(len(r)):
        add = rest * (r[i] * RED + g[i] * GREEN + b[i] * BLUE)
        r[i] = min(max(r[i] * factor + add, ZERO), ONE)
        g[i] = min(max(g[i] * factor + add, ZERO), ONE)
        b[i] = min(max(b[i] * factor + add, ZERO), ONE)


@njit(nogil=True, cache=True)
def hue(r: Array, g: Array, b: Array, shift: float) -> None:
    """Through HSV; back by rgb = min + (max - min) * ramp(hue)."""
    two, three, four, six = np.float32(2), np.float32(3), np.float32(4), np.float32(6)
    sixth, turn = ONE / six, six * shift
    for i in range(len(r)):
        red, green, blue = r[i], g[i], b[i]
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        spread = high - low
        inverse = ONE / (spread if spread > ZERO else ONE)
        of_red, of_green, of_blue = (
            (green - blue) * inverse,
            (blue - red) * inverse + two,
            (red - green) * inverse + four,
        )
        h = (of_red if high == red else (of_green if high == green else of_blue)) + turn
        h -= six * np.floor(h * sixth)  # into [0, 6]
        r[i] = min(max(abs(h - three) - ONE, ZERO), ONE) * spread + low
        g[i] = min(max(two - abs(h - two), ZERO), ONE) * spread + low
        b[i] = min(max(two - abs(h - four), ZERO), ONE) * spread + low


@njit(nogil=True, cache=True)
def gray(x: Array) -> None:
    flat = x.reshape(3, -1)
    r, g, b = flat[0], flat[1], flat[2]
    for i in range(len(r)):
        luma = r[i] * RED + g[i] * GREEN + b[i] * BLUE
        r[i] = luma
        g[i] = luma
        b[i] = luma


@njit(nogil=True, cache=True)
def blur(x: Array, sigma: float, radius: int, rows: Array) -> None:
    """Gaussian up to 4 sigma, at most `radius`, the border reflected without its edge; `rows`: (3, S, S) to use."""
    S = x.shape[1]
    R = min(int(np.ceil(4 * sigma)), radius)
    weight = np.exp(np.float32(-0.5) * (np.arange(R + 1).astype(np.float32) / sigma) ** 2)
    weight /= 2 * weight.sum() - weight[0]
    padded = np.empty(S + 2 * R, np.float32)
    for c in range(3):
        for i in range(S):
            for j in range(-R, S + R):
                padded[j + R] = x[c, i, reflected(j, S)]
            scale(rows[c, i], weight[0], padded[R : R + S])
            for k in range(1, R + 1):
                add_pair(rows[c, i], weight[k], padded[R - k : R - k + S], padded[R + k : R + k + S])
    for c in range(3):
        for i in range(S):
            scale(x[c, i], weight[0], rows[c, i])
            for k in range(1, R + 1):
                add_pair(x[c, i], weight[k], rows[c, reflected(i - k, S)], rows[c, reflected(i + k, S)])


@njit(nogil=True, cache=True)
def reflected(i: int, S: int) -> int:
    i = abs(i)
    return i if i < S else 2 * (S - 1) - i


@njit(nogil=True, cache=True)
def scale(out: Array, w: float, row: Array) -> None:
    for j in range(len(out)):
        out[j] = w * row[j]


@njit(nogil=True, cache=True)
def add_pair(out: Array, w: float, a: Array, b: Array) -> None:
    for j in range(len(out)):
        out[j] += w * (a[j] + b[j])


@njit(nogil=True, cache=True)
def solarize(x: Array, threshold: float) -> None:
    flat = x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = ONE - flat[i] if flat[i] >= threshold else flat[i]


@njit(nogil=True, cache=True)
def store(x: Array, turns: int, mean_std: Array, out: Array) -> None:
    """x (3, S, S) normalised and turned counter-clockwise by quarters, as (S, S, 3)."""
    S = x.shape[1]
    for c in range(3):
        mean, std = mean_std[0, c], mean_std[1, c]
        for i in range(S):
            for j in range(S):
                if turns == 0:
                    value = x[c, i, j]
                elif turns == 1:
                    value = x[c, j, S - 1 - i]
                elif turns == 2:
                    value = x[c, S - 1 - i, S - 1 - j]
                else:
                    value = x[c, S - 1 - j, i]
                out[i, j, c] = (value - mean) / std
