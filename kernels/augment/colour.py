"""Colour operations on a tile inside a kernel: jitter, grayscale, solarize.  The maths is reference.py's."""

import triton
import triton.language as tl

from .params import OPS
from .planes import clamp01

GRAY, SOLARIZE = tl.constexpr(OPS.index("gray")), tl.constexpr(OPS.index("solarize"))


@triton.jit
def luma(rgb):
    return 0.2989 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


@triton.jit
def shift_hue(rgb, shift):
    r, g, b = rgb
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    spread = high - low
    inverse = 1.0 / tl.where(spread == 0, 1.0, spread)
    h = tl.where(high == r, (g - b) * inverse, tl.where(high == g, (b - r) * inverse + 2.0, (r - g) * inverse + 4.0))
    h += 6.0 * shift
    h -= 6.0 * tl.floor(h * (1.0 / 6.0))
    r = low + spread * clamp01(tl.abs(h - 3.0) - 1.0)
    g = low + spread * clamp01(2.0 - tl.abs(h - 2.0))
    b = low + spread * clamp01(2.0 - tl.abs(h - 4.0))
    return r, g, b


@triton.jit
def jitter_order(code):
    """The order of the four jitter operations with this code, two bits each, and the position of contrast in it."""
    p0, r1, r2 = code // 6, (code % 6) // 2, code % 2
    p1 = r1 + (r1 >= p0).to(tl.int32)
    p2 = r2 + (r2 >= tl.minimum(p0, p1)).to(tl.int32)
    p2 += (p2 >= tl.maximum(p0, p1)).to(tl.int32)
    p3 = 6 - p0 - p1 - p2
    contrast_position = tl.where(p0 == 1, 0, tl.where(p1 == 1, 1, tl.where(p2 == 1, 2, 3)))
    return p0 | (p1 << 2) | (p2 << 4) | (p3 << 6), contrast_position


@triton.jit
def jitter_colours(rgb, order, first, last, factors, mean, mask, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Operations first to last - 1 of the order.

    mean: of the view's gray, for contrast; computed here if the tile is the WHOLE view.
    """
    packed, _ = jitter_order(order)
    brightness, contrast, saturation, shift = factors
    for step in range(first, last):
        op = (packed >> (2 * step)) & 3
        if op == 0:
            rgb = [clamp01(x * brightness) for x in rgb]
        elif op == 1:
            m = mean
            if WHOLE:
                m = tl.sum(tl.where(mask, luma(rgb), 0.0), 0) / (SIZE * SIZE)
            m *= 1 - contrast
            rgb = [clamp01(x * contrast + m) for x in rgb]
        elif op == 2:
            l = luma(rgb) * (1 - saturation)
            rgb = [clamp01(x * saturation + l) for x in rgb]
        else:
            rgb = shift_hue(rgb, shift)
    return rgb


@triton.jit
def gray_if(rgb, drawn):
    if drawn > 0:
        l = luma(rgb)
        rgb = l, l, l
    return rgb


@triton.jit
def solarize_if(rgb, drawn, threshold):
    if drawn > 0:
        rgb = [tl.where(x >= threshold, 1 - x, x) for x in rgb]
    return rgb


@triton.jit
def gray_and_solarize(rgb, gray, solarize, threshold, ORDER: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr):
    """Grayscale and solarize, those at positions START to STOP - 1 of ORDER (four codes of two bits)."""
    for step in tl.static_range(START, STOP):
        if ((ORDER >> (2 * step)) & 3) == GRAY:
            rgb = gray_if(rgb, gray)
        elif ((ORDER >> (2 * step)) & 3) == SOLARIZE:
            rgb = solarize_if(rgb, solarize, threshold)
    return rgb
