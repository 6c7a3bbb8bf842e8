"""Launches of the kernels of tiles.py and rows.py: tile sizes, splits, workspaces.  Shared by ntxent and the symmetric
InfoNCE; `u` are rows of this rank, `v` the columns of all ranks, both normalised, cast and padded.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..collectives import gather
from ..common import capability, cdiv, pow2, processors
from . import rows as rk
from . import tiles as tk

PAD = 128  # rows of v, and with them weights, pulls and labels, are padded to a multiple: no tile's load needs a mask
LOSS_BLOCK = 256  # rows whose losses one program adds
HELD = 256  # widest row whose block of gradients is held in registers; above it, the gradient goes through a matmul
WORKSPACE = 16 << 20  # bytes of logit gradients held at a time where a row is wider than that (or half of v)


class Form(NamedTuple):
    """What the loss is: which entries count, and how their exponentials are kept in range."""

    temperature: float
    normalize: bool
    diagonal: bool  # leave out a row's similarity with itself
    decoupled: bool
    half: int  # row i's partner is (i + half) mod m

    @property
    def online(self):
        return not self.normalize or self.temperature < tk.LOWEST_FIXED

    @property
    def c(self):
        return 1 / (math.log(2) * self.temperature)


class Tiles(NamedTuple):
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    registers: int | None = None  # the most a thread may take; 128 lets two programs of 8 warps run side by side
    resident: int = 1  # programs that a multiprocessor runs side by side: columns are split over so many and no more


def tile_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """float16 for unit rows: 8 times more exact than bfloat16 and twice as fast as TF32, with |u| <= 1 always in range.

    float32 rows stay float32 while torch.set_float32_matmul_precision is "highest" (its default).
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return dtype
    return torch.float16 if normalize else dtype


def padded_width(d: int, dtype: torch.dtype) -> int:
    return pow2(max(d, 16)) if dtype.itemsize == 2 and d <= HELD else cdiv(d, 64) * 64


def small_memory(device) -> bool:
    """Takes Ampere's tiles: Hopper's and data-centre Blackwell's need up to 115 KB, of which sm_120 has 99."""
    return capability(device) // 10 not in (9, 10)


def sums_tiles(width: int, dtype: torch.dtype, labels: bool, decoupled: bool, device) -> Tiles:
    """The largest tiles that spill no registers (tests/kernels/test_builds.py); comparing labels takes many.

    On Hopper, up to a width of 128, they leave room for a second program, whose products run during the first's
    exponentials.
    """
    if dtype.itemsize == 4:
        return Tiles(64, 64, 32, 8, 2, resident=2)
    ampere = small_memory(device)
    if width > HELD:
        return Tiles(128, 32 if labels else 64 if ampere else 128, 64, 8, 3, resident=2)
    if labels or (decoupled and not ampere and width <= 128):
        return Tiles(128, 32 if ampere or width > 128 else 64, width, 8, 3 if width <= 128 else 2, resident=2)
    return Tiles(128, 128 if width <= 128 else 64, width, 8, 2, resident=2)


def gradient_tiles(width: int, labels: bool, device) -> Tiles:
    if small_memory(device):
        return Tiles(64 if labels and width > 128 else 128, 32, width, 8, 3 if width <= 128 else 2)
    if labels or width > 128:
        return Tiles(128, 64, width, 8, 2)
    return Tiles(128, 64, width, 8, 3, 128, resident=2)


def precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def n_splits(programs: int, tiles: int, device, resident: int = 2) -> tuple[int, int]:
    """Over how many programs to split `tiles` columns where a multiprocessor runs `resident`: (splits, tiles each)."""
    return _n_splits(programs, tiles, resident * processors(device))


@functools.lru_cache(maxsize=1024)
def _n_splits(programs, tiles, places):
    """The fewest splits that are within 5 % of the shortest time, of those that fill the places at most twice."""

    def passes(splits):  # of the place that is busy longest
        return cdiv(programs * splits, places) * cdiv(tiles, splits)

    possible = range(1, max(1, min(2 * places // programs, tiles)) + 1)
    enough = 1.05 * min(map(passes, possible))
    each = cdiv(tiles, next(s for s in possible if passes(s) <= enough))
    return cdiv(tiles, each), each


def prepare(x, y, form: Form, group, normalize_y=False):
    """v (N padded, width), the inverse norms of x (m,), and the exact <x_i, y_i> (m,), or without y nothing."""
    m, d = x.shape
    dtype = tile_dtype(x.dtype, form.normalize)
    width = padded_width(d, dtype)
    world = 1 if group is None else dist.get_world_size(group)
    padded = cdiv(m * world, PAD) * PAD
    v = torch.empty((padded, width), dtype=dtype, device=x.device)
    u = v if world == 1 else torch.empty((m, width), dtype=dtype, device=x.device)
    inv = torch.empty(m, dtype=torch.float32, device=x.device)
    dot = torch.empty(m if y is not None else 0, dtype=torch.float32, device=x.device)
    block_d = pow2(width)
    block_r = max(1, 4096 // block_d)
    other = x if y is None else y
    rk.prepare_kernel[(cdiv(u.shape[0], block_r),)](
        x,
        *x.stride(),
        other,
        *other.stride(),
        u,
        inv,
        dot,
        m,
        u.shape[0],
        D=d,
        DP=width,
        BD=block_d,
        BR=block_r,
        NORMALIZE=form.normalize,
        DOT=y is not None,
        NORMALIZE_Y=normalize_y,
    )
    if world > 1:
        dist.all_gather_into_tensor(v[: m * world], u, group=group)
        v[m * world :].zero_()
    return v, inv, dot


def classes_of(labels, padded):
    """int32 (padded,), equal where labels are and -1 past their end; and how many rows each class has, by that number.

    A tile compares them in half the registers that labels of 64 bits take.
    """
    n, slots = len(labels), pow2(2 * len(labels))  # at most half full
    table = torch.zeros(slots + slots // 2, dtype=torch.int64, device=labels.device)
    keys, count = table[:slots], table[slots:].view(torch.int32)
    classes = torch.empty(padded, dtype=torch.int32, device=labels.device)
    rk.classes_kernel[(padded // PAD,)](labels, keys, count, classes, n, slots, BR=PAD, num_warps=4)
    return classes, count


def loss_parts(sides, m, device):
    """Where row_losses() leaves its sums: added, they are the loss."""
    return torch.empty((sides, cdiv(m, LOSS_BLOCK)), dtype=torch.float32, device=device)


def row_losses(u, v, m, n, offset, classes, count, form: Form, loss, share, group):
    """All rows' weights w, and with labels one over the number of each own row's positives.

    Into `loss` go sums of this rank's row losses, times share.  w is as long as v: tiles read it without a mask, and
    what lies past row n counts for nothing.
    """
    has_labels = classes is not None
    t = sums_tiles(v.shape[1], v.dtype, has_labels, form.decoupled, v.device)
    programs = cdiv(m, t.bm)
    splits, each = n_splits(programs, cdiv(n, t.bn), v.device, t.resident)
    stat = torch.empty((3 if form.online else 2, splits, m), dtype=torch.float32, device=v.device)
    tk.row_sums_kernel[(programs, splits)](
        u,
        v,
        classes,
        stat,
        m,
        n,
        form.half,
        offset,
        each,
        form.c,
        D=v.shape[1],
        BM=t.bm,
        BN=t.bn,
        BK=t.bk,
        PRECISION=precision(),
        DIAG=form.diagonal,
        DECOUPLED=form.decoupled,
        LABELS=has_labels,
        ONLINE=form.online,
        num_warps=t.warps,
        num_stages=t.stages,
        maxnreg=t.registers,
    )
    w = torch.empty(v.shape[0] if group is None else m, dtype=torch.float32, device=v.device)
    a = torch.empty(m if has_labels else 0, dtype=torch.float32, device=v.device)
    rk.row_losses_kernel[(len(loss),)](
        stat,
        classes,
        count,
        w,
        a,
        loss,
        m,
        splits,
        offset,
        share * math.log(2),
        BR=LOSS_BLOCK,
        LABELS=has_labels,
        ONLINE=form.online,
    )
    return gather(w, group, v.shape[0]), a


def row_gradients(grad, x, inv, u, v, w_row, w_col, a, n, offset, classes, form: Form, factor):
    """The gradient with respect to x (m, D), times factor and grad."""
    m = x.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    has_labels = classes is not None
    gexp = 13 if v.dtype == torch.float16 else 0  # gradients of a logit lie in [-2, 2]: use fp16's whole range
    flags = {
        "DIAG": form.diagonal,
        "DECOUPLED": form.decoupled,
        "LABELS": has_labels,
        "ONLINE": form.online,
        "GEXP": gexp,
        "PULL": 0.0 if form.decoupled and n == 2 else 2.0,  # of two rows, decoupled, every sum is empty
        "PRECISION": precision(),
    }

    def end(acc, first, rows, splits):
        block_d = pow2(v.shape[1])
        block_r = max(1, 2048 // block_d)
        rk.row_gradients_end_kernel[(cdiv(rows, block_r),)](
            acc,
            x,
            *x.stride(),
            inv,
            grad,
            out,
            m,
            rows,
            first,
            splits,
            factor,
            D=x.shape[1],
            DP=v.shape[1],
            BD=block_d,
            BR=block_r,
            NORMALIZE=form.normalize,
            SCALE=2.0**-gexp,
        )

    width = v.shape[1]
    if width <= HELD and v.dtype.itemsize == 2:
        t = gradient_tiles(width, has_labels, v.device)
        programs = cdiv(m, t.bm)
        splits, each = n_splits(programs, cdiv(n, t.bn), v.device, t.resident)
        acc = torch.empty((splits, m, width), dtype=torch.float32, device=v.device)
        tk.row_gradients_kernel[(programs, splits)](
            u,
            v,
            classes,
            w_row,
            w_col,
            a,
            acc,
            m,
            n,
            form.half,
            offset,
            each,
            form.c,
            D=width,
            BM=t.bm,
            BN=t.bn,
            **flags,
            num_warps=t.warps,
            num_stages=t.stages,
            maxnreg=t.registers,
        )
        end(acc, 0, m, splits)
        return out

    t = sums_tiles(max(width, HELD + 1), v.dtype, has_labels, form.decoupled, v.device)
    budget = max(WORKSPACE, v.nbytes // 2) // (v.shape[0] * v.dtype.itemsize)
    chunk = min(max(budget // t.bm, 1), cdiv(m, t.bm)) * t.bm
    g = torch.empty((chunk, v.shape[0]), dtype=v.dtype, device=v.device)
    for first in range(0, m, chunk):
        tk.gradient_chunk_kernel[(chunk // t.bm, v.shape[0] // t.bn)](
            u,
            v,
            classes,
            w_row,
            w_col,
            a,
            g,
            first,
            m,
            n,
            v.shape[0],
            form.half,
            offset,
            form.c,
            D=width,
            BM=t.bm,
            BN=t.bn,
            BK=t.bk if width % t.bk == 0 else 16,
            **flags,
            num_warps=t.warps,
            num_stages=t.stages,
        )
        end(matmul_float32(g, v), first, chunk, 1)
    return out


def matmul_float32(a, b):
    """a @ b summed and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
