"""Features in file order, the same on one and two ranks, and the network left as it was."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from fastssl import backbones, views
from fastssl.config import Backbone
from fastssl.eval import knn
from fastssl.eval.common import cache, features
from fastssl.eval.common.features import Extractor
from fastssl.eval.linear import probe
from fastssl.files.datacard import DataCard
from fastssl.kernels.augment import View, make_views
from fastssl.loader import Loader
from fastssl.sampler import Sampler

(VIEW,) = views.center(16, 18)


def net(**options):
    torch.manual_seed(0)
    return backbones.build(Backbone("resnet10", **{"stem": "cifar", "width": 8, **options}))


def load(path, batch=32, **options):
    return Loader(path, batch, Sampler(**{"shuffle": False, "drop_last": False, **options}), device="cpu", workers=1)


def one_by_one(backbone, path, view=VIEW):
    """By definition: each sample alone, in evaluation mode, at the row of its index."""
    backbone.eval()
    rows = {}
    with torch.no_grad():
        for batch in load(path, 1).epoch(0):
            (x,) = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=0, epoch=0)
            rows[int(batch.index)] = backbone(x)[0], batch.label[0]
    return [torch.stack([rows[i][part] for i in range(len(rows))]) for part in (0, 1)]


@pytest.fixture(scope="module")
def want(beton):
    return one_by_one(net(), beton)


@pytest.mark.parametrize("batch", [1, 10, 102, 103, 500])
def test_every_sample_in_file_order(beton, want, batch):
    x, y = features.extract(Extractor(net().train(), VIEW), load(beton, batch))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x, want[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(y, want[1]) and torch.equal(y, torch.arange(103) % 10)


def test_rows_are_sorted_by_sample_number(beton, want):
    source = load(beton, 32)
    batches = list(source.epoch(0))
    source.epoch = lambda *given: (batch for batch in reversed(batches))
    x, y = features.extract(Extractor(net(), VIEW), source)
    torch.testing.assert_close(x, want[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(y, want[1])
    source.epoch = lambda *given: (batch for batch in batches[:-1])
    with pytest.raises(ValueError, match="gave 96 samples that are not the 103 of"):
        features.extract(Extractor(net(), VIEW), source)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"drop_last": True}])
def test_a_training_loader_is_refused(beton, options):
    with pytest.raises(ValueError, match="shuffle=False, drop_last=False"):
        features.extract(Extractor(net(), VIEW), load(beton, **options))


def test_modes_and_statistics_are_restored(beton):
    backbone = net().train()
    backbone.layer2.eval()  # a user's frozen part
    modes = [m.training for m in backbone.modules()]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features.extract(Extractor(backbone, VIEW), load(beton))
    assert [m.training for m in backbone.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    class Broken(nn.Module):
        dim = 3

        def forward(self, x):
            raise RuntimeError("out of luck")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="out of luck"):
        features.extract(Extractor(broken, VIEW), load(beton))
    assert broken.training


def test_features_in_bf16_are_close_to_fp32(beton, want):
    x, _ = features.extract(Extractor(backbones.channels_last_(net()), VIEW, precision="bf16"), load(beton))
    error = (x - want[0]).abs().max() / want[0].abs().max()
    assert x.dtype == torch.float32 and 1e-5 < error < 3e-2, "bf16 acts, and only so far"


def test_the_pixel_baseline_is_the_normalised_image(beton):
    x, _ = features.extract(Extractor(features.Pixels(16), VIEW), load(beton))
    assert x.shape == (103, features.Pixels(16).dim)
    (batch,) = load(beton, 103).epoch(0)
    (view,) = make_views(batch.pixels, batch.sizes, batch.index, (VIEW,), seed=0, epoch=0)
    assert torch.equal(x, view.flatten(1))


def mean_of_windows(x, kernel, stride, padding):
    """Average pooling by definition; zeros beyond the edge count (OpenSelfSup's nn.AvgPool2d)."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    starts = range(0, x.shape[1] - kernel + 1, stride)
    rows = [np.stack([x[:, i : i + kernel, j : j + kernel].mean((1, 2)) for j in starts], -1) for i in starts]
    return np.stack(rows, -2)


@pytest.mark.parametrize(
    "channels, side, window, dim",
    [
        (64, 112, (10, 10, 4), 9216),
        (256, 56, (16, 8, 0), 9216),
        (512, 28, (13, 5, 0), 8192),
        (1024, 14, (8, 3, 0), 9216),
        (2048, 7, (6, 1, 0), 8192),
    ],
)
def test_a_resnet50_is_pooled_as_openselfsup_does(channels, side, window, dim):
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(side))
    got = features.pooled(x)
    assert got[0].numel() == dim
    some = slice(0, 64)  # of the channels
    np.testing.assert_allclose(got[0, some], mean_of_windows(x[0, some].numpy(), *window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels, side, grid", [(64, 32, 12), (512, 4, 4), (2048, 2, 2), (10000, 5, 1), (64, 56, 12)])
def test_other_maps_are_pooled_adaptively(channels, side, grid):
    x = torch.randn(2, channels, side, side)
    got = features.pooled(x)
    assert got.shape == (2, channels, grid, grid)
    i, j = grid - 1, grid // 2
    rows, columns = (slice(k * side // grid, -(-(k + 1) * side // grid)) for k in (i, j))
    torch.testing.assert_close(got[:, :, i, j], x[:, :, rows, columns].mean((2, 3)))


def test_all_layers_come_from_one_forward_pass(beton, want):
    """Each layer against the map that a hook on the network sees, one image at a time, flattened (C, g, g)."""
    names = ("layer2", "last", "stem")
    parts = features.extract(Extractor(net(), VIEW, layers=names), load(beton))
    backbone, seen = net().eval(), {}
    backbone.layer2.register_forward_hook(lambda m, i, out: seen.update(layer2=out))
    backbone.layer1.register_forward_pre_hook(lambda m, i: seen.update(stem=i[0]))  # no max-pool in this stem
    for batch in list(load(beton, 1).epoch(0))[:5]:
        (x,) = make_views(batch.pixels, batch.sizes, batch.index, (VIEW,), seed=0, epoch=0)
        with torch.no_grad():
            seen["last"] = backbone(x)
        assert seen["layer2"].shape == (1, 16, 8, 8) and seen["stem"].shape == (1, 8, 16, 16), "small: left as they are"
        for name, part in zip(names, parts):
            torch.testing.assert_close(part[int(batch.index)], seen[name][0].flatten(), rtol=1e-4, atol=1e-4)
    assert torch.equal(parts[3], want[1])
    assert [shape.numel() for shape in Extractor(net(), VIEW, names).shapes] == [p.shape[1] for p in parts[:3]]


def test_timm_networks_have_stages_and_last():
    torch.manual_seed(0)
    vit = backbones.build(Backbone("test_vit"))
    names = features.layers_of(vit)
    assert names[0] == "stage1" and names[-1] == "last" and len(names) == len(vit.stages) + 1
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        parts = features.forward(vit.eval(), x, names)
        torch.testing.assert_close(parts[-1], vit(x))
    assert [p.shape[:2] for p in parts[:-1]] == [(2, c) for c in vit.stages]
    with pytest.raises(ValueError, match="no stem; this backbone has last"):
        features.check_layers(features.Pixels(4), ("stem",))
    with pytest.raises(ValueError, match="no layer5; this backbone has stem, layer1, .*, last"):
        features.check_layers(net(), ("last", "layer5"))


def test_extract_rows_gives_the_chosen_rows(beton, want):
    rows = np.array([101, 3, 50, 4, 102, 0, 77])
    for batch in (3, 7, 50):
        x, y = features.extract(Extractor(net(), VIEW), load(beton, batch), rows)
        torch.testing.assert_close(x, want[0][np.sort(rows)], rtol=1e-4, atol=1e-4)
        assert torch.equal(y, want[1][np.sort(rows)])


@pytest.mark.parametrize(
    "size, sides, resize",
    [
        (224, (375, 500, 500), 256),
        (224, (), 256),
        (32, (32, 32, 32), None),
        (16, (8, 8, 8), 16),
        (64, (96, 96, 96), 64),
        (32, (20, 32, 32), 37),
    ],
)
def test_the_default_view_is_a_centre_crop(size, sides, resize):
    training = replace(views.simclr(size)[0], mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    sides = dict(zip(("min_side", "max_height", "max_width"), sides))
    view = views.default_view(training, DataCard(samples=9, bytes=0, max_pixels=1, **sides))
    assert view == View(size, crop="center", resize=resize, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))


def test_a_file_whose_features_do_not_fit_into_memory_is_refused(beton, tmp_path, monkeypatch):
    loader, need = load(beton, 10), 103 * 64 * 4
    monkeypatch.setattr(features, "free_memory", lambda device: need)
    assert len(cache.load_or_extract(tmp_path, Extractor(net(), VIEW, ("last",), "fp32"), loader)[0]) == 103
    assert len(features.extract(Extractor(net(), VIEW), loader)[0]) == 103, "the monitors of a training are not asked"
    monkeypatch.setattr(features, "free_memory", lambda device: need - 1)
    with pytest.raises(ValueError, match="eval extract --to npy"):
        cache.load_or_extract(tmp_path, Extractor(net(), VIEW, ("last",), "fp32"), loader)


def compute(beton, tiny):
    result = {}
    for batch in (10, 102):  # 102: the last batch has one sample, the second rank none of it
        result[f"features {batch}"] = features.extract(Extractor(net(), VIEW), load(beton, batch))
        result[f"rows {batch}"] = features.extract(Extractor(net(), VIEW), load(beton, batch), np.arange(100, 0, -3))
        result[f"layers {batch}"] = features.extract(
            Extractor(net(), VIEW, layers=("last", "layer3")), load(beton, batch)
        )
    result["tiny"] = features.extract(
        Extractor(net(), VIEW), load(tiny, 2)
    )  # one sample: the second rank has no batch at all
    x, y = result["features 10"]
    result["knn"] = knn.knn(x[:80], y[:80], x[80:], y[80:], k=(1, 5, 20))
    result["alone"] = knn.knn(x, y, k=(1, 5, 20))
    for solver, options in (("sgd", {"batch": 33}), ("lbfgs", {"grid": (1e-3, 1e-2)})):
        result[solver] = probe.linear_probe(
            x[:80], y[:80], x[80:], y[80:], probe.ProbeOptions(solver=solver, epochs=30, **options)
        )
        fit = {"sgd": probe._sgd, "lbfgs": probe._lbfgs}[solver]
        result[f"{solver} weights"] = fit(
            probe._standardised(x, *probe._mean_and_scale(x)), y, (0.01, 1.0), 10, 20, 33, 0
        )
    return result


@pytest.mark.parametrize(
    "data, given, want",
    [
        ({"views": [asdict(views.patches(8, resize=36, window=33)[0])]}, {"size": 32, "resize": 36}, (32, 36)),
        ({"views": [asdict(views.patches(8, resize=36, window=33)[0])]}, {"size": 32}, (32, None)),
        (
            {"views": [{"size": 16}], "eval_view": {"size": 16, "crop": "center", "resize": 16}},
            {"size": 32, "resize": 32},
            (32, 32),
        ),
    ],
)
def test_size_and_resize_are_independent_of_the_training_view(data, given, want):
    from argparse import Namespace

    from fastssl.config import Backbone
    from fastssl.eval.common.target import _view

    args = Namespace(**{"size": None, "resize": None, "mean": None, "std": None, **given})
    card = DataCard(samples=9, bytes=0, max_pixels=1024, min_side=32, max_height=32, max_width=32)
    view = _view(args, data, Backbone("resnet18"), card)
    assert (view.size, view.resize) == want and view.crop == "center"
