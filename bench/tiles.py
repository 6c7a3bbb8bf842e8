"""Compare tile sizes of the kernels that are limited by the tensor cores: python bench/tiles.py [sums gradients
one_pass]

Compiles every candidate for each width (no GPU needed) and prints registers, spills, shared memory, programs per
multiprocessor, and instructions per entry of the tile in one pass of the main loop.  On a GPU it also prints the time,
after comparing the result with that of the tiles in use.  `*` marks the tiles in use, which kernels/similarity/spec.py
and kernels/one_pass/keys.py choose; they must not spill.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from common import append, environment
from ops import captured, microseconds
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastssl.kernels.ntxent import triton as ntxent
from fastssl.kernels.one_pass import keys, loss_and_gradient
from fastssl.kernels.similarity import gradients as gradient_pass
from fastssl.kernels.similarity import row_sums as sums_pass
from fastssl.kernels.testing import Build, compile_launch, record_launches
from fastssl.kernels.tiling import FAKE_CAPABILITY, Tiles, needs_small_tiles

QUEUE = 65536
Found = tuple[float, float, Tiles, Build]  # microseconds or inf, instructions per entry


def sums(z: Tensor) -> Callable[[], Tensor]:
    return lambda: ntxent.forward(z, None, 0.1, False, True, None)[0]


def gradients(z: Tensor) -> Callable[[], Tensor]:
    _, *saved = ntxent.forward(z, None, 0.1, False, True, None)
    grad = torch.ones((), device=z.device)
    return lambda: ntxent.backward(grad, z, saved, 0.1, False, True, None)


def one_pass(z: Tensor) -> Callable[[], Tensor]:
    queue = torch.nn.functional.normalize(torch.randn(QUEUE, z.shape[1], device=z.device), dim=1).half()
    return lambda: loss_and_gradient(z, z, queue, 0.1, True, None, True)[1]


KERNELS = {  # function that returns the call to time, kernel, module and name of the function that chooses its tiles
    "sums": (sums, "row_sums_kernel", sums_pass, "row_sums_tiles"),
    "gradients": (gradients, "row_gradients_kernel", gradient_pass, "gradient_tiles"),
    "one_pass": (one_pass, "one_pass_kernel", keys, "one_pass_tiles"),
}


def candidates(width: int) -> Iterator[Tiles]:
    for block_m, block_n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield Tiles(block_m, block_n, width, warps, stages)


@contextlib.contextmanager
def override_tiles(module: ModuleType, name: str, tiles: Tiles | None) -> Iterator[list[Tiles]]:
    """Context manager: `module.name` returns `tiles` (None: the tiles in use); yields the list of tiles that it would
    have returned."""
    original, shipped = getattr(module, name), []

    def choose(*arguments: Any) -> Tiles:
        shipped.append(original(*arguments))
        return tiles or shipped[-1]

    setattr(module, name, choose)
    try:
        yield shipped
    finally:
        setattr(module, name, original)


def build(name: str, width: int, rows: int, arch: int, tiles: Tiles | None = None) -> tuple[Build | None, Tiles]:
    """The testing.Build, None if it does not compile, and the tiles in use."""
    work, kernel, module, chooser = KERNELS[name]
    FAKE_CAPABILITY["capability"] = arch
    with override_tiles(module, chooser, tiles) as shipped, record_launches() as launches:
        work(torch.empty(rows, width, device="meta", dtype=torch.float16))()
    found = next(x for x in launches if x.kernel.__name__ == kernel)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # an error prints the whole program
            return compile_launch(found, arch), shipped[-1]
    except Exception as error:
        if "ptxas" not in str(error).lower():
            raise
        return None, shipped[-1]


def timed(name: str, width: int, rows: int, tiles: Tiles | None) -> tuple[float, Tensor]:
    """Median microseconds of the whole op, and its result."""
    work, _, module, chooser = KERNELS[name]
    torch.manual_seed(0)
    z = torch.randn(rows, width, device="cuda").half()
    with override_tiles(module, chooser, tiles):
        f = work(z)
        result = f()
        return microseconds(captured(f)[0], False)["median"], result


def measure(name: str, width: int, rows: int, arch: int, only_shipped: bool) -> tuple[Tiles, list[Found]]:
    """The tiles in use, and for each candidate (microseconds or inf, instructions per entry, tiles, testing.Build)."""
    cuda = torch.cuda.is_available()
    _, shipped = build(name, width, rows, arch)
    truth = timed(name, width, rows, None)[1] if cuda else None
    found: list[Found] = []
    todo = [shipped, *([] if only_shipped else candidates(width))]
    for tiles in todo:
        if tiles[:6] in (line[2][:6] for line in found):
            continue
        b, _ = build(name, width, rows, arch, tiles)
        if b is None or not b.fits:
            continue
        if tiles != shipped:  # columns are split for the number of programs that fit
            tiles = tiles._replace(programs_per_sm=min(b.programs_per_sm, 2))
        if b.registers > 128 and tiles.num_warps == 8 and not only_shipped:
            todo.append(tiles._replace(maxnreg=128))
        us = math.inf
        if truth is not None and not b.spills:
            try:
                us, result = timed(name, width, rows, tiles)
            except OutOfResources:  # of GPUs with less shared memory than an A100
                continue
            error = float((result.double() - truth.double()).abs().max() / truth.double().abs().max())
            if not error < 1e-3:
                print(f"  not timed, the result is wrong: {tiles} has an error of {error:.2g}")
                continue
        found.append((us, b.loop * 32 * tiles.num_warps / (tiles.block_m * tiles.block_n), tiles, b))
    return shipped, found


def show(shipped: Tiles, found: list[Found]) -> None:
    for us, per_entry, tiles, b in sorted(found, key=lambda line: (line[0], line[3].spills, line[1])):
        limit = f" (of {tiles.maxnreg})" if tiles.maxnreg else ""
        print(
            f" {'*' if tiles == shipped else ' '} {tiles.block_m:3} x {tiles.block_n:3}, {tiles.num_warps} warps, "
            f"{tiles.num_stages} stages: {b.registers:3} registers{limit:9}, {b.spills:4} B spilled, "
            f"{b.shared / 1024:5.1f} KB, {b.programs_per_sm} at a time, {per_entry:4.1f} instructions an entry"
            + (f", {us:.1f} us" if us < math.inf else "")
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90), help="compute capability, without a GPU")
    parser.add_argument("--shipped", action="store_true", help="only the tiles in use")
    args = parser.parse_args()
    unknown = set(args.kernels) - set(KERNELS)
    if unknown:
        parser.error(f"unknown kernel {', '.join(sorted(unknown))}; choose from {', '.join(KERNELS)}")
    cuda, arch = torch.cuda.is_available(), args.arch
    if cuda:
        arch = 80 if needs_small_tiles(torch.device("cuda")) else 90  # the architecture whose tiles this GPU uses
    torch.set_float32_matmul_precision("high")
    env = environment("triton")
    for name, width in itertools.product(args.kernels or KERNELS, args.dims):
        print(f"\n{name}, D = {width}, {args.rows} rows, sm_{arch}")
        shipped, found = measure(name, width, args.rows, arch, args.shipped)
        show(shipped, found)
        if cuda:
            times = [[*tiles, us] for us, _, tiles, _ in found if us < math.inf]
            result = {"kernel": name, "width": width, "rows": args.rows, "shipped": shipped._asdict(), "us": times}
            append("tiles", env, **result)
    if not cuda:
        print("\nno CUDA device: nothing was timed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
