"""A tile of pixels in memory, inside a kernel: unfinished views as planes, finished views as images.

rgb is a tuple of three planes of float32 in [0, 1], the pixels of a tile row by row in one dimension: neighbours in x
are neighbours in a warp, so that one load or store of a warp touches one or two lines of memory.

Unfinished views are planes (3, SIZE, SIZE) of 16 bits: fixed point, or half precision before a blur.
"""

import triton
import triton.language as tl


@triton.jit
def clamp01(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def tile_coordinates(first_y, first_x, TILE: tl.constexpr):
    """Rows and columns (TILE * TILE,) of the pixels of a tile whose first pixel is (first_y, first_x)."""
    i = tl.arange(0, TILE * TILE)
    return first_y + i // TILE, first_x + i % TILE


@triton.jit
def plane_ptrs(view_ptr, iy, ix, SIZE: tl.constexpr):
    """The pixels of the first plane.

    Columns are stored in reverse: for ascending ones the compiler would give eight neighbours to each thread, and
    convert the tile between that layout and the one of all other passes, inside the crop's loop too.
    """
    return view_ptr + iy * SIZE + (SIZE - 1 - ix)


@triton.jit
def to_fixed_point(x):
    """[0, 1] as 16 bits, rounded: the last bits of 2^23 + x, as in int_to_float().

    Clamped, since rounding can leave a crop's white a little above 1, which would wrap to black.
    """
    return (clamp01(x) * 65535.0 + 8388608.0).to(tl.int32, bitcast=True).to(tl.int16)


@triton.jit
def int_to_float(x):
    """float32 of an integer below 2^23: it becomes the last bits of 2^23, which is subtracted again."""
    return (x | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def from_fixed_point(x):
    return int_to_float(x.to(tl.int32) & 0xFFFF) * (1.0 / 65535.0)


@triton.jit
def store_planes(view_ptr, iy, ix, mask, rgb, SIZE: tl.constexpr):
    """Pixels in fixed point; load_planes() reads them."""
    ptrs = plane_ptrs(view_ptr, iy, ix, SIZE)
    for c in tl.static_range(3):
        tl.store(ptrs + c * SIZE * SIZE, to_fixed_point(rgb[c]), mask=mask)


@triton.jit
def load_planes(view_ptr, iy, ix, mask, SIZE: tl.constexpr):
    ptrs = plane_ptrs(view_ptr, iy, ix, SIZE)
    planes = [tl.load(ptrs + c * SIZE * SIZE, mask=mask, other=0) for c in (0, 1, 2)]
    return [from_fixed_point(plane) for plane in planes]


@triton.jit
def half_to_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def bits_to_half(bits):
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def store_half_planes(view_ptr, iy, ix, mask, rgb, SIZE: tl.constexpr):
    """Pixels minus 0.5 in half precision; blur.blur_tile() reads them."""
    ptrs = plane_ptrs(view_ptr, iy, ix, SIZE)
    for c in tl.static_range(3):
        tl.store(ptrs + c * SIZE * SIZE, half_to_bits(rgb[c] - 0.5), mask=mask)


@triton.jit
def select_turn(turns, zero, one, two, three):
    """The value for this number of quarter turns."""
    return tl.where(turns == 0, zero, tl.where(turns == 1, one, tl.where(turns == 2, two, three)))


@triton.jit
def store_view(view_ptr, iy, ix, mask, rgb, turns, mean_ptr, SIZE: tl.constexpr):
    """Normalise with the six numbers at mean_ptr (mean, std) and write pixels of a view (SIZE, SIZE, 3), turned."""
    ptrs = view_ptr + 3 * (
        select_turn(turns, 0, SIZE * SIZE - SIZE, SIZE * SIZE - 1, SIZE - 1)
        + select_turn(turns, SIZE, 1, -SIZE, -1) * iy
        + select_turn(turns, 1, -SIZE, -1, SIZE) * ix
    )
    for c in tl.static_range(3):
        mean, scale = tl.load(mean_ptr + c).to(tl.float32), 1.0 / tl.load(mean_ptr + 3 + c).to(tl.float32)
        tl.store(ptrs + c, (rgb[c] * scale - mean * scale).to(view_ptr.dtype.element_ty), mask=mask)
