"""What happens to a tile of pixels inside a kernel: crop, rotate, jitter, grayscale, blur, solarize, store.

r, g, b are tiles (TY, TX) of float32 in [0, 1]; the maths is reference.py's.
"""

import triton
import triton.language as tl

from .params import OPS

GRAY, SOLARIZE = tl.constexpr(OPS.index("gray")), tl.constexpr(OPS.index("solarize"))


@triton.jit
def clamp01(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


# ---- geometry

@triton.jit
def window(i, start, length, low, high, SIZE: tl.constexpr, BICUBIC: tl.constexpr, REFLECT: tl.constexpr):
    """For output pixels i: source centre, first and last tap, inside the image?; and the stretch and tap count."""
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
    return centre, first, last, inside, stretch, tl.ceil(2 * support).to(tl.int32)


@triton.jit
def weight(j, centre, last, inside, stretch, BICUBIC: tl.constexpr):
    x = tl.abs(j + 0.5 - centre) / stretch
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        w = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        w = tl.maximum(1.0 - x, 0.0)
    return tl.where((j < last) & inside, w, 0.0)


@triton.jit
def total(centre, first, last, inside, stretch, taps, BICUBIC: tl.constexpr):
    """One over the sum of the weights; 0 outside the image, which is black."""
    acc = centre * 0
    for k in range(taps):
        acc += weight(first + k, centre, last, inside, stretch, BICUBIC)
    return tl.where(inside, 1.0 / tl.where(inside, acc, 1.0), 0.0)


@triton.jit
def crop(image, W, iy, ix, y0, x0, h, w, top, left, bottom, right, flip, SIZE: tl.constexpr, BICUBIC: tl.constexpr,
         REFLECT: tl.constexpr):  # fmt: skip
    """Output pixels (iy, ix) of the box, antialiased.  image: uint8 rows of W pixels of 3 bytes."""
    iy, ix = tl.minimum(iy, SIZE - 1), tl.minimum(ix, SIZE - 1)
    ix = tl.where(flip > 0, SIZE - 1 - ix, ix)
    cy, fy, ly, iny, sy, ny = window(iy, y0, h, top, bottom, SIZE, BICUBIC, REFLECT)
    cx, fx, lx, inx, sx, nx = window(ix, x0, w, left, right, SIZE, BICUBIC, REFLECT)
    ty = total(cy, fy, ly, iny, sy, ny, BICUBIC)
    tx = total(cx, fx, lx, inx, sx, nx, BICUBIC) * (1.0 / 255.0)
    r = tl.zeros([iy.shape[0], ix.shape[0]], tl.float32)
    g, b = r, r
    for ky in range(ny):
        wy = weight(fy + ky, cy, ly, iny, sy, BICUBIC) * ty
        row = tl.maximum(tl.minimum(fy + ky, bottom - 1.0), 0.0).to(tl.int32) * W
        for kx in range(nx):
            wx = weight(fx + kx, cx, lx, inx, sx, BICUBIC) * tx
            col = tl.maximum(tl.minimum(fx + kx, right - 1.0), 0.0).to(tl.int32)
            p = image + 3 * (row[:, None] + col[None, :])
            w2 = wy[:, None] * wx[None, :]
            r += w2 * tl.load(p).to(tl.float32)
            g += w2 * tl.load(p + 1).to(tl.float32)
            b += w2 * tl.load(p + 2).to(tl.float32)
    if BICUBIC:
        r, g, b = clamp01(r), clamp01(g), clamp01(b)
    return r, g, b


@triton.jit
def cos_sin(degrees):
    """Of up to 180 degrees: series at an eighth of the angle, doubled three times.  (The library's own keeps a table in
    local memory for angles of any size.)"""
    a = degrees * (0.017453292519943295 / 8)
    q = a * a
    c = 1.0 - q * (0.5 - q * (1.0 / 24 - q * (1.0 / 720)))
    s = a * (1.0 - q * (1.0 / 6 - q * (1.0 / 120 - q * (1.0 / 5040))))
    for _ in tl.static_range(3):
        c, s = c * c - s * s, 2 * c * s
    return c, s


@triton.jit
def rotated(base, iy, ix, angle, SIZE: tl.constexpr):
    """Pixels (iy, ix) of the float32 (SIZE, SIZE, 3) crop at `base`, turned by `angle` degrees; black outside."""
    cos, sin = cos_sin(angle)
    half: tl.constexpr = (SIZE - 1) * 0.5
    dy, dx = (iy.to(tl.float32) - half)[:, None], (ix.to(tl.float32) - half)[None, :]
    sx, sy = cos * dx - sin * dy + half, sin * dx + cos * dy + half
    x0, y0 = tl.floor(sx), tl.floor(sy)
    r = sx * 0
    g, b = r, r
    for k in tl.static_range(4):
        x, y = x0 + (k % 2), y0 + (k // 2)
        w = (1.0 - tl.abs(sx - x)) * (1.0 - tl.abs(sy - y))
        m = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
        p = base + 3 * (y.to(tl.int32) * SIZE + x.to(tl.int32))
        r += w * tl.load(p, mask=m, other=0.0)
        g += w * tl.load(p + 1, mask=m, other=0.0)
        b += w * tl.load(p + 2, mask=m, other=0.0)
    return r, g, b


# ---- colour

@triton.jit
def luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def hue(r, g, b, shift):
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    spread = high - low
    inverse = 1.0 / tl.where(spread == 0, 1.0, spread)
    h = tl.where(high == r, (g - b) * inverse, tl.where(high == g, (b - r) * inverse + 2.0, (r - g) * inverse + 4.0))
    h += 6.0 * shift
    h -= 6.0 * tl.floor(h / 6.0)
    r = low + spread * clamp01(tl.abs(h - 3.0) - 1.0)
    g = low + spread * clamp01(2.0 - tl.abs(h - 2.0))
    b = low + spread * clamp01(2.0 - tl.abs(h - 4.0))
    return r, g, b


@triton.jit
def permutation(code):
    """The code's order of the four jitter operations, two bits each, and contrast's place in it."""
    p0, r1, r2 = code // 6, (code % 6) // 2, code % 2
    p1 = r1 + (r1 >= p0).to(tl.int32)
    p2 = r2 + (r2 >= tl.minimum(p0, p1)).to(tl.int32)
    p2 += (p2 >= tl.maximum(p0, p1)).to(tl.int32)
    p3 = 6 - p0 - p1 - p2
    place = tl.where(p0 == 1, 0, tl.where(p1 == 1, 1, tl.where(p2 == 1, 2, 3)))
    return p0 | (p1 << 2) | (p2 << 4) | (p3 << 6), place


@triton.jit
def jitter(r, g, b, order, steps, brightness, contrast, saturation, shift, mean, mask, SIZE: tl.constexpr,
           WHOLE: tl.constexpr):  # fmt: skip
    """The first `steps` operations of the order.  WHOLE: the tile is the view, so contrast takes its mean here."""
    packed, _ = permutation(order)
    for step in range(steps):
        op = (packed >> (2 * step)) & 3
        if op == 0:
            r, g, b = clamp01(r * brightness), clamp01(g * brightness), clamp01(b * brightness)
        elif op == 1:
            m = mean
            if WHOLE:
                m = tl.sum(tl.sum(tl.where(mask, luma(r, g, b), 0.0), 1), 0) / (SIZE * SIZE)
            m *= 1 - contrast
            r, g, b = clamp01(r * contrast + m), clamp01(g * contrast + m), clamp01(b * contrast + m)
        elif op == 2:
            l = luma(r, g, b) * (1 - saturation)
            r, g, b = clamp01(r * saturation + l), clamp01(g * saturation + l), clamp01(b * saturation + l)
        else:
            r, g, b = hue(r, g, b, shift)
    return r, g, b


@triton.jit
def to_gray(r, g, b, drew):
    if drew > 0:
        l = luma(r, g, b)
        r, g, b = l, l, l
    return r, g, b


@triton.jit
def to_solarized(r, g, b, drew, threshold):
    if drew > 0:
        r = tl.where(r >= threshold, 1 - r, r)
        g = tl.where(g >= threshold, 1 - g, g)
        b = tl.where(b >= threshold, 1 - b, b)
    return r, g, b


@triton.jit
def pointwise(r, g, b, gray, solarize, threshold, ORDER: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr):
    """Grayscale and solarize where they stand in places START to STOP of the order (four codes of two bits)."""
    for step in tl.static_range(START, STOP):
        if ((ORDER >> (2 * step)) & 3) == GRAY:
            r, g, b = to_gray(r, g, b, gray)
        elif ((ORDER >> (2 * step)) & 3) == SOLARIZE:
            r, g, b = to_solarized(r, g, b, solarize, threshold)
    return r, g, b


@triton.jit
def bell(offset, sigma, radius):
    x = offset.to(tl.float32) / sigma
    return tl.where(tl.abs(offset) <= radius, tl.exp(-0.5 * x * x), 0.0)


@triton.jit
def blur_whole(r, g, b, sigma, SIZE: tl.constexpr, TILE: tl.constexpr):
    """G X G^T of the whole view, G (TILE, TILE) the Gaussian with its reflections folded in; products in fp16."""
    radius = tl.minimum(tl.ceil(4 * sigma), SIZE - 1)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    w = bell(j - i, sigma, radius) + tl.where(j > 0, bell(-j - i, sigma, radius), 0.0)
    w += tl.where(j < SIZE - 1, bell(2 * (SIZE - 1) - j - i, sigma, radius), 0.0)
    w = tl.where((i < SIZE) & (j < SIZE), w, 0.0)
    return gauss(r - 0.5, w), gauss(g - 0.5, w), gauss(b - 0.5, w)


@triton.jit
def gauss(x, w):
    """0.5 + w x w^T, the rows of w brought to sum 1 after rounding, so that a flat area keeps its value.
    x is centred on zero, where half precision is finest."""
    w = w.to(tl.float16)
    s = tl.sum(w.to(tl.float32), 1)
    s = 1.0 / tl.where(s > 0, s, 1.0)
    y = tl.dot(w, x.to(tl.float16)) * s[:, None]
    return tl.dot(y.to(tl.float16), tl.trans(w)) * s[None, :] + 0.5


@triton.jit
def mirrored(i, SIZE: tl.constexpr):
    i = tl.abs(i)
    i = tl.where(i >= SIZE, 2 * (SIZE - 1) - i, i)
    return tl.maximum(i, 0)  # beyond the mirror image: only pixels that are not stored


@triton.jit
def blur_tile(base, oy, ox, sigma, SIZE: tl.constexpr, TILE: tl.constexpr, HALO: tl.constexpr):
    """The blurred pixels (oy, ox) to (oy, ox) + TILE - 2 HALO, from the centred half-precision view at `base`."""
    i = tl.arange(0, TILE)
    iy, ix = mirrored(oy - HALO + i, SIZE), mirrored(ox - HALO + i, SIZE)
    w = bell(i[None, :] - HALO - i[:, None], sigma, tl.minimum(tl.ceil(4 * sigma), SIZE - 1))
    p = base + 3 * (iy[:, None] * SIZE + ix[None, :])
    return gauss(tl.load(p), w), gauss(tl.load(p + 1), w), gauss(tl.load(p + 2), w)


@triton.jit
def store(out, iy, ix, r, g, b, turns, spec, MEAN: tl.constexpr, SIZE: tl.constexpr):
    """Normalise with the six numbers at spec + MEAN and write one view (SIZE, SIZE, 3), turned."""
    y, x = iy[:, None], ix[None, :]
    oy = tl.where(turns == 0, y, tl.where(turns == 1, SIZE - 1 - x, tl.where(turns == 2, SIZE - 1 - y, x)))
    ox = tl.where(turns == 0, x, tl.where(turns == 1, y, tl.where(turns == 2, SIZE - 1 - x, SIZE - 1 - y)))
    p = out + 3 * (oy * SIZE + ox)
    m = (y < SIZE) & (x < SIZE)
    kind = out.dtype.element_ty
    for c in tl.static_range(3):
        v = r if c == 0 else (g if c == 1 else b)
        mean, std = tl.load(spec + MEAN + c).to(tl.float32), tl.load(spec + MEAN + 3 + c).to(tl.float32)
        tl.store(p + c, ((v - mean) / std).to(kind), mask=m)


@triton.jit
def keep(base, iy, ix, r, g, b, SIZE: tl.constexpr):
    """Write pixels (iy, ix) of an unfinished view (SIZE, SIZE, 3) for a later pass."""
    p = base + 3 * (iy[:, None] * SIZE + ix[None, :])
    m = (iy < SIZE)[:, None] & (ix < SIZE)[None, :]
    kind = base.dtype.element_ty
    tl.store(p, r.to(kind), mask=m)
    tl.store(p + 1, g.to(kind), mask=m)
    tl.store(p + 2, b.to(kind), mask=m)
