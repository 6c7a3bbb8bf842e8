"""What happens to a tile of pixels inside a kernel: crop, rotate, jitter, grayscale, blur, solarize, store.

r, g, b are float32 in [0, 1], a tile's pixels row by row in one dimension: neighbours in x are neighbours in a warp, so
that one load or store of a warp touches one or two lines of memory.  The maths is reference.py's.

Unfinished views lie in memory as planes (3, SIZE, SIZE) of 16 bits: fixed point, or before a blur half precision.
"""

import triton
import triton.language as tl

from .params import OPS

GRAY, SOLARIZE = tl.constexpr(OPS.index("gray")), tl.constexpr(OPS.index("solarize"))


@triton.jit
def clamp01(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def tile(oy, ox, TILE: tl.constexpr):
    """Rows and columns of the pixels of a tile whose first pixel is (oy, ox)."""
    i = tl.arange(0, TILE * TILE)
    return oy + i // TILE, ox + i % TILE


@triton.jit
def window(i, start, length, low, high, SIZE: tl.constexpr, BICUBIC: tl.constexpr, REFLECT: tl.constexpr):
    """For output pixels i: source centre, first and last tap, inside the image?; and 1 / stretch, number of taps."""
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
def weight(j, centre, last, inside, shrink, BICUBIC: tl.constexpr):
    x = tl.abs(j + 0.5 - centre) * shrink
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        w = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        w = tl.maximum(1.0 - x, 0.0)
    return tl.where((j < last) & inside, w, 0.0)


@triton.jit
def value(p):
    """A byte x as 128 + x / 2: written into the bits of 128.0, in one instruction.  A GPU converts at a quarter of its
    speed for sums."""
    return ((tl.load(p).to(tl.int32) << 15) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def low_bits(x):
    """float32 of an integer below 2^23: as the last bits of 2^23, taken off again."""
    return (x | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def crop(
    image,
    W,
    iy,
    ix,
    y0,
    x0,
    h,
    w,
    top,
    left,
    bottom,
    right,
    flip,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    REFLECT: tl.constexpr,
):
    """Output pixels (iy, ix) of the box, antialiased.  image: uint8 rows of W pixels of 3 bytes."""
    iy, ix = tl.minimum(iy, SIZE - 1), tl.minimum(ix, SIZE - 1)
    ix = tl.where(flip > 0, SIZE - 1 - ix, ix)
    cy, fy, ly, iny, sy, ny = window(iy, y0, h, top, bottom, SIZE, BICUBIC, REFLECT)
    cx, fx, lx, inx, sx, nx = window(ix, x0, w, left, right, SIZE, BICUBIC, REFLECT)
    r = tl.zeros(iy.shape, tl.float32)
    g, b, total_y, total_x = r, r, r, r
    for kx in range(nx):
        total_x += weight(fx + kx, cx, lx, inx, sx, BICUBIC)
    for ky in range(ny):
        wy = weight(fy + ky, cy, ly, iny, sy, BICUBIC)
        row = tl.maximum(tl.minimum(fy + ky, bottom - 1.0), 0.0).to(tl.int32)
        p_row = image + (3 * row * W).to(tl.uint32)
        for kx in range(nx):
            wx = weight(fx + kx, cx, lx, inx, sx, BICUBIC)
            col = tl.maximum(tl.minimum(fx + kx, right - 1.0), 0.0).to(tl.int32)
            p = p_row + (3 * col).to(tl.uint32)
            w2 = wy * wx
            r += w2 * value(p)
            g += w2 * value(p + 1)
            b += w2 * value(p + 2)
        total_y += wy
    inside = iny & inx  # outside the image it is black
    scale = tl.where(inside, (2.0 / 255.0) / tl.where(inside, total_x * total_y, 1.0), 0.0)
    rest = tl.where(inside, 256.0 / 255.0, 0.0)  # what value() adds to a byte
    return clamp01(r * scale - rest), clamp01(g * scale - rest), clamp01(b * scale - rest)


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
def rotated(view, iy, ix, angle, SIZE: tl.constexpr):
    """Pixels (iy, ix) of the kept crop `view`, turned by `angle` degrees; black outside."""
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
        m = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
        u, v, t = kept(view, y.to(tl.int32), x.to(tl.int32), m, SIZE)
        r, g, b = r + w * u, g + w * v, b + w * t
    return r, g, b


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
    h -= 6.0 * tl.floor(h * (1.0 / 6.0))
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
def jitter(
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
    """Operations first to last - 1 of the order.  WHOLE: the tile is the view, so contrast takes its mean here."""
    packed, _ = permutation(order)
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
    """exp(-offset^2 / (2 sigma^2)) up to the radius."""
    x = offset.to(tl.float32)
    return tl.where(tl.abs(x) <= radius, tl.exp2(x * x * (-0.7213475204444817 / (sigma * sigma))), 0.0)


@triton.jit
def blur_whole(r, g, b, sigma, SIZE: tl.constexpr, TILE: tl.constexpr):
    """G X G^T of the whole view, G (TILE, TILE) the Gaussian with its reflections folded in; products in fp16."""
    radius = tl.minimum(tl.ceil(4 * sigma), SIZE - 1)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    w = bell(j - i, sigma, radius) + tl.where(j > 0, bell(-j - i, sigma, radius), 0.0)
    w += tl.where(j < SIZE - 1, bell(2 * (SIZE - 1) - j - i, sigma, radius), 0.0)
    w, s = half_rows(tl.where((i < SIZE) & (j < SIZE), w, 0.0))
    return gauss(r - 0.5, w, s, TILE), gauss(g - 0.5, w, s, TILE), gauss(b - 0.5, w, s, TILE)


@triton.jit
def half_rows(w):
    """w in half precision, and what brings the sums of its rows to 1 after rounding: a flat area keeps its value."""
    w = w.to(tl.float16)
    s = tl.sum(w.to(tl.float32), 1)
    return w, 1.0 / tl.where(s > 0, s, 1.0)


@triton.jit
def gauss(x, w, s, TILE: tl.constexpr):
    """0.5 + w x w^T, both sides scaled by s.  x is centred on zero, where half precision is finest."""
    y = tl.dot(w, tl.reshape(x, [TILE, TILE]).to(tl.float16)) * s[:, None]
    return tl.reshape(tl.dot(y.to(tl.float16), tl.trans(w)) * s[None, :] + 0.5, [TILE * TILE])


@triton.jit
def mirrored(i, SIZE: tl.constexpr):
    i = tl.abs(i)
    i = tl.where(i >= SIZE, 2 * (SIZE - 1) - i, i)
    return tl.maximum(i, 0)  # beyond the mirror image: only pixels that are not stored


@triton.jit
def blur_tile(view, oy, ox, sigma, SIZE: tl.constexpr, TILE: tl.constexpr, HALO: tl.constexpr):
    """A tile whose first TILE - 2 HALO rows and columns are the blurred pixels from (oy, ox) on, of the kept `view`."""
    i = tl.arange(0, TILE)
    w = bell(i[None, :] - HALO - i[:, None], sigma, tl.minimum(tl.ceil(4 * sigma), SIZE - 1))
    w, s = half_rows(w)
    iy, ix = tile(oy - HALO, ox - HALO, TILE)
    p = at(view, mirrored(iy, SIZE), mirrored(ix, SIZE), SIZE)
    r, g, b = as_half(tl.load(p)), as_half(tl.load(p + SIZE * SIZE)), as_half(tl.load(p + 2 * SIZE * SIZE))
    return gauss(r, w, s, TILE), gauss(g, w, s, TILE), gauss(b, w, s, TILE)


@triton.jit
def at(view, iy, ix, SIZE: tl.constexpr):
    """Where a kept plane has a pixel.  Columns run backwards: ascending ones the compiler would hand to threads eight
    by eight, and move the tile between that layout and the one of all other passes, inside the crop's loop too."""
    return view + iy * SIZE + (SIZE - 1 - ix)


@triton.jit
def turned(turns, none, one, two, three):
    """The one of four that belongs to so many quarter turns."""
    return tl.where(turns == 0, none, tl.where(turns == 1, one, tl.where(turns == 2, two, three)))


@triton.jit
def store(out, iy, ix, m, r, g, b, turns, spec, MEAN: tl.constexpr, SIZE: tl.constexpr):
    """Normalise with the six numbers at spec + MEAN and write pixels of one view (SIZE, SIZE, 3), turned."""
    p = out + 3 * (
        turned(turns, 0, SIZE * SIZE - SIZE, SIZE * SIZE - 1, SIZE - 1)
        + turned(turns, SIZE, 1, -SIZE, -1) * iy
        + turned(turns, 1, -SIZE, -1, SIZE) * ix
    )
    kind = out.dtype.element_ty
    for c in tl.static_range(3):
        v = r if c == 0 else (g if c == 1 else b)
        mean, scale = tl.load(spec + MEAN + c).to(tl.float32), 1.0 / tl.load(spec + MEAN + 3 + c).to(tl.float32)
        tl.store(p + c, (v * scale - mean * scale).to(kind), mask=m)


@triton.jit
def keep(view, iy, ix, m, r, g, b, SIZE: tl.constexpr):
    """Pixels in fixed point; kept() reads them."""
    p = at(view, iy, ix, SIZE)
    tl.store(p, fixed(r), mask=m)
    tl.store(p + SIZE * SIZE, fixed(g), mask=m)
    tl.store(p + 2 * SIZE * SIZE, fixed(b), mask=m)


@triton.jit
def fixed(x):
    """[0, 1] as 16 bits, rounded: the last bits of 2^23 + x, as in low_bits().  Rounding can leave a crop's white a
    little above 1, which would wrap to black."""
    return (clamp01(x) * 65535.0 + 8388608.0).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def kept(view, iy, ix, m, SIZE: tl.constexpr):
    p = at(view, iy, ix, SIZE)
    r, g, b = (
        tl.load(p, mask=m, other=0),
        tl.load(p + SIZE * SIZE, mask=m, other=0),
        tl.load(p + 2 * SIZE * SIZE, mask=m, other=0),
    )
    return unfixed(r), unfixed(g), unfixed(b)


@triton.jit
def unfixed(x):
    return low_bits(x.to(tl.int32) & 0xFFFF) * (1.0 / 65535.0)


@triton.jit
def keep_unblurred(view, iy, ix, m, r, g, b, SIZE: tl.constexpr):
    """Pixels centred on zero in half precision; blur_tile() reads them."""
    p = at(view, iy, ix, SIZE)
    tl.store(p, half_bits(r - 0.5), mask=m)
    tl.store(p + SIZE * SIZE, half_bits(g - 0.5), mask=m)
    tl.store(p + 2 * SIZE * SIZE, half_bits(b - 0.5), mask=m)


@triton.jit
def half_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def as_half(bits):
    return bits.to(tl.float16, bitcast=True)
