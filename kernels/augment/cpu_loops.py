"""The loops of cpu.py, compiled by numba, on views (3, S, S) in [0, 1].

All compiled functions are in one file: numba's cache notices changes only in the file of the function that is called.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from .params import COL, OPS
from .reference import JITTER_ORDERS

Array = np.ndarray
compiled = njit(nogil=True, cache=True)

ZERO, ONE = np.float32(0), np.float32(1)
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # luma, ITU-R 601-2
ORDERS = np.array(JITTER_ORDERS)
JITTER, GRAY, BLUR, SOLARIZE = range(len(OPS))
Y0, X0, H, W, TOP, LEFT, BOTTOM, RIGHT = (COL[k] for k in ("y0", "x0", "h", "w", "top", "left", "bottom", "right"))
FLIP, ANGLE, ORDER, BRIGHTNESS = (COL[k] for k in ("flip", "angle", "order", "brightness"))
IS_GRAY, SIGMA, IS_SOLARIZED = (COL[k] for k in ("gray", "sigma", "solarize"))


class Spec(NamedTuple):
    """The parameters of a view that are the same for all samples."""

    bicubic: bool
    reflect: bool
    rotates: bool
    ops: Array  # numbers of OPS in their order
    jitters: Array  # whether brightness, contrast, saturation and hue change
    blur_radius: int
    threshold: np.float32  # of solarize
    mean: Array
    std: Array


@compiled
def make_part(images: Array, widths: Array, table: Array, spec: Spec, out: Array) -> None:
    """Write a view of each image into `out` (n, S, S, 3).  images (n, P, 3) uint8: the pixels, row by row, padded to P;
    widths (n,): pixels in a row; table (n, columns): see params.COLUMNS."""
    S = out.shape[1]
    x, y = np.empty((3, S, S), np.float32), np.empty((3, S, S), np.float32)
    for i in range(len(table)):
        crop(images[i], widths[i], table[i], spec, x)
        if spec.rotates:
            rotate(x, table[i, ANGLE], y)
            x, y = y, x
        for op in spec.ops:
            apply(op, x, table[i], spec, y)
        store(x, spec, out[i])


@compiled
def apply(op: int, x: Array, row: Array, spec: Spec, scratch: Array) -> None:
    """One of OPS in place, if it was drawn; `scratch`: (3, S, S), overwritten."""
    if op == JITTER and row[ORDER] >= 0:  # -1: not drawn
        for which in ORDERS[int(row[ORDER])]:
            if spec.jitters[which]:
                jitter(x, which, row[BRIGHTNESS + which])
    elif op == GRAY and row[IS_GRAY] > 0:
        gray(x)
    elif op == BLUR and row[SIGMA] > 0 and spec.blur_radius > 0:
        blur(x, row[SIGMA], spec.blur_radius, scratch)
    elif op == SOLARIZE and row[IS_SOLARIZED] > 0:
        solarize(x, spec.threshold)


@compiled
def taps(S: int, box: tuple, mirrored: bool, spec: Spec) -> tuple[Array, Array, Array]:
    """Resampling weights along one axis for each of S output pixels: index of the first source pixel (S,), number n of
    source pixels (S,), and weights (S, K), the first n of which are set.

    box: start and length of the crop, and the range low <= x < high that may be read, in source pixels."""
    start, length, low, high = box
    scale = length / S
    stretch = max(scale, 1.0)
    support = stretch * (2 if spec.bicubic else 1)
    first, count = np.zeros(S, np.int64), np.zeros(S, np.int64)
    weight = np.empty((S, int(2 * support) + 2), np.float64)
    for i in range(S):
        centre = start + scale * ((S - 1 - i if mirrored else i) + 0.5)
        if spec.reflect and centre < low:
            centre = 2 * low + 1 - centre
        if spec.reflect and centre >= high:
            centre = 2 * high - 1 - centre
        if centre < low or centre >= high:
            continue
        j0 = max(np.floor(centre - support + 0.5), low)
        j1 = min(np.floor(centre + support + 0.5), high)
        first[i], count[i] = int(j0), int(j1 - j0)
        total = 0.0
        for k in range(count[i]):
            d = abs(j0 + k + 0.5 - centre) / stretch
            weight[i, k] = cubic(d) if spec.bicubic else max(1.0 - d, 0.0)
            total += weight[i, k]
        weight[i, : count[i]] /= total
    return first, count, weight


@compiled
def cubic(d: float) -> float:
    """Keys' kernel with a = -0.5, at a distance."""
    if d < 1:
        return (1.5 * d - 2.5) * d * d + 1
    return ((d - 5) * d + 8) * d * -0.5 + 2 if d < 2 else 0.0


@compiled
def crop(image: Array, width: int, row: Array, spec: Spec, x: Array) -> None:
    """The crop of an image (P, 3) as x (3, S, S) in [0, 1].  Each row of the view is first a weighted sum of rows of
    the image; weighted sums over its columns then give the pixels."""
    S = x.shape[1]
    y_first, y_count, y_weight = taps(S, (row[Y0], row[H], row[TOP], row[BOTTOM]), False, spec)
    x_first, x_count, x_weight = taps(S, (row[X0], row[W], row[LEFT], row[RIGHT]), row[FLIP] > 0, spec)
    left, right = width, 0  # columns that are needed
    for j in range(S):
        if x_count[j] > 0:
            left, right = min(left, x_first[j]), max(right, x_first[j] + x_count[j])
    flat = image.reshape(-1)
    sums = np.empty(3 * max(right - left, 0), np.float32)
    for i in range(S):
        sums[:] = ZERO
        for k in range(y_count[i]):
            at = 3 * ((y_first[i] + k) * width + left)
            add(sums, np.float32(y_weight[i, k]), flat[at : at + len(sums)])
        sums /= np.float32(255)
        for j in range(S):
            r, g, b = ZERO, ZERO, ZERO
            for k in range(x_count[j]):
                w, at = np.float32(x_weight[j, k]), 3 * (x_first[j] + k - left)
                r += w * sums[at]
                g += w * sums[at + 1]
                b += w * sums[at + 2]
            x[0, i, j], x[1, i, j], x[2, i, j] = r, g, b
    if spec.bicubic:  # it overshoots
        scale_and_clamp(x.reshape(-1), ONE, ZERO)


@compiled
def add(out: Array, w: float, row: Array) -> None:
    for j in range(len(out)):
        out[j] += w * np.float32(row[j])


@compiled
def rotate(x: Array, angle: float, out: Array) -> None:
    """Counter-clockwise by `angle` degrees about the centre, bilinear, black outside."""
    S = x.shape[1]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    centre = np.float32(0.5) * np.float32(S - 1)
    for i in range(S):
        for j in range(S):
            dy, dx = np.float32(i) - centre, np.float32(j) - centre
            px, py = cos * dx - sin * dy + centre, sin * dx + cos * dy + centre
            u, v = int(np.floor(px)), int(np.floor(py))
            fx, fy = px - np.float32(u), py - np.float32(v)
            for c in range(3):
                upper = (ONE - fx) * pixel(x[c], v, u) + fx * pixel(x[c], v, u + 1)
                lower = (ONE - fx) * pixel(x[c], v + 1, u) + fx * pixel(x[c], v + 1, u + 1)
                out[c, i, j] = (ONE - fy) * upper + fy * lower


@compiled
def pixel(x: Array, i: int, j: int) -> float:
    return x[i, j] if 0 <= i < x.shape[0] and 0 <= j < x.shape[1] else ZERO


@compiled
def jitter(x: Array, which: int, factor: float) -> None:
    """which: 0 brightness, 1 contrast, 2 saturation (`factor` multiplies), 3 hue (`factor` is added, in turns)."""
    flat = x.reshape(3, -1)
    r, g, b = flat[0], flat[1], flat[2]
    if which == 0:
        scale_and_clamp(flat.reshape(-1), factor, ZERO)
    elif which == 1:
        scale_and_clamp(flat.reshape(-1), factor, (ONE - factor) * mean_luma(r, g, b))
    elif which == 2:
        saturation(r, g, b, factor)
    else:
        hue(r, g, b, factor)


@compiled
def scale_and_clamp(x: Array, factor: float, offset: float) -> None:
    for i in range(len(x)):
        x[i] = min(max(x[i] * factor + offset, ZERO), ONE)


# "reassoc" lets the sum use vector registers, in an order that is fixed when it is compiled
@njit(nogil=True, cache=True, fastmath={"reassoc"})
def mean_luma(r: Array, g: Array, b: Array) -> np.float32:
    total = 0.0
    for i in range(len(r)):
        total += r[i] * RED + g[i] * GREEN + b[i] * BLUE
    return np.float32(total / len(r))


@compiled
def saturation(r: Array, g: Array, b: Array, factor: float) -> None:
    rest = ONE - factor
    for i in range(len(r)):
        luma = rest * (r[i] * RED + g[i] * GREEN + b[i] * BLUE)
        r[i] = min(max(r[i] * factor + luma, ZERO), ONE)
        g[i] = min(max(g[i] * factor + luma, ZERO), ONE)
        b[i] = min(max(b[i] * factor + luma, ZERO), ONE)


@compiled
def hue(r: Array, g: Array, b: Array, shift: float) -> None:
    """Shift the hue in HSV; back to RGB by min + (max - min) * ramp(hue)."""
    two, three, four, six = np.float32(2), np.float32(3), np.float32(4), np.float32(6)
    sixth, turn = ONE / six, six * shift
    for i in range(len(r)):
        red, green, blue = r[i], g[i], b[i]
        high, low = max(max(red, green), blue), min(min(red, green), blue)
        spread = high - low
        inverse = ONE / (spread if spread > ZERO else ONE)
        of_red, of_green, of_blue = green - blue, blue - red, red - green
        h = (
            of_red * inverse
            if high == red
            else (of_green * inverse + two if high == green else of_blue * inverse + four)
        )
        h += turn
        h -= six * np.floor(h * sixth)  # into [0, 6]
        r[i] = min(max(abs(h - three) - ONE, ZERO), ONE) * spread + low
        g[i] = min(max(two - abs(h - two), ZERO), ONE) * spread + low
        b[i] = min(max(two - abs(h - four), ZERO), ONE) * spread + low


@compiled
def gray(x: Array) -> None:
    flat = x.reshape(3, -1)
    r, g, b = flat[0], flat[1], flat[2]
    for i in range(len(r)):
        luma = r[i] * RED + g[i] * GREEN + b[i] * BLUE
        r[i] = luma
        g[i] = luma
        b[i] = luma


@compiled
def blur(x: Array, sigma: float, radius: int, rows: Array) -> None:
    """Gaussian up to 4 sigma, at most `radius`, with reflected borders.  rows: (3, S, S), overwritten."""
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


@compiled
def reflected(i: int, S: int) -> int:
    i = abs(i)
    return i if i < S else 2 * (S - 1) - i


@compiled
def scale(out: Array, w: float, row: Array) -> None:
    for j in range(len(out)):
        out[j] = w * row[j]


@compiled
def add_pair(out: Array, w: float, a: Array, b: Array) -> None:
    for j in range(len(out)):
        out[j] += w * (a[j] + b[j])


@compiled
def solarize(x: Array, threshold: float) -> None:
    flat = x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = ONE - flat[i] if flat[i] >= threshold else flat[i]


@compiled
def store(x: Array, spec: Spec, out: Array) -> None:
    """x (3, S, S), normalised, as (S, S, 3)."""
    for c in range(3):
        mean, std = spec.mean[c], spec.std[c]
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                out[i, j, c] = (x[c, i, j] - mean) / std
