"""The fused kernels compared with the reference: in Triton's interpreter on a CPU, or on a GPU with `pytest -m gpu`;
and their code, compiled for two architectures without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from augment_cases import BENCH, ONE_OP, RAW, SHAPES, pack, scenes
from kernel_device import DEVICE, needs_triton

from fastssl import views as recipes
from fastssl.kernels.augment import COL, View, draw, make_views
from fastssl.kernels.augment import triton as fused
from fastssl.kernels.augment.colour import jitter_order
from fastssl.kernels.augment.reference import JITTER_ORDERS
from fastssl.kernels.philox import philox4x32
from fastssl.kernels.testing import nan_memory

SMALL = {
    k: v for k, v in ONE_OP.items() if v.size > 1
}  # a view of one pixel has 4,800 taps, which is slow in the interpreter


def on_device(batch):
    return [t.to(DEVICE) for t in batch]


def assert_same_views(batch, views, seed=5, epoch=3, bound=0.1 / 255, dtype=torch.float32):
    views = [replace(v, **RAW) for v in views]
    batch = on_device(batch)
    with nan_memory():
        ours = make_views(*batch, views, seed=seed, epoch=epoch, impl="triton", dtype=dtype)
    theirs = make_views(*batch, views, seed=seed, epoch=epoch, impl="reference")
    for view, a, b in zip(views, ours, theirs):
        assert a.is_contiguous(memory_format=torch.channels_last) and a.dtype == dtype and a.shape == b.shape
        error = (a.float() - b).abs()
        if view.solarize:  # at the threshold, rounding changes the result by 1/255
            at = torch.minimum((b - view.solarize_threshold).abs(), (1 - b - view.solarize_threshold).abs())
            assert error[at < 0.2 / 255].le(1.2 / 255).all()
            error = error[at >= 0.2 / 255]
        assert error.numel() == 0 or error.max() <= bound, f"off by {error.max() * 255:.3f}/255"  # NaN fails too


@triton.jit(do_not_specialize=["c1", "c2", "c3"])
def philox_kernel(out, seed, c1, c2, c3):
    c0 = tl.arange(0, 8).to(tl.uint32)
    words = tl.philox(seed, c0, c0 * 0 + c1.to(tl.uint32), c0 * 0 + c2.to(tl.uint32), c0 * 0 + c3.to(tl.uint32))
    for k in tl.static_range(4):
        tl.store(out + k * 8 + tl.arange(0, 8), words[k].to(tl.int64))


@needs_triton
@pytest.mark.parametrize(
    "seed, counter", [(3, (1, 2, 3)), (2**40 + 7, (0, 2**31 + 5, 99)), (2**63 - 1, (4, 5, 2**32 - 1))]
)
def test_philox_words_equal_tritons(seed, counter):
    out = torch.empty(4, 8, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](out, seed, *counter)
    ours = philox4x32(torch.arange(8), *counter, seed)
    assert torch.equal(out.cpu(), torch.stack(ours))


OTHER_CROPS = [name for name, view in ONE_OP.items() if view.crop != "resized"]


@needs_triton
@pytest.mark.parametrize("name", ["crop_bilinear", "jitter", "blur_wide", "solarize", "rotate", "order", *OTHER_CROPS])
def test_parameters_equal_the_reference(name):
    view, n = ONE_OP[name], 40
    narrow = [(20, 300), (300, 20)]  # no try of the random-resized crop fits
    shapes = [SHAPES[i % 8] if i % 5 else narrow[i // 5 % 2] for i in range(n)]
    sizes = torch.tensor(shapes, dtype=torch.int32, device=DEVICE)
    index = torch.arange(n, device=DEVICE) * 97
    expect = draw(sizes, index, [view], seed=2**33 + 1, epoch=7)[0].cpu()
    table = torch.full((n, len(COL)), float("nan"), device=DEVICE)
    specs = fused.specs_on(fused.to_json([view]), torch.device(DEVICE))
    arguments = sizes, index, specs, table, 2**33 + 1, 7, None
    fused.launch(fused.draws.draw_kernel, (n, 1), *arguments, **fused.constants(view), EPOCH_PTR=False, num_warps=1)
    torch.testing.assert_close(table.cpu(), expect, rtol=2e-7, atol=1e-7)
    if view.crop == "resized":  # in whole pixels: none may differ
        assert torch.equal(table.cpu()[:, :8], expect[:, :8])


@triton.jit
def permutation_kernel(out):
    packed, contrast_position = jitter_order(tl.program_id(0))
    tl.store(out + 2 * tl.program_id(0), packed)
    tl.store(out + 2 * tl.program_id(0) + 1, contrast_position)


@needs_triton
def test_jitter_orders_equal_the_reference():
    out = torch.empty(24, 2, dtype=torch.int32, device=DEVICE)
    permutation_kernel[(24,)](out)
    expect = [[sum(op << (2 * i) for i, op in enumerate(order)), order.index(1)] for order in JITTER_ORDERS]
    assert out.tolist() == expect


@needs_triton
@pytest.mark.parametrize("name", SMALL)
def test_each_operation_equals_the_reference(name):
    shapes = [s for s in SHAPES[:4] if SMALL[name].crop != "random" or min(s) >= SMALL[name].size]
    assert_same_views(pack(scenes(shapes)), [SMALL[name]])


TILED = {
    "crop": View(40, flip=0.5),
    "bicubic": View(40, interpolation="bicubic"),
    "jitter": recipes.simclr(40)[0],
    "blur": View(40, blur=0.7),
    "blur_wide": View(40, blur=1.0, blur_sigma=(3.0, 5.0)),
    "quarter": View(40, quarter_turns=1),
    "rotate": recipes.deepcluster(33)[0],
    "gray_first": recipes.moco_v1(40)[0],
    "solarize_last": View(40, solarize=0.5, blur=0.5),
    "order": replace(ONE_OP["order"], size=40),
}


@needs_triton
@pytest.mark.parametrize("name", TILED)
def test_views_of_several_tiles(name, monkeypatch):
    """As for views above 64 pixels, but at 40: a second row and column of tiles, mostly outside the view."""
    monkeypatch.setattr(fused, "MAX_WHOLE_SIZE", 16)
    assert_same_views(pack(scenes(SHAPES[:3])), [TILED[name]])


@needs_triton
def test_views_of_mixed_size_and_kind(monkeypatch):
    """Groups of one and of several launches, alternating in the recipe, with equal and different streams."""
    monkeypatch.setattr(fused, "MAX_WHOLE_SIZE", 16)
    views = [
        *recipes.byol(34)[::-1],
        View(10, flip=0.5),
        *recipes.rotation(14),
        View(17, crop="center", resize=20),
        View(10, crop="squash", flip=0.5),
    ]
    assert_same_views(pack(scenes([(38, 44), (41, 34)])), views)


@needs_triton
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.2 / 255), (torch.bfloat16, 0.6 / 255)])
def test_output_dtypes(dtype, bound):
    assert_same_views(pack(scenes(SHAPES[:2])), [View(24, flip=0.5, gray=0.5)], dtype=dtype, bound=bound)


@needs_triton
def test_views_have_separate_normalisation():
    batch = on_device(pack(scenes(SHAPES[:2])))
    views = [View(16), View(16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), stream=0)]
    ours = make_views(*batch, views, seed=0, epoch=0, impl="triton")
    for a, b in zip(ours, make_views(*batch, views, seed=0, epoch=0, impl="reference")):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@needs_triton
def test_views_of_a_sample_do_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(fused, "MAX_WHOLE_SIZE", 16)
    pixels, sizes, index = on_device(pack(scenes([(24, 20), (20, 20), (18, 25)])))
    views = [*recipes.simclr(16), recipes.byol(18)[0]]
    whole = make_views(pixels, sizes, index, views, seed=5, epoch=2, impl="triton")
    part = make_views(pixels[2:3], sizes[2:3], index[2:3], views, seed=5, epoch=2, impl="triton")
    for w, p in zip(whole, part):
        assert torch.equal(w[2:3], p)


@needs_triton
def test_empty_batch():
    pixels, sizes, index = on_device(pack(scenes(SHAPES[:2])))
    out = make_views(pixels[:0], sizes[:0], index[:0], recipes.simclr(24), seed=0, epoch=0, impl="triton")
    assert [x.shape for x in out] == [(0, 3, 24, 24)] * 2


@needs_triton
def test_compile_fullgraph_with_epoch_on_the_device():
    batch, views = on_device(pack(scenes([(20, 24)] * 2))), recipes.simclr(16)

    def step(pixels, sizes, index, epoch):
        views_ = make_views(pixels, sizes, index, views, seed=1, epoch=epoch, impl="triton", dtype=torch.float16)
        return [v * 2 for v in views_]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for epoch in (0, 1, 2, torch.tensor(2, device=DEVICE)):
        eager = step(*batch, epoch)
        for a, b in zip(eager, compiled(*batch, epoch)):
            assert torch.equal(a, b)
    for a, b in zip(eager, step(*batch, 2)):
        assert torch.equal(a, b)
    torch.library.opcheck(fused.augment_op, (*batch, None, fused.to_json(views), 1, 2, torch.float16))


@needs_triton
@pytest.mark.parametrize("height, width, size", [(9, 405, 3), pytest.param(1854, 2472, 32, marks=pytest.mark.full)])
def test_white_stays_white_in_large_reductions(height, width, size):
    """The sum of thousands of taps rounds to slightly above 1, which must not overflow in 16-bit crops."""
    batch = (
        torch.full((1, height * width, 3), 255, dtype=torch.uint8),
        torch.tensor([(height, width)], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
    )
    assert_same_views(batch, [View(size, crop="squash", rotate=1e-6)])


@needs_triton
def test_too_wide_blur_raises():
    batch, view = on_device(pack(scenes(SHAPES[:2]))), View(96, blur=1.0, blur_sigma=(0.1, 7.0))
    with pytest.raises(ValueError, match=r"sigma up to 6, got 7\.0; use impl='reference'"):
        make_views(*batch, [view], seed=0, epoch=0, impl="triton")


def test_triton_without_a_gpu_raises(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor, got one on cpu"):
        make_views(*pack(scenes(SHAPES[:2])), recipes.simclr(24), seed=0, epoch=0, impl="triton")


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

BUILD = """
import json, sys, torch
from fastssl.kernels import testing
from fastssl.kernels.augment import triton as fused
from augment_cases import BENCH
meta = {"device": "meta"}
pixels = torch.empty(64, 1000, 3, dtype=torch.uint8, **meta)
sizes, index = torch.empty(64, 2, dtype=torch.int32, **meta), torch.empty(64, dtype=torch.int64, **meta)
count, builds = {}, []
for name, case in BENCH.items():
    with testing.record_launches() as launches:
        fused.launch_all(fused.Batch(pixels, sizes, index, 1, 2, None), fused.to_json(case.views), torch.float16)
    count[name] = len(launches)
    if name in sys.argv[1:]:
        builds += [vars(testing.compile_launch(x, arch)) | {"case": name} for x in launches for arch in (80, 90)]
print(json.dumps([count, builds]))
"""


def test_builds_for_two_architectures_without_spills():
    """All kernels in the forms that recipes use, for sm_80 and sm_90, and the number of launches of a recipe."""
    compiled = ["simclr_32", "simclr_64", "patches_64", "byol_224", "deepcluster_224"]
    run = subprocess.run(
        [sys.executable, "-c", BUILD, *compiled],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    count, builds = json.loads(run.stdout.splitlines()[-1])
    assert count == {
        "simclr_32": 1,
        "simclr_64": 1,
        "patches_64": 1,
        "rotation_224": 2,
        "center_224": 2,
        "simclr_224": 4,
        "simclr_224_of_256": 4,
        "byol_224": 4,
        "deepcluster_224": 4,
        "dinov2_518": 4,
        "swav": 8,
    }
    assert len(builds) == 2 * sum(count[name] for name in compiled)
    for b in builds:
        known = 8 if (b["case"], b["arch"]) == ("simclr_64", 80) else 0  # bytes
        assert b["spills"] <= known and b["fits"], b
        if b["kernel"] == "blur_kernel":  # its two products must use the tensor cores
            assert b["tensor_core"] == ("HGMMA" if b["arch"] == 90 else "HMMA"), b


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", BENCH)
def test_recipes_on_a_gpu(name):
    case = BENCH[name]
    assert_same_views(pack(scenes([(case.height, case.width), (case.width, case.height + 3)] * 4)), case.views)


@pytest.mark.gpu
@on_gpu
def test_captured_graph_replays_in_another_epoch():
    batch, views = on_device(pack(scenes(SHAPES))), [*recipes.simclr(32), *recipes.byol(96)]
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")
    make_views(*batch, views, seed=1, epoch=epoch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = make_views(*batch, views, seed=1, epoch=epoch)
    epoch.fill_(9)
    graph.replay()
    for a, b in zip(out, make_views(*batch, views, seed=1, epoch=9)):
        assert torch.equal(a, b)
