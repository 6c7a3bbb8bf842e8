"""Colour operations on a tile inside a kernel: jitter, grayscale, solarize.  The maths is reference.py's."""

import triton
import triton.language as tl

from .params import OPS
from .planes import clamp01

GRAY, SOLARIZE = tl.constexpr(OPS.index("gray")), tl.constexpr(OPS.index("solarize"))


@triton.jit
def luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def shift_hue(r, g, b, shift):
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
def jitter_colours(
    r,
    g,
    b,
    order,
    first,
    last,
    brightness,
    contrast,
    saturation,
    shift,
    mean,
    mask,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Operations first to last - 1 of the order.

    mean: of the view's gray, for contrast; computed here if the tile is the WHOLE view.
    """
    packed, _ = jitter_order(order)
    for step in range(first, last):
        op = (packed >> (2 * step)) & 3
        if op == 0:
            r, g, b = clamp01(r * brightness), clamp01(g * brightness), clamp01(b * brightness)
        elif op == 1:
            m = mean
            if WHOLE:
                m = tl.sum(tl.where(mask, luma(r, g, b), 0.0), 0) / (SIZE * SIZE)
            m *= 1 - contrast
            r, g, b = clamp01(r * contrast + m), clamp01(g * contrast + m), clamp01(b * contrast + m)
        elif op == 2:
            l = luma(r, g, b) * (1 - saturation)
            r, g, b = clamp01(r * saturation + l), clamp01(g * saturation + l), clamp01(b * saturation + l)
        else:
            r, g, b = shift_hue(r, g, b, shift)
    return r, g, b


@triton.jit
def gray_if(r, g, b, drawn):
    if drawn > 0:
        l = luma(r, g, b)
        r, g, b = l, l, l
    return r, g, b


@triton.jit
def solarize_if(r, g, b, drawn, threshold):
    if drawn > 0:
        r = tl.where(r >= threshold, 1 - r, r)
        g = tl.where(g >= threshold, 1 - g, g)
        b = tl.where(b >= threshold, 1 - b, b)
    return r, g, b


@triton.jit
def gray_and_solarize(r, g, b, gray, solarize, threshold, ORDER: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr):
    """Grayscale and solarize, those at positions START to STOP - 1 of ORDER (four codes of two bits)."""
    for step in tl.static_range(START, STOP):
        if ((ORDER >> (2 * step)) & 3) == GRAY:
            r, g, b = gray_if(r, g, b, gray)
        elif ((ORDER >> (2 * step)) & 3) == SOLARIZE:
            r, g, b = solarize_if(r, g, b, solarize, threshold)
    return r, g, b
