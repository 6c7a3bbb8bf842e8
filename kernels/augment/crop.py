"""Resampling inside a kernel: the crop of an image with antialiasing, and the rotation of a crop.

The maths is reference.py's; the layout of pixels is that of planes.py.
"""

import triton
import triton.language as tl

from .planes import clamp01, load_planes


@triton.jit
def taps(i, start, length, low, high, SIZE: tl.constexpr, BICUBIC: tl.constexpr, REFLECT: tl.constexpr):
    """Of output pixels i along one axis: centre in the source, first and last tap, whether the centre is inside the
    image, 1 / stretch, and the number of taps."""
    scale = length / SIZE
    centre = start + scale * (i.to(tl.float32) + 0.5)
    if REFLECT:
        centre = tl.where(centre < low, 2 * low + 1 - centre, centre)
        centre = tl.where(centre >= high, 2 * high - 1 - centre, centre)
    inside = (centre >= low) & (centre < high)
    stretch = tl.maximum(scale, 1.0)
    support = stretch * (2.0 if BICUBIC else 1.0)
    first = tl.maximum(tl.floor(centre - support + 0.5), low)
    last = tl.minimum(tl.floor(centre + support + 0.5), high)
    return centre, first, last, inside, 1.0 / stretch, tl.ceil(2 * support).to(tl.int32)


@triton.jit
def tap_weight(j, centre, last, inside, inv_stretch, BICUBIC: tl.constexpr):
    x = tl.abs(j + 0.5 - centre) * inv_stretch
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        w = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        w = tl.maximum(1.0 - x, 0.0)
    return tl.where((j < last) & inside, w, 0.0)


@triton.jit
def load_byte(ptrs):
    """A byte x as 128 + x / 2, by writing it into the bits of 128.0: one instruction.

    Conversions from integer to float run at a quarter of the speed of additions.
    """
    return ((tl.load(ptrs).to(tl.int32) << 15) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def crop_tile(
    image_ptr,  # uint8 rows of W pixels of 3 bytes
    W,
    iy,
    ix,
    box,  # see draws.draw_crop
    flip,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
):
    """Output pixels (iy, ix) of the box, antialiased."""
    y0, x0, h, w, top, left, bottom, right = box
    iy, ix = tl.minimum(iy, SIZE - 1), tl.minimum(ix, SIZE - 1)
    ix = tl.where(flip > 0, SIZE - 1 - ix, ix)
    cy, fy, ly, iny, sy, ny = taps(iy, y0, h, top, bottom, SIZE, BICUBIC, REFLECT)
    cx, fx, lx, inx, sx, nx = taps(ix, x0, w, left, right, SIZE, BICUBIC, REFLECT)
    r = tl.zeros(iy.shape, tl.float32)
    g, b, total_y, total_x = r, r, r, r
    for kx in range(nx):
        total_x += tap_weight(fx + kx, cx, lx, inx, sx, BICUBIC)
    for ky in range(ny):
        wy = tap_weight(fy + ky, cy, ly, iny, sy, BICUBIC)
        row = tl.maximum(tl.minimum(fy + ky, bottom - 1.0), 0.0).to(tl.int32)
        row_ptr = image_ptr + (3 * row * W).to(tl.uint32)
        for kx in range(nx):
            wx = tap_weight(fx + kx, cx, lx, inx, sx, BICUBIC)
            col = tl.maximum(tl.minimum(fx + kx, right - 1.0), 0.0).to(tl.int32)
            ptrs = row_ptr + (3 * col).to(tl.uint32)
            w2 = wy * wx
            r += w2 * load_byte(ptrs)
            g += w2 * load_byte(ptrs + 1)
            b += w2 * load_byte(ptrs + 2)
        total_y += wy
    inside = iny & inx  # outside the image it is black
    scale = tl.where(inside, (2.0 / 255.0) / tl.where(inside, total_x * total_y, 1.0), 0.0)
    rest = tl.where(inside, 256.0 / 255.0, 0.0)  # what load_byte() adds to a byte
    return [clamp01(x * scale - rest) for x in (r, g, b)]


@triton.jit
def cos_sin(degrees):
    """For angles up to 180 degrees: series at an eighth of the angle, doubled three times.  (The library's functions
    have a table in local memory, for angles of any size.)"""
    a = degrees * (0.017453292519943295 / 8)
    q = a * a
    c = 1.0 - q * (0.5 - q * (1.0 / 24 - q * (1.0 / 720)))
    s = a * (1.0 - q * (1.0 / 6 - q * (1.0 / 120 - q * (1.0 / 5040))))
    for _ in tl.static_range(3):
        c, s = c * c - s * s, 2 * c * s
    return c, s


@triton.jit
def rotated_tile(view_ptr, iy, ix, angle, SIZE: tl.constexpr):
    """Pixels (iy, ix) of the crop in the planes at view_ptr, rotated by `angle` degrees; black outside."""
    cos, sin = cos_sin(angle)
    half: tl.constexpr = (SIZE - 1) * 0.5
    dy, dx = iy.to(tl.float32) - half, ix.to(tl.float32) - half
    sx, sy = cos * dx - sin * dy + half, sin * dx + cos * dy + half
    x0, y0 = tl.floor(sx), tl.floor(sy)
    r = tl.zeros(iy.shape, tl.float32)
    g, b = r, r
    for k in tl.static_range(4):
        x, y = x0 + (k % 2), y0 + (k // 2)
        w = (1.0 - tl.abs(sx - x)) * (1.0 - tl.abs(sy - y))
        mask = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
        r_k, g_k, b_k = load_planes(view_ptr, y.to(tl.int32), x.to(tl.int32), mask, SIZE)
        r, g, b = r + w * r_k, g + w * g_k, b + w * b_k
    return r, g, b
