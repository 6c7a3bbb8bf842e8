"""Operations of View.extra: equal to torchvision's for equal parameters, and independent of the batch."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from augment_cases import RAW, SHAPES, pack, scenes
from kernel_device import DEVICE, needs_triton
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastssl import config, views
from fastssl.kernels.augment import View, make_views
from fastssl.kernels.augment.randaugment import OPERATIONS
from fastssl.methods import simclr
from fastssl.views import Erase, Lighting, RandAugment, Random, Transform

BATCH = pack(scenes(SHAPES))
KEY = {"seed": 5, "epoch": 2}


@dataclass(frozen=True)
class Fade:
    """A user's operation: darkens each sample by a random factor."""

    low: float = 0.5

    def apply(self, x, random, view):
        return x * (self.low + (1 - self.low) * random.uniform(1)).float()[:, :, None, None]


def numbers(n, place=0, stream=0):
    return Random(torch.arange(n), 5, 2, stream, place)


def test_operations_not_in_order_are_not_applied():
    some = views.simclr(24, order=("gray", "jitter"))
    assert some[0].order == ("gray", "jitter", "blur", "solarize") and some[0].blur == 0 and some[0].gray == 0.2
    full = views.simclr(24, order=("gray", "jitter", "blur", "solarize"), blur=0.0)
    for a, b in zip(make_views(*BATCH, some, **KEY), make_views(*BATCH, full, **KEY)):
        assert torch.equal(a, b)
    assert View(24, jitter=(0.4,) * 4, jitter_p=1.0, blur=0.5, order=("blur",)).order[:2] == ("jitter", "blur")
    assert View(24, gray=0.3, order=()).gray == 0


def test_views_without_extra_are_unchanged():
    """Bit for bit, alone and beside views with `extra`, also rotated by quarter turns and normalised."""
    plain = [*views.byol(24), *views.rotation(16)]
    mixed = [replace(plain[0], extra=(Lighting(),)), *plain[1:], replace(plain[1], extra=(Erase(),))]
    alone, beside = make_views(*BATCH, plain, **KEY), make_views(*BATCH, mixed, **KEY)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], beside[1:-1]))
    nothing = replace(plain[5], extra=(Lighting(0.0),), stream=0)  # with quarter turns, which follow `extra`
    for a, b in zip(make_views(*BATCH, [plain[5]], **KEY), make_views(*BATCH, [nothing], **KEY)):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    for dtype in (torch.bfloat16, torch.float16):
        out = make_views(*BATCH, mixed, dtype=dtype, **KEY)
        assert all(x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last) for x in out)


EVERY = (
    Lighting(0.1),
    RandAugment(3, 9),
    Erase(0.8),
    Transform(v2.RandAugment(2, 9)),
    Fade(),
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
)


def test_extra_operations_do_not_depend_on_the_batch():
    pixels, sizes, index = BATCH
    recipe = views.simclr(24, extra=EVERY)
    whole = make_views(pixels, sizes, index, recipe, **KEY)
    for rows in (torch.arange(3), torch.tensor([5]), torch.randperm(8, generator=torch.manual_seed(0))):
        part = make_views(pixels[rows], sizes[rows], index[rows], recipe, **KEY)
        assert all(torch.equal(w[rows], p) for w, p in zip(whole, part))
    again = make_views(pixels, sizes, index, [replace(recipe[1], stream=1)], **KEY)
    assert torch.equal(whole[1], again[0]) and not torch.equal(whole[0], whole[1])
    for change in ({"seed": 6}, {"epoch": 3}):
        other = make_views(pixels, sizes, index, recipe, **{**KEY, **change})
        assert not any(torch.equal(a, b) for a, b in zip(whole[0], other[0]))
    assert [x.shape for x in make_views(pixels[:0], sizes[:0], index[:0], recipe, **KEY)] == [(0, 3, 24, 24)] * 2


@needs_triton
def test_extra_operations_after_the_triton_kernel():
    recipe, there = views.simclr(16, extra=(Lighting(0.1), Erase(0.8))), [part.to(DEVICE) for part in BATCH]
    a, b = (make_views(*there, recipe, impl=impl, **KEY) for impl in ("reference", "triton"))
    for x, y in zip(a, b):
        assert (x - y).abs().mean() < 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_device_and_cpu_give_equal_views_in_deterministic_mode(device):
    recipe = views.simclr(24, extra=(Lighting(0.1), Fade(), RandAugment(2, 9), Erase(0.8)), **RAW)
    expect = make_views(*BATCH, recipe, impl="reference", **KEY)
    there = [part.to(device) for part in BATCH]
    torch.use_deterministic_algorithms(True)
    try:
        out = make_views(*there, recipe, **KEY)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(out, expect):
        assert x.device.type == device
        assert (x.cpu() - y).abs().mean() < 5e-3  # rounding can move a pixel of a nearest-neighbour rotation


@pytest.mark.gpu
def test_lighting_and_erase_are_captured_in_a_graph():
    recipe, there = views.simclr(24, extra=(Lighting(0.1), Erase(0.8), Fade())), [part.cuda() for part in BATCH]
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            make_views(*there, recipe, seed=5, epoch=epoch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = make_views(*there, recipe, seed=5, epoch=epoch)
    for number in (0, 3):
        epoch.fill_(number)
        graph.replay()
        for x, y in zip(out, make_views(*there, recipe, seed=5, epoch=number)):
            assert torch.equal(x, y)


def test_lighting_adds_normal_multiples_of_the_components():
    n, op = 20_000, Lighting(0.1)
    shift = op.apply(torch.full((n, 3, 1, 2), 0.5), numbers(n), None) - 0.5
    assert torch.equal(shift[..., 0], shift[..., 1])
    vectors = torch.tensor(op.vectors)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=2e-3)  # rows are colours, columns components
    alpha = (shift[:, :, 0, 0] @ vectors) / torch.tensor(op.values)
    assert alpha.mean(0).abs().max() < 4 * 0.1 / n**0.5
    assert (alpha.std(0) - 0.1).abs().max() < 4 * 0.1 / (2 * n) ** 0.5
    assert ((alpha / 0.1) ** 4).mean(0).sub(3).abs().max() < 0.2  # of a normal distribution: 3
    assert torch.corrcoef(alpha.T).fill_diagonal_(0).abs().max() < 4 / n**0.5
    assert not torch.equal(
        op.apply(torch.zeros(4, 3, 1, 1), numbers(4, 1), None), op.apply(torch.zeros(4, 3, 1, 1), numbers(4, 0), None)
    )


def test_erase_equals_torchvision():
    n, size, op = 4000, 20, Erase(p=0.7, scale=(0.05, 0.2), ratio=(0.5, 2.0))
    box = op.box(numbers(n), size)
    erased = box[box[:, 2] > 0]
    assert abs(len(erased) / n - 0.7) < 4 * (0.21 / n) ** 0.5
    top, left, h, w = erased.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= size).all() and (left + w <= size).all()
    area, ratio = h * w / size**2, h / w
    assert 0.03 < area.min() < 0.07 and 0.17 < area.max() < 0.23 and ratio.min() > 0.4 and ratio.max() < 2.5
    assert abs(area.mean() - 0.125) < 0.005 and abs(ratio.log().mean()) < 0.05
    assert top.min() == 0 and (top + h).max() == size
    x, view = torch.rand(n, 3, size, size), View(size)
    out = op.apply(x, numbers(n), view)
    for i in range(60):
        fill = torch.tensor(view.mean).view(3, 1, 1)
        y, z, a, b = box[i].tolist()
        assert torch.equal(out[i], tv.erase(x[i], y, z, a, b, fill.expand(3, a, b)) if a else x[i])
    fills = Erase(p=1.0, fill=(1.0, 0.0, 0.5)).apply(x[:1] * 0.9, numbers(1), view)
    assert (fills == torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1)).all(1).any()


def test_transform_seeds_each_sample_and_restores_the_generators():
    x = torch.rand(64, 3, 8, 8)
    before = torch.get_rng_state()
    for per_sample, different in ((True, 64), (False, 1)):
        fn = v2.ColorJitter(brightness=(0.2, 1.0))
        out = Transform(fn, per_sample=per_sample).apply(x, numbers(64), None)
        factors = (out / x).flatten(1).median(1).values
        assert len(factors.mul(1e4).round().unique()) >= different and (different > 1 or factors.std() < 1e-5)
    half = Transform(v2.RandomInvert(1.0), p=0.5).apply(x, numbers(64), None)
    changed = (half != x).flatten(1).any(1)
    assert 16 < changed.sum() < 48 and torch.equal(half[changed], 1 - x[changed])
    assert torch.equal(torch.get_rng_state(), before)
    assert Transform(v2.RandomInvert(1.0), p=0.0).apply(x, numbers(64), None) is x


@pytest.mark.parametrize("name", OPERATIONS)
def test_randaugment_operations_equal_torchvision(name):
    size, theirs = 40, v2.RandAugment()
    assert list(theirs._AUGMENTATION_SPACE) == list(OPERATIONS)
    x = torch.stack([torch.from_numpy(im.copy()).permute(2, 0, 1) / 255 for im in scenes([(size, size)] * 4)])
    x[3] = 0.5  # a flat image
    strength, signed = theirs._AUGMENTATION_SPACE[name]
    how = (theirs.interpolation, theirs._fill)
    for magnitude in (0, 5, 9, 30):
        values = strength(31, size, size)
        value = 0.0 if values is None else float(values[magnitude])
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0]) if signed else torch.ones(4)
        ours = OPERATIONS[name](x, magnitude / 30, signs)
        for image, sign, out in zip(x, signs.tolist(), ours):
            expect = theirs._apply_image_or_video_transform(image, name, value * sign, *how)
            torch.testing.assert_close(out, expect, rtol=0, atol=1e-6)


def test_randaugment_draws_all_operations_and_signs():
    n = 2800
    x = (0.2 + 0.6 * torch.rand(1, 3, 16, 16, generator=torch.manual_seed(0))).expand(n, -1, -1, -1)
    out = RandAugment(1, 15).apply(x, numbers(n), None)
    signs, seen = torch.ones(1), []
    for name, op in OPERATIONS.items():
        for sign in (signs, -signs):
            seen.append((name, int((out == op(x[:1], 0.5, sign)).all(1).all(1).all(1).sum())))
    plus, minus = dict(seen[::2]), dict(seen[1::2])
    for name in OPERATIONS:
        both = (
            plus[name]
            if torch.equal(*(OPERATIONS[name](x[:1], 0.5, s) for s in (signs, -signs)))
            else (plus[name] + minus[name])
        )
        assert 130 < both < 280, (name, both)  # of 200, +- 5 standard deviations
    assert 60 < plus["Rotate"] < 140 and 60 < minus["Rotate"] < 140
    two = RandAugment(2, 15).apply(x, numbers(n), None)
    assert (two == x).flatten(1).all(1).sum() < (out == x).flatten(1).all(1).sum()


@pytest.mark.parametrize(
    "fn",
    [
        v2.RandAugment(2, 9),
        v2.TrivialAugmentWide(),
        v2.AutoAugment(),
        v2.RandomErasing(1.0),
        v2.GaussianBlur(3),
        v2.RandomPerspective(),
        v2.ElasticTransform(),
        v2.RandomEqualize(1.0),
        v2.RandomPosterize(4, 1.0),
        v2.Compose([v2.RandomAdjustSharpness(2.0, 1.0), v2.RandomAutocontrast(1.0)]),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_torchvision_transforms_in_extra(fn):
    a, b = (make_views(*BATCH, [View(24, extra=(fn,), **RAW)], **KEY)[0] for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and a.min() >= -0.01 and a.max() <= 1.01


def test_recipe_with_extra_survives_dump_and_load():
    run = config.Run(
        method=simclr.Config(),
        data=config.Data(
            train="x.beton",
            views=views.simclr(
                24,
                extra=(
                    Lighting(0.2),
                    Erase(fill=(0.0, 0.5, 1.0)),
                    RandAugment(1, 20),
                    v2.TrivialAugmentWide(),
                    torch.relu,
                    Fade(0.3),
                ),
            ),
        ),
    )
    config.validate(run)
    written = json.loads(json.dumps(config.dump(run)))["data"]["views"][0]
    assert " at 0x" not in json.dumps(written)
    read = View(**{key: value for key, value in written.items() if key != "type"})
    view = run.data.views[0]
    assert read.extra[:3] == view.extra[:3] and replace(read, extra=()) == replace(view, extra=())
    for op, name in zip(read.extra[3:], ("TrivialAugmentWide", "relu", "Fade")):
        with pytest.raises(ValueError, match=f"{name}.*cannot be read from config.json"):
            op.apply(torch.zeros(1, 3, 4, 4), numbers(1), None)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: View(24, extra=(3,)), "3 is not an operation"),
        (lambda: View(24, extra=(Erase,)), "is not an operation"),
        (lambda: Erase(p=2), "Erase(p=2): must be a probability"),
        (lambda: Erase(scale=(0.5, 0.1)), "Erase(scale=(0.5, 0.1))"),
        (lambda: Lighting(-1.0), "Lighting(std=-1.0)"),
        (lambda: RandAugment(0), "RandAugment(ops=0)"),
        (lambda: RandAugment(2, 31), "RandAugment(magnitude=31): must be from 0 to 30"),
        (lambda: Transform(torch.relu, p=-1), "Transform(p=-1)"),
        (lambda: make_views(*BATCH, [View(24, extra=(lambda x: x[:, :4],))], **KEY), "made torch.float32 (3, 4, 24)"),
        (lambda: make_views(*BATCH, [View(24, extra=(lambda x: None,))], **KEY), "made NoneType"),
        (lambda: numbers(2).words(300), "300 random words"),
    ],
)
def test_invalid_operation_raises(make, named):
    with pytest.raises(ValueError) as error:
        make()
    assert named in str(error.value)
