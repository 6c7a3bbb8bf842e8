"""The published linear protocols: against torch's optimizers and modules, one classifier at a time, and on files."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl import optim
from fastssl.eval import linear
from fastssl.eval.common import features
from fastssl.eval.common.target import load_target
from fastssl.eval.linear import augment, classifiers, published, recipes
from fastssl.eval.linear.classifiers import LinearClassifiers
from fastssl.eval.linear.recipes import RECIPES
from fastssl.eval.options import add_protocol_options, add_target_options
from fastssl.kernels.augment import View
from fastssl.kernels.augment.extra import Lighting
from fastssl.kernels.multi_tensor import LarsOptions


def batches(shape, classes, steps=4, n=24):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, shape.numel(), generator=g), torch.randint(classes, (n,), generator=g)) for _ in range(steps)
    ]


def by_torch(recipe, rate, shape, data, classes, factors, seed=7):
    """The same training with modules, autograd and an optimizer."""
    head = nn.Linear(shape.numel(), classes)
    with torch.no_grad():
        start = 0.01 * torch.randn(shape.numel(), classes, generator=torch.Generator().manual_seed(seed))
        head.weight.copy_(start.T)
        head.bias.zero_()
    norm = nn.BatchNorm2d(shape[0], affine=False, momentum=0.1) if recipe.norm else nn.Identity()
    options = {"lr": rate, "momentum": 0.9, "weight_decay": recipe.weight_decay, "nesterov": recipe.nesterov}
    if recipe.lars:
        optimizer = optim.Lars(head.parameters(), LarsOptions(**options))
    else:
        optimizer = torch.optim.SGD(head.parameters(), **options)
    losses = []
    for (x, y), factor in zip(data, factors):
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = F.cross_entropy(head(norm(x.view(-1, *shape)).flatten(1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return head, norm.eval(), losses


SHAPES = {
    "moco": torch.Size([30]),
    "multi": torch.Size([5, 3, 3]),
    "places205": torch.Size([5, 2, 2]),
    "lars": torch.Size([30]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_rate_of_the_grid_is_a_classifier_trained_alone(name):
    recipe, shape, factors = RECIPES[name], SHAPES[name], (1.0, 1.0, 0.1, 0.1)
    rates = (5.0, 40.0, 300.0) if recipe.lars else (0.05, 0.4, 3.0)  # LARS: times 1e-3 |w|
    data = batches(shape, 7)
    together = LinearClassifiers(shape, rates, 7, recipe, 7, "cpu")
    losses = torch.stack([together.step(x, y, factor) for (x, y), factor in zip(data, factors)])
    x, y = batches(shape, 7, 1, 200)[0]
    accuracies = together.accuracy(x, y)
    for i, rate in enumerate(rates):
        head, norm, alone = by_torch(recipe, rate, shape, data, 7, factors)
        torch.testing.assert_close(together.weight_DGC[:, i].T, head.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias_GC[i], head.bias.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[:, i], torch.tensor(alone), rtol=1e-5, atol=1e-5)
        scores = head(norm(x.view(-1, *shape)).flatten(1))
        assert accuracies[i]["top1"] == pytest.approx(100 * (scores.argmax(1) == y).float().mean().item())
        top5 = (scores.topk(5).indices == y[:, None]).any(1).float().mean().item()
        assert accuracies[i]["top5"] == pytest.approx(100 * top5)
    assert (together.weight_DGC[:, 0] - together.weight_DGC[:, 2]).abs().max() > 1e-3, "the rates matter"


def test_lars_equals_a_computation_by_hand():
    recipe, rate = replace(RECIPES["lars"], weight_decay=0.5), torch.tensor([[2.0], [4.0]])
    p = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])  # D 1, G 2, C 2: norms 5 and 0
    grad, velocity = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]]), torch.zeros(1, 2, 2)
    classifiers.update_(p, grad, velocity, rate, recipe)
    ratio = 1e-3 * 5 / (2 + 0.5 * 5)
    torch.testing.assert_close(p[0, 0], torch.tensor([3 - 2 * ratio * 1.5, 4 - 2 * ratio * 4.0]))
    torch.testing.assert_close(p[0, 1], torch.tensor([-4.0, -4.0]), msg="zero weights: plain SGD")


def test_the_published_settings():
    factor = lambda name, epochs: [round(recipes.rate_factor(RECIPES[name], e), 6) for e in epochs]  # noqa: E731
    assert factor("moco", (0, 59, 60, 79, 80, 99)) == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert factor("multi", (29, 30, 60, 89)) == [1, 0.1, 0.01, 0.01]
    assert factor("places205", (6, 7, 14, 21, 27)) == [1, 0.1, 0.01, 0.001, 0.001]
    assert factor("lars", (0, 45, 89)) == [1, 0.5, round(0.5 * (1 + np.cos(np.pi * 89 / 90)), 6)]
    r = RECIPES
    assert (r["moco"].lr, r["moco"].batch, r["moco"].epochs, r["moco"].weight_decay) == (30, 256, 100, 0)
    assert (r["multi"].lr, r["multi"].batch, r["multi"].epochs, r["multi"].weight_decay) == (0.01, 256, 90, 1e-4)
    assert (r["lars"].lr, r["lars"].batch, r["lars"].epochs, r["lars"].weight_decay) == (1.6, 4096, 90, 0)
    assert r["multi"].nesterov and r["places205"].nesterov and not r["moco"].nesterov


def test_jittered_is_openselfsups_colour_jitter_and_noise():
    view = View(8, crop="center", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5))
    jitter, finish = augment.jittered(view)
    assert (jitter.jitter, jitter.jitter_p, jitter.flip, jitter.crop) == ((0.4, 0.4, 0.4, 0.0), 1.0, 0.5, "resized")
    assert jitter.extra == (Lighting(0.1),) and (jitter.mean, jitter.std) == (view.mean, view.std) and finish is None


def test_window_is_a_random_crop_and_flip():
    view, finish = augment.window(View(14, crop="center", resize=20))
    assert (view.size, view.resize, view.crop) == (16, 16, "center")
    x = torch.arange(16 * 16).view(16, 16).expand(300, 3, 16, 16) + 1000 * torch.arange(3)[:, None, None]
    seen = []
    for image in finish(x, torch.arange(300), 0, 0):
        flipped = bool(image[0, 0, 0] > image[0, 0, -1])
        upright = image.flip(-1) if flipped else image
        top, left = divmod(int(upright[0, 0, 0]), 16)
        assert torch.equal(upright, x[0, :, top : top + 14, left : left + 14])
        seen.append((top, left, flipped))
    assert len(set(seen)) == 3 * 3 * 2 and 100 < sum(flipped for *_, flipped in seen) < 200


def write_files(folder):
    from conftest import photo, write_beton

    rng = np.random.default_rng(0)
    for name, n in (("train", 66), ("test", 33)):
        labels = [i % 6 for i in range(n)]
        tint = [[100 * (y & 1), 100 * (y >> 1 & 1), 100 * (y >> 2)] for y in labels]
        images = [(photo(rng, 20, 20) // 4 + t).astype(np.uint8) for t in tint]
        write_beton(folder / f"{name}.beton", images, labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


def target(folder, *argv):
    parser = argparse.ArgumentParser()
    add_target_options(parser)
    add_protocol_options(parser, "linear")
    files = ["--train", f"{folder}/train.beton", "--test", f"{folder}/test.beton", "--size", "16"]
    net = ["--features", "untrained", "--backbone", "resnet10", "--stem", "cifar", "--width", "8"]
    args = parser.parse_args([*files, *net, "--workers", "1", "--device", "cpu", *argv])
    args.device = torch.device("cpu")
    return load_target(args, linear.NEEDS)


def run(folder, name="moco", argv=(), **options):
    return published.train_and_test(target(folder, *argv), name, **{"epochs": 2, "batch": 20, **options})


def close(a, b):
    for x, y in zip(a["curve"], b["curve"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3, abs=1e-4)
        assert {k: v for k, v in x.items() if k != "loss"} == {k: v for k, v in y.items() if k != "loss"}


def test_a_grid_is_each_rate_alone_on_augmented_images(folder):
    both = run(folder, rates=(0.3, 30.0), held_out=0.2)
    for rate in (0.3, 30.0):
        alone = run(folder, rates=(rate,), held_out=0.2)
        close({"curve": [row for row in both["curve"] if row["lr"] == rate]}, alone)
    assert both["options"]["train"] == 53 and both["options"]["held_out"] == 13


def test_rows_name_what_they_were_selected_on(folder):
    result = run(folder, rates=(0.3, 30.0), held_out=0.2, epochs=12)
    assert [(row["selected_on"], row["epoch"]) for row in result["results"][:2]] == [("none", 12)] * 2
    test, held = result["results"][2:]
    assert (test["selected_on"], held["selected_on"]) == ("test", "held-out")
    curve = result["curve"]
    assert test["top1"] == max(row["top1"] for row in curve)
    best = max(curve, key=lambda row: row["held_out_top1"])
    assert (held["lr"], held["epoch"], held["top1"]) == (best["lr"], best["epoch"], best["top1"])
    assert test["top1"] > 50, "the tint is easily learned"
    assert len(run(folder, epochs=1)["results"]) == 2, "without held-out images no row is selected on them"


def test_held_out_images_are_not_trained_on(folder, monkeypatch):
    seen, augmented_batches = set(), published.augmented_batches

    def spy(extractor, recipe, loader, rows):
        epoch = loader.epoch

        def noting(*args, **options):
            for batch in epoch(*args, **options):
                seen.update(batch.index.tolist())
                yield batch

        loader.epoch = noting
        return augmented_batches(extractor, recipe, loader, rows)

    monkeypatch.setattr(published, "augmented_batches", spy)
    run(folder, held_out=0.2, epochs=6)
    held = set(published.permutation(66, 0, 0)[:13].tolist())
    assert not seen & held and len(seen) > 45


def test_five_layers_train_on_one_forward_pass(folder):
    result = run(folder, "multi", batch=22, rates=(0.01, 0.1))
    layers = ("stem", "layer1", "layer2", "layer3", "layer4")
    assert tuple(dict.fromkeys(row["layer"] for row in result["curve"])) == layers
    assert len(result["results"]) == 5 * 3 and result["options"]["augment"] == "jittered"
    one = run(folder, "multi", batch=22, rates=(0.01, 0.1), layers=("stem",))
    close({"curve": [row for row in result["curve"] if row["layer"] == "stem"]}, one)


@pytest.mark.parametrize("name", ["places205", "lars"])
def test_the_other_recipes_learn(folder, name):
    result = run(folder, name, epochs=8, rates=(0.5 if name == "places205" else 400.0,))
    best = max(row["top1"] for row in result["results"])
    assert best > 60 and result["curve"][-1]["loss"] < result["curve"][0]["loss"]


def test_rate_and_milestones_follow_batch_and_epochs(folder):
    options = run(folder, epochs=5)
    assert options["results"][0]["lr"] == pytest.approx(30 * 20 / 256) and options["options"]["milestones"] == [3, 4]


def test_cached_features_train_the_same_classifiers(folder, tmp_path):
    """Without augmentation a step trains on cached rows: by hand, over the same permutation."""
    result = run(folder, argv=("--cache", str(tmp_path)), augment=False, rates=(3.0,), epochs=2)
    s = target(folder)
    x, y = features.extract(s.extractor(), s.loader(s.train))
    data = []
    for epoch in (1, 2):
        order = torch.from_numpy(published.permutation(66, 0, 0)[published.permutation(66, 0, epoch)])
        data += [(x[rows], y[rows]) for rows in order[:60].split(20)]
    _, _, losses = by_torch(RECIPES["moco"], 3.0, x.shape[1:], data, 6, [1] * 6, seed=0)
    assert [row["loss"] for row in result["curve"]] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-4
    )
    assert list(tmp_path.iterdir()), "cached"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"rates": ()}, "must all be positive"),
        ({"rates": (1.0, -1.0)}, "must all be positive"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 200}, "use at most"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": 0.007}, "held_out=0.007 of 66 training images is none"),
        ({"layers": ("layer9",)}, "no layer9; this backbone has stem, layer1"),
        ({"layers": ("stem", "stem")}, "each once"),
    ],
)
def test_wrong_arguments_raise(folder, options, text):
    with pytest.raises(ValueError, match=text):
        run(folder, **options)


def compute(folder):
    return {
        "moco": run(folder, rates=(0.3, 30.0), held_out=0.2, argv=("--batch", "5")),
        "multi": run(folder, "multi", batch=22, layers=("stem", "layer4")),
        "cached": run(folder, "lars", augment=False, rates=(400.0,)),
    }
