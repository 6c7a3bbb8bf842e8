"""Gaussian blur of a tile inside a kernel: two products with a banded matrix on the tensor cores."""

import triton
import triton.language as tl

from .planes import bits_to_half, plane_ptrs, tile_coordinates


@triton.jit
def gaussian(offset, sigma, radius):
    """exp(-offset^2 / (2 sigma^2)), 0 beyond the radius."""
    x = offset.to(tl.float32)
    return tl.where(tl.abs(x) <= radius, tl.exp2(x * x * (-0.7213475204444817 / (sigma * sigma))), 0.0)


@triton.jit
def to_half_rows(w):
    """w in half precision, and 1 / sum of its rows after rounding, so that a flat area keeps its value."""
    w = w.to(tl.float16)
    s = tl.sum(w.to(tl.float32), 1)
    return w, 1.0 / tl.where(s > 0, s, 1.0)


@triton.jit
def filter_both_axes(x, w, s, TILE: tl.constexpr):
    """0.5 + w x w^T, rows and columns scaled by s.  x is the image minus 0.5: half precision is finest around 0."""
    y = tl.dot(w, tl.reshape(x, [TILE, TILE]).to(tl.float16)) * s[:, None]
    return tl.reshape(tl.dot(y.to(tl.float16), tl.trans(w)) * s[None, :] + 0.5, [TILE * TILE])


@triton.jit
def blur_whole(rgb, sigma, SIZE: tl.constexpr, TILE: tl.constexpr):
    """G X G^T of the whole view, with the reflections at its edges added into the Gaussian G (TILE, TILE); float16
    products."""
    radius = tl.minimum(tl.ceil(4 * sigma), SIZE - 1)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    w = gaussian(j - i, sigma, radius) + tl.where(j > 0, gaussian(-j - i, sigma, radius), 0.0)
    w += tl.where(j < SIZE - 1, gaussian(2 * (SIZE - 1) - j - i, sigma, radius), 0.0)
    w, s = to_half_rows(tl.where((i < SIZE) & (j < SIZE), w, 0.0))
    return [filter_both_axes(x - 0.5, w, s, TILE) for x in rgb]


@triton.jit
def reflect(i, SIZE: tl.constexpr):
    i = tl.abs(i)
    i = tl.where(i >= SIZE, 2 * (SIZE - 1) - i, i)
    return tl.maximum(i, 0)  # negative only for pixels that are not stored


@triton.jit
def blur_tile(view_ptr, first_y, first_x, sigma, SIZE: tl.constexpr, TILE: tl.constexpr, HALO: tl.constexpr):
    """A tile whose first TILE - 2 HALO rows and columns are the blurred pixels from (first_y, first_x) on, of the
    half-precision planes at view_ptr."""
    i = tl.arange(0, TILE)
    w = gaussian(i[None, :] - HALO - i[:, None], sigma, tl.minimum(tl.ceil(4 * sigma), SIZE - 1))
    w, s = to_half_rows(w)
    iy, ix = tile_coordinates(first_y - HALO, first_x - HALO, TILE)
    ptrs = plane_ptrs(view_ptr, reflect(iy, SIZE), reflect(ix, SIZE), SIZE)
    planes = [bits_to_half(tl.load(ptrs + c * SIZE * SIZE)) for c in (0, 1, 2)]
    return [filter_both_axes(plane, w, s, TILE) for plane in planes]
