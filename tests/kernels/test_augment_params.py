"""The random generator compared with its published vectors, the parameters' distributions with torchvision's."""

import inspect
import math

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from fastssl import views as recipes
from fastssl.kernels.augment import COL, View, draw
from fastssl.kernels.philox import below, philox4x32, uniform

N = 20_000
STRONG = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8}


@pytest.mark.parametrize(
    "counter, seed, words",
    [  # Random123's kat_vectors, philox4x32 10 rounds
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, seed, words):
    got = philox4x32(*(torch.tensor([c]) for c in counter), seed)
    assert [int(g) for g in got] == words


def test_uniform_and_below_cover_their_range():
    word = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert uniform(word).tolist() == [0.0, 2.0**-32, 0.5, 1 - 2.0**-32]
    assert below(word, 24).tolist() == [0, 0, 12, 23] and below(word, 1).tolist() == [0, 0, 0, 0]


def columns(view, h=375, w=500, n=N, seed=11, **key):
    table = draw(torch.tensor([[h, w]]).expand(n, 2), torch.arange(n), [view], seed=seed, **{"epoch": 0, **key})[0]
    return {name: table[:, i].double().numpy() for name, i in COL.items()}


def torchvision_boxes(view, h, w, n=N):
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(view.size, view.scale, view.ratio)
    image = torch.empty(3, h, w)
    rows = [transform.make_params([image]) for _ in range(n)]
    return {key: torch.tensor([row[key] for row in rows]).double().numpy() for key in rows[0]}


def assert_same_distribution(ours, theirs, name):
    p = stats.ks_2samp(ours, theirs).pvalue
    assert p > 1e-3, f"{name}: p = {p:.1e}"


@pytest.mark.parametrize(
    "view, h, w",
    [
        (View(224), 375, 500),
        (View(32), 32, 32),
        (View(96, scale=(0.05, 0.14)), 500, 333),
        (View(24, ratio=(0.5, 3.0), scale=(0.6, 1.0)), 40, 90),  # mostly rejected tries
    ],
)
def test_random_resized_crop_distribution_equals_torchvision(view, h, w):
    ours, theirs = columns(view, h, w), torchvision_boxes(view, h, w)
    for mine, name in (("y0", "top"), ("x0", "left"), ("h", "height"), ("w", "width")):
        assert_same_distribution(ours[mine], theirs[name], name)
    assert_same_distribution(ours["h"] * ours["w"], theirs["height"] * theirs["width"], "area")
    assert_same_distribution(ours["w"] / ours["h"], theirs["width"] / theirs["height"], "ratio")
    assert_same_distribution(ours["y0"] + ours["h"], theirs["top"] + theirs["height"], "bottom")
    assert (ours["top"] == ours["y0"]).all() and (ours["right"] == ours["x0"] + ours["w"]).all()


@pytest.mark.parametrize("h, w", [(20, 300), (300, 20), (1, 1), (1, 9), (3, 2)])
def test_random_resized_crop_fallback_equals_torchvision(h, w):
    """Images so narrow that no or nearly no try fits get a central crop of the nearest allowed ratio."""
    view = View(24, scale=(0.9, 1.0))
    ours, theirs = columns(view, h, w, n=400), torchvision_boxes(view, h, w, n=400)
    for mine, name in (("y0", "top"), ("x0", "left"), ("h", "height"), ("w", "width")):
        assert set(ours[mine]) == set(theirs[name]), name


def test_colour_jitter_distribution_equals_torchvision():
    view = View(24, **STRONG)
    ours = columns(view)
    torch.manual_seed(0)
    transform = v2.ColorJitter(*view.jitter)
    rows = [transform.make_params([]) for _ in range(N)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert_same_distribution(ours[name], [row[f"{name}_factor"] for row in rows], name)
        low, high = (-0.2, 0.2) if name == "hue" else (0.2, 1.8)
        assert low <= ours[name].min() < low + 0.001 and high - 0.001 < ours[name].max() <= high + 1e-6, name
    code = ours["order"][ours["order"] >= 0]
    assert stats.binomtest(len(code), N, 0.8).pvalue > 1e-3
    counts = [(code == c).sum() for c in range(24)]
    assert stats.chisquare(counts).pvalue > 1e-3, counts
    assert sum(counts) == len(code)


@pytest.mark.parametrize(
    "column, field, p",
    [
        ("flip", "flip", 0.5),
        ("gray", "gray", 0.2),
        ("solarize", "solarize", 0.2),
        ("sigma", "blur", 0.5),
        ("order", "jitter_p", 0.8),
    ],
)
def test_operations_have_their_probabilities(column, field, p):
    def drew(probability):
        values = columns(View(24, **{field: probability}))[column]
        return int((values >= 0).sum() if column == "order" else (values != 0).sum())

    assert stats.binomtest(drew(p), N, p).pvalue > 1e-3
    assert drew(0.0) == 0 and drew(1.0) == N


def test_sigma_angle_and_random_crop_are_uniform():
    sigma = columns(View(24, blur=1.0))["sigma"]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    angle = columns(View(24, rotate=2.0))["angle"]
    assert stats.kstest(angle, stats.uniform(-2, 4).cdf).pvalue > 1e-3
    crop = columns(View(32, crop="random", pad=4), 32, 32)
    for name in ("y0", "x0"):
        assert stats.chisquare([(crop[name] == o).sum() for o in range(-4, 5)]).pvalue > 1e-3


def test_patches_move_by_up_to_21_pixels_in_their_cells():
    views = recipes.patches()
    table = draw(torch.tensor([[292, 292]]).expand(N, 2), torch.arange(N), views, seed=1, epoch=0)
    y, x = table[..., COL["y0"]], table[..., COL["x0"]]
    for cell in range(9):
        dy, dx = (y[cell] - y[0] - 85 * (cell // 3)), (x[cell] - x[0] - 85 * (cell % 3))
        assert (dy.abs() <= 21).all() and (dx.abs() <= 21).all()
        if cell:  # separate offsets in each cell: the difference of two uniform numbers in 0..21
            assert dy.abs().max() > 15 and abs(float(dy.std()) - math.sqrt(2 * (22**2 - 1) / 12)) < 0.2
    assert y.min() == 0 and y.max() == 292 - 64 and (table[..., COL["gray"]] == table[:1, :, COL["gray"]]).all()


def test_draws_are_independent():
    """Between the parameters of a view, views, neighbouring samples and epochs."""
    views = recipes.simclr(224)
    sizes, index = torch.tensor([[375, 500]]).expand(N, 2), torch.arange(N)
    a, b = draw(sizes, index, views, seed=0, epoch=0)
    c = draw(sizes, index, views, seed=0, epoch=1)[0]
    d = draw(sizes, index, views, seed=1, epoch=0)[0]
    names = ["flip", "order", "brightness", "contrast", "saturation", "hue", "gray", "sigma", "y0"]
    pick = [COL[name] for name in names]
    everything = torch.cat([a[:-1, pick], b[:-1, pick], c[:-1, pick], d[:-1, pick], a[1:, pick]], 1).double()
    correlation = torch.corrcoef(everything.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(N), correlation.abs().max()


def test_equal_streams_draw_equal_numbers():
    sizes, index = torch.tensor([[375, 500]]).expand(8, 2), torch.arange(8)
    view = View(24, flip=0.5, **STRONG)
    a, b = draw(sizes, index, [view, view], seed=0, epoch=0)
    assert not torch.equal(a, b)
    shared = View(24, flip=0.5, stream=1, **STRONG)
    c, d = draw(sizes, index, [shared, shared], seed=0, epoch=0)
    assert torch.equal(c, d) and torch.equal(b, c)


PAIR_WEAK, PAIR_STRONG = (0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2)


@pytest.mark.parametrize(
    "name, sizes, scales, jitter, jitter_p, gray, blur, solarize",
    [
        ("simclr", [224] * 2, [(0.08, 1)] * 2, PAIR_STRONG, 0.8, 0.2, [0.5] * 2, [0] * 2),
        ("moco_v1", [224] * 2, [(0.2, 1)] * 2, (0.4,) * 4, 1, 0.2, [0] * 2, [0] * 2),
        ("moco_v2", [224] * 2, [(0.2, 1)] * 2, PAIR_WEAK, 0.8, 0.2, [0.5] * 2, [0] * 2),
        ("npid", [224], [(0.2, 1)], (0.4,) * 4, 1, 0.2, [0], [0]),
        ("byol", [224] * 2, [(0.08, 1)] * 2, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, [1, 0.1], [0, 0.2]),
        ("swav", [224] * 2 + [96] * 6, [(0.14, 1)] * 2 + [(0.05, 0.14)] * 6, PAIR_STRONG, 0.8, 0.2, [0.5] * 8, [0] * 8),
        ("deepcluster", [224], [(0.08, 1)], (0.4, 0.4, 1.0, 0.5), 1, 0.2, [0], [0]),
        ("rotation", [224] * 4, [(0.08, 1)] * 4, (0,) * 4, 0, 0, [0] * 4, [0] * 4),
        ("supervised", [224], [(0.08, 1)], (0,) * 4, 0, 0, [0], [0]),
    ],
)
def test_recipe_numbers(name, sizes, scales, jitter, jitter_p, gray, blur, solarize):
    views = getattr(recipes, name)()
    assert [v.size for v in views] == sizes and [v.scale for v in views] == scales
    assert [v.blur for v in views] == blur and [v.solarize for v in views] == solarize
    for v in views:
        assert (v.jitter, v.jitter_p, v.gray, v.flip) == (jitter, jitter_p, gray, 0.5)
        assert v.blur_sigma == (0.1, 2.0) and v.solarize_threshold == 128 / 255 and v.crop == "resized"
        assert v.interpolation == ("bicubic" if name == "byol" else "bilinear")
        assert v.rotate == (2.0 if name == "deepcluster" else 0.0)
        assert (v.order.index("gray") < v.order.index("jitter")) == (name in ("moco_v1", "npid"))
        assert v.order.index("blur") < v.order.index("solarize") and v.order.index("blur") >= 2


def test_rotation_and_patches_share_one_crop():
    assert [(v.quarter_turns, v.stream) for v in recipes.rotation()] == [(k, 0) for k in range(4)]
    cells = recipes.patches()
    assert [(v.cell, v.stream, v.size, v.resize, v.window, v.gray) for v in cells] == [
        (k, 0, 64, 292, 255, 0.66) for k in range(9)
    ]


def test_recipes_accept_fields_of_view():
    views = recipes.simclr(32, interpolation="bicubic", **recipes.CIFAR10)
    assert views == (View(32, interpolation="bicubic", flip=0.5, gray=0.2, blur=0.5, **STRONG, **recipes.CIFAR10),) * 2
    assert [v.blur for v in recipes.byol(32, blur=(0, 0))] == [0, 0]
    for name, recipe in inspect.getmembers(recipes, inspect.isfunction):
        public = recipe.__module__ == recipes.__name__ and not name.startswith("_")
        if public and "changes" in inspect.signature(recipe).parameters:
            assert all(isinstance(v, View) and v.mean == (0.5,) * 3 for v in recipe(mean=(0.5,) * 3)), name
