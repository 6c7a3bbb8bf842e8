"""Which tiles suit the kernels that are bound by the tensor cores: python bench/tiles.py [sums gradients one_pass]

For each width, every candidate: registers, spills, shared memory, how many programs a multiprocessor holds and
instructions of one pass per entry of the tile, as compiled ahead of time (no GPU needed), and on a GPU also its time,
after its result is held to the shipped tiles'.  `*` are the shipped ones, which kernels/ntxent/launch.py and
kernels/infonce/triton.py choose; they may not spill.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import sys

import torch
from common import append, environment
from ops import captured, microseconds
from triton.runtime.errors import OutOfResources

from fastssl.kernels.common import PRETENDED
from fastssl.kernels.infonce import triton as infonce
from fastssl.kernels.ntxent import launch
from fastssl.kernels.ntxent import triton as ntxent
from fastssl.kernels.testing import compile_launch, record_launches

QUEUE = 65536


def sums(z):
    return lambda: ntxent.forward(z, None, 0.1, False, True, None)[0]


def gradients(z):
    _, *saved = ntxent.forward(z, None, 0.1, False, True, None)
    grad = torch.ones((), device=z.device)
    return lambda: ntxent.backward(grad, z, *saved, 0.1, False, True, None)


def one_pass(z):
    queue = torch.nn.functional.normalize(torch.randn(QUEUE, z.shape[1], device=z.device), dim=1).half()
    return lambda: infonce.forward(z, z, queue, 0.1, True, None)[1]


KERNELS = {  # the work, the kernel in it, and where its tiles are chosen
    "sums": (sums, "row_sums_kernel", launch, "sums_tiles"),
    "gradients": (gradients, "row_gradients_kernel", launch, "gradient_tiles"),
    "one_pass": (one_pass, "one_pass_kernel", infonce, "one_pass_tiles"),
}


def candidates(width):
    for bm, bn, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield launch.Tiles(bm, bn, width, warps, stages)


@contextlib.contextmanager
def chosen(module, name, tiles):
    """Inside, `tiles` are used instead of the shipped ones; yields those."""
    shipped, seen = getattr(module, name), []

    def choose(*arguments):
        seen.append(shipped(*arguments))
        return tiles or seen[-1]

    setattr(module, name, choose)
    try:
        yield seen
    finally:
        setattr(module, name, shipped)


def built(name, width, rows, arch, tiles=None):
    """What the compiler made of it, None where it refuses; and the shipped tiles."""
    work, kernel, module, chooser = KERNELS[name]
    PRETENDED["capability"] = arch
    with chosen(module, chooser, tiles) as shipped, record_launches() as launches:
        work(torch.empty(rows, width, device="meta", dtype=torch.float16))()
    found = next(x for x in launches if x.kernel.__name__ == kernel)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a refusal prints the whole program
            return compile_launch(found, arch), shipped[-1]
    except Exception as error:
        if "ptxas" not in str(error).lower():
            raise
        return None, shipped[-1]


def timed(name, width, rows, tiles):
    """Median microseconds of the whole op, and its result."""
    work, _, module, chooser = KERNELS[name]
    torch.manual_seed(0)
    z = torch.randn(rows, width, device="cuda").half()
    with chosen(module, chooser, tiles):
        f = work(z)
        result = f()
        return microseconds(captured(f)[0], False)["median"], result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90), help="without a GPU: compute capability")
    parser.add_argument("--shipped", action="store_true", help="no other candidates")
    args = parser.parse_args()
    unknown = set(args.kernels) - set(KERNELS)
    if unknown:
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    cuda, arch = torch.cuda.is_available(), args.arch
    if cuda:
        arch = 80 if launch.small_memory(torch.device("cuda")) else 90  # whose tiles this card takes
    torch.set_float32_matmul_precision("high")
    env = environment("triton")
    for name in args.kernels or KERNELS:
        for width in args.dims:
            print(f"\n{name}, D = {width}, {args.rows} rows, sm_{arch}")
            _, shipped = built(name, width, args.rows, arch)
            truth = timed(name, width, args.rows, None)[1] if cuda else None
            lines, todo = [], [shipped, *([] if args.shipped else candidates(width))]
            for tiles in todo:
                if tiles[:6] in (line[3][:6] for line in lines):
                    continue
                b, _ = built(name, width, args.rows, arch, tiles)
                if b is None or not b.fits:
                    continue
                if tiles != shipped:  # columns are split for as many as really fit
                    tiles = tiles._replace(resident=min(b.resident, 2))
                if b.registers > 128 and tiles.warps == 8 and not args.shipped:
                    todo.append(tiles._replace(registers=128))
                us = None
                if cuda and not b.spills:
                    try:
                        us, result = timed(name, width, args.rows, tiles)
                    except OutOfResources:  # of cards with less shared memory than an A100
                        continue
                    error = float((result.double() - truth.double()).abs().max() / truth.double().abs().max())
                    if not error < 1e-3:
                        print(f"  RED, so no time: {tiles} is off by {error:.2g}")
                        continue
                each = b.loop * 32 * tiles.warps / (tiles.bm * tiles.bn)
                lines.append((us or math.inf, b.spills, each, tiles, b))
            for us, spills, each, tiles, b in sorted(lines, key=lambda line: line[:3]):
                limit = f" (of {tiles.registers})" if tiles.registers else ""
                print(
                    f" {'*' if tiles == shipped else ' '} {tiles.bm:3} x {tiles.bn:3}, {tiles.warps} warps, "
                    f"{tiles.stages} stages: {b.registers:3} registers{limit:9}, {spills:4} B spilled, "
                    f"{b.shared / 1024:5.1f} KB, {b.resident} at a time, {each:4.1f} instructions an entry"
                    + (f", {us:.1f} us" if us < math.inf else "")
                )
            if cuda:
                append(
                    "tiles",
                    env,
                    kernel=name,
                    width=width,
                    rows=args.rows,
                    shipped=shipped._asdict(),
                    us=[[*tiles, us] for us, _, _, tiles, _ in lines if us < math.inf],
                )
    if not cuda:
        print("\nno CUDA device: nothing was timed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
