"""Views compared with torchvision v2 for equal parameters, image by image: within 1/255 before normalisation."""

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_cases import ONE_OP, RAW, SHAPES, pack, scenes
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastssl import views as recipes
from fastssl.kernels.augment import COL, View, draw, make_views
from fastssl.kernels.augment.reference import JITTER_ORDERS

DATA = Path(os.environ.get("FASTSSL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture(scope="session")
def photographs():
    tar = DATA / "imagenet_sample_1000.tar"
    if not tar.exists():
        pytest.skip(f"needs {tar.name} in FASTSSL_DATA")
    with tarfile.open(tar) as f:
        names = [m for m in f.getmembers() if m.isfile()][:400:40]
        return [np.array(Image.open(io.BytesIO(f.extractfile(m).read())).convert("RGB")) for m in names]


def torchvision_view(image, view, row):
    """The same view by torchvision v2's functionals on a float image, without normalisation."""
    p = {name: float(row[i]) for name, i in COL.items()}
    x = tv.to_dtype(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), torch.float32, scale=True)
    H, W = x.shape[1:]
    how = {"interpolation": InterpolationMode(view.interpolation), "antialias": True}
    S = view.size
    if view.crop == "resized":
        x = tv.resized_crop(x, int(p["y0"]), int(p["x0"]), int(p["h"]), int(p["w"]), [S, S], **how)
    elif view.crop == "squash":
        x = tv.resize(x, [S, S], **how)
    else:
        if view.resize:
            x = tv.resize(x, [view.resize], **how)
        nh, nw = x.shape[1:]
        if view.crop == "center":
            x = tv.center_crop(x, [S, S])
        else:  # offsets in the resized image: whole numbers by construction
            top, left = p["y0"] * nh / H, p["x0"] * nw / W
            assert abs(top - round(top)) < 1e-3 and abs(left - round(left)) < 1e-3
            if view.pad:
                x = tv.pad(x, [view.pad] * 4, padding_mode="constant" if view.pad_mode == "zero" else "reflect")
            x = tv.crop(x, round(top) + view.pad, round(left) + view.pad, S, S)
    x = x.clamp(0, 1)
    if p["flip"]:
        x = tv.horizontal_flip(x)
    if view.rotate:
        x = tv.rotate(x, p["angle"], InterpolationMode.BILINEAR)
    for op in view.order:
        if op == "jitter" and p["order"] >= 0:
            adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
            for i in JITTER_ORDERS[int(p["order"])]:
                x = adjust[i](x, p[("brightness", "contrast", "saturation", "hue")[i]])
        if op == "gray" and p["gray"]:
            x = tv.rgb_to_grayscale(x, 3)
        if op == "blur" and p["sigma"]:
            x = tv.gaussian_blur(x, 2 * min(int(np.ceil(4 * p["sigma"])), S - 1) + 1, p["sigma"])
        if op == "solarize" and p["solarize"]:
            x = tv.solarize(x, view.solarize_threshold)
    return torch.rot90(x, view.quarter_turns, (1, 2))


@pytest.fixture(params=["auto", "reference"])
def impl(request):
    """Both implementations on a CPU: "auto" is compiled by numba."""
    return request.param


def check(images, views, impl, epoch=0, bound=1 / 255):
    views = [replace(v, **RAW) for v in views]
    pixels, sizes, index = pack(images)
    tables = draw(sizes, index, views, seed=7, epoch=epoch)
    worst = 0.0
    made = make_views(pixels, sizes, index, views, seed=7, epoch=epoch, impl=impl)
    for view, table, ours in zip(views, tables, made):
        for image, row, x in zip(images, table, ours):
            error = (x - torchvision_view(image, view, row)).abs()
            if view.solarize:  # rounding decides for pixels at the threshold
                error = torch.where((x - view.solarize_threshold).abs() < 1e-4, 0, error)
                error = torch.where((1 - x - view.solarize_threshold).abs() < 1e-4, 0, error)
            worst = max(worst, float(error.max()))
    assert worst <= bound, f"off by {worst * 255:.3f}/255"
    return worst


@pytest.mark.parametrize("name", ONE_OP)
def test_each_operation_equals_torchvision(name, impl):
    images = scenes([s for s in SHAPES if ONE_OP[name].crop != "random" or min(s) >= ONE_OP[name].size] * 3)
    check(images, [ONE_OP[name]], impl, bound=0.02 / 255 if name != "jitter_strong" else 0.1 / 255)


RECIPES = {
    "simclr": recipes.simclr(48),
    "byol": recipes.byol(48),
    "moco_v1": recipes.moco_v1(48),
    "moco_v2": recipes.moco_v2(48),
    "swav": recipes.swav(48, small=20),
    "rotation": recipes.rotation(48),
    "deepcluster": recipes.deepcluster(48),
    "patches": recipes.patches(10, resize=50, window=45),
    "center": recipes.center(32, 37),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_torchvision(name, impl):
    check(scenes(SHAPES * 2), RECIPES[name], impl, bound=0.1 / 255)


def test_photographs_equal_torchvision(photographs, impl):
    views = [
        *recipes.simclr(),
        *recipes.byol(),
        recipes.swav()[-1],
        *recipes.center(224, 256),
        recipes.patches()[5],
        *recipes.deepcluster(),
    ]
    check(photographs, views, impl, bound=0.1 / 255)


@pytest.mark.parametrize("shapes", [[(32, 32)] * 3, [(8, 8)] * 3, [(32, 32), (32, 40), (50, 32)]])
def test_centre_crop_without_resize_is_exact(shapes, impl):
    images, size = scenes(shapes), min(min(s) for s in shapes)
    out = make_views(*pack(images), recipes.center(size, **RAW), seed=0, epoch=0, impl=impl)[0]
    for image, x in zip(images, out):
        top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
        expect = torch.from_numpy(image[top : top + size, left : left + size].copy()).permute(2, 0, 1) / 255
        assert torch.equal(x, expect)


def test_normalisation_layout_and_dtype(impl):
    images = scenes(SHAPES)
    batch, key = pack(images), {"seed": 0, "epoch": 0, "impl": impl}
    raw = make_views(*batch, recipes.center(16, 20, **RAW), **key)[0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = make_views(*batch, recipes.center(16, 20), **key, dtype=dtype)[0]
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        mean, std = torch.tensor(View(1).mean).view(3, 1, 1), torch.tensor(View(1).std).view(3, 1, 1)
        atol = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out, ((raw - mean) / std).to(dtype), rtol=0, atol=atol)


def test_views_of_a_sample_do_not_depend_on_the_batch(impl):
    """Bit for bit, with other samples and at other positions, so that views do not depend on the number of ranks."""
    for shapes in (SHAPES * 3, [(32, 32)] * 24):
        pixels, sizes, index = pack(scenes(shapes))
        views = [
            *recipes.simclr(24),
            *recipes.byol(32),
            *recipes.deepcluster(16),
            *recipes.patches(10, resize=50, window=45),
        ]
        whole = make_views(pixels, sizes, index, views, seed=5, epoch=2, impl=impl)
        for rows in (torch.arange(0, 12), torch.arange(12, 24), torch.tensor([7]), torch.randperm(24)):
            part = make_views(pixels[rows], sizes[rows], index[rows], views, seed=5, epoch=2, impl=impl)
            for w, p in zip(whole, part):
                assert torch.equal(w[rows], p)


def test_views_do_not_depend_on_the_other_views():
    batch = pack(scenes(SHAPES))
    a = make_views(*batch, recipes.simclr(24), seed=5, epoch=2)
    b = make_views(*batch, [replace(recipes.simclr(24)[1], stream=1), View(9, stream=17)], seed=5, epoch=2)
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_views_depend_on_seed_epoch_and_index(change):
    pixels, sizes, index = pack(scenes(SHAPES))
    key = {"seed": 5, "epoch": 2}
    before = make_views(pixels, sizes, index, recipes.simclr(24), **key)
    other = index + 1000 if change == "index" else index
    after = make_views(pixels, sizes, other, recipes.simclr(24), **{k: v + (k == change) for k, v in key.items()})
    for x in zip(before[0], after[0]):
        assert not torch.equal(*x)


def test_rotation_recipe_rotates_one_crop():
    views = make_views(*pack(scenes(SHAPES)), recipes.rotation(24), seed=0, epoch=0)
    for k in range(4):
        assert torch.equal(views[k], views[0].rot90(k, (2, 3)))


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_views_equal_the_reference(threads):
    """With any number of threads, and bit for bit equal for all of them."""
    pixels, sizes, index = pack(scenes(SHAPES * 3))
    views, before = [*recipes.simclr(24), *recipes.byol(32), *recipes.deepcluster(16)], torch.get_num_threads()
    key = {"seed": 5, "epoch": 2}
    one = make_views(pixels, sizes, index, views, **key)
    torch.set_num_threads(threads)
    try:
        compiled = make_views(pixels, sizes, index, views, **key)
    finally:
        torch.set_num_threads(before)
    for x, y, z in zip(compiled, make_views(pixels, sizes, index, views, **key, impl="reference"), one):
        assert torch.equal(x, z)
        close = (x - y).abs() < 2e-4
        assert close.float().mean() > 0.999  # rounding decides for pixels at BYOL's threshold


def test_empty_batch_and_empty_recipe(impl):
    pixels, sizes, index = pack(scenes(SHAPES))
    out = make_views(pixels[:0], sizes[:0], index[:0], recipes.simclr(24), seed=0, epoch=0, impl=impl)
    assert [x.shape for x in out] == [(0, 3, 24, 24)] * 2
    assert make_views(pixels, sizes, index, (), seed=0, epoch=0) == []


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"crop": "middle"}, "crop='middle'"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter"),
        ({"order": ("gray", "sobel")}, "order"),
        ({"order": ("gray", "gray")}, "order"),
        ({"size": (32, 64)}, "views are square, give one number"),
        ({"size": 24.0}, "must be a whole number"),
        ({"scale": 0.5}, "scale=0.5): must be 2 numbers"),
        ({"flip": None}, "must be a number"),
        ({"resize": "x"}, "must be a whole number or None"),
        ({"crop": 3}, "must be a string"),
        ({"blur_sigma": (0.1, float("nan"))}, "must be 2 numbers"),
        ({"extra": 3}, "must be a tuple"),
        ({"order": ("blur", "jitter", "gray", "solarize")}, "jitter before blur"),
        ({"pad": 4}, "pad=4"),
        ({"crop": "center", "resize": 20}, "resize=20"),
        ({"crop": "patch", "cell": 9, "window": 90}, "cell=9"),
        ({"quarter_turns": 4}, "quarter_turns=4"),
        ({"resize": 256}, "resize=256"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_invalid_view_raises(bad, named):
    with pytest.raises(ValueError, match="View") as error:
        View(**{"size": 24, **bad})
    assert named in str(error.value)


def test_invalid_input_raises():
    pixels, sizes, index = pack(scenes(SHAPES))
    for args, named in [
        ((pixels.float(), sizes, index), "float32"),
        ((pixels[..., 0], sizes, index), "(B, P, 3)"),
        ((pixels, sizes[:2], index), "sizes"),
        ((pixels, sizes, index[:3]), "index"),
    ]:
        with pytest.raises(ValueError) as error:
            make_views(*args, recipes.simclr(24), seed=0, epoch=0)
        assert named in str(error.value)
    with pytest.raises(ValueError, match="fast"):
        make_views(pixels, sizes, index, recipes.simclr(24), seed=0, epoch=0, impl="fast")
    with pytest.raises(TypeError, match="colour"):
        recipes.simclr(24, colour=0.5)
