"""Classes of two files are matched by name, or by number where one has no names; otherwise there is an error."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bare_trainer import bare_trainer
from conftest import write_beton, write_card
from torch import nn

import fastssl.eval
from fastssl import hooks
from fastssl.config import Data, Optim, Run
from fastssl.eval.common.classes import match
from fastssl.kernels.augment import View
from fastssl.loader import Loader
from fastssl.sampler import Sampler

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "gray": (128, 128, 128)}


def make(path, names, per_class=6, card=True, labels=None, flat=False):
    """Images of one colour, that of their class (or all equal), labelled by the index of the name."""
    rng = np.random.default_rng(len(names))
    images = [
        np.full((8, 8, 3), COLOURS[n], np.uint8) + rng.integers(0, 25, (1, 1, 3), np.uint8)
        for n in names
        for _ in range(per_class)
    ]
    images = [images[0]] * len(images) if flat else images
    labels = [i for i in range(len(names)) for _ in range(per_class)] if labels is None else labels
    write_beton(path, images, labels)
    if card:
        called = list(map(str, range(len(names)))) if card == "list" else list(names)
        write_card(path, images, *((None, "none") if card == "none" else (called, "int")))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    at = tmp_path_factory.mktemp("classes")
    train = ("red", "green", "blue")
    return {
        "train": make(at / "train.beton", train),
        "same": make(at / "same.beton", train, 3),
        "turned": make(at / "turned.beton", ("blue", "red", "green"), 3),
        "subset": make(at / "subset.beton", ("green", "blue"), 3),
        "one": make(at / "one.beton", ("blue",), 3),
        "list": make(at / "list.beton", train, 3, card="list"),
        "bare": make(at / "bare.beton", train, 3, card=None),
        "other": make(at / "other.beton", ("red", "gray"), 3),
        "longer": make(at / "longer.beton", (*train, "gray"), 3, card="list"),
        "twice": make(at / "twice.beton", ("red", "red", "blue"), 3),
        "none": make(at / "none.beton", train, 3, card="none", labels=[-1] * 9),
        "some": make(at / "some.beton", train, 3, labels=[0, 0, 0, 1, 1, -1, 2, 2, 2]),
    }


def load(path):
    return Loader(path, 8, Sampler.sequential(), device="cpu", workers=1)


@pytest.mark.parametrize(
    "name, labels, text",
    [
        ("same", [0, 1, 2], ""),
        ("turned", [2, 0, 1], "matched by name with those of .*train.beton (they are in another order)"),
        ("subset", [1, 2], "(it lacks 'red', 1 of 3)"),
        ("one", [2], "(it lacks 'red', 'green', 2 of 3)"),
        ("list", [0, 1, 2], "list.beton has no class names: its labels are taken as numbers of the classes of"),
        ("bare", [0, 1, 2], "(0 = red, 1 = green, 2 = blue)"),
    ],
)
def test_labels_of_the_test_file_get_the_training_files_numbers(files, capsys, name, labels, text):
    train, test = load(files["train"]), load(files[name])
    match(train, test)
    assert test.labels().tolist() == np.repeat(labels, 3).tolist() and len(test.classes or train.classes) == 3
    given = [int(y) for batch in test.epoch(0) for y in batch.label]
    assert given == test.labels().tolist()
    printed = capsys.readouterr().out
    assert text.replace(".*", "") in printed.replace(files["train"].removesuffix("train.beton"), "")
    assert printed.count("\n") == bool(text)


@pytest.mark.parametrize(
    "train, test, text",
    [
        ("train", "other", "different classes: 'gray' of the first is not among 'red', 'green', 'blue' of the second"),
        ("train", "twice", "different classes: some names occur twice"),
        ("twice", "one", "different classes: some names occur twice"),
        ("train", "longer", "has 4 classes .* and .*train.beton 3"),
        ("list", "subset", "has 2 classes .'green', 'blue'. and .*list.beton 3"),
        ("train", "none", "none.beton has no labels"),
        ("none", "same", "none.beton has no labels"),
        ("train", "some", "some.beton has 1 of 9 images without label"),
        ("one", "one", "one.beton has one class .'blue'., so that every prediction would be right"),
    ],
)
def test_files_that_do_not_match_are_refused(files, train, test, text):
    with pytest.raises(ValueError, match=text):
        match(load(files[train]), load(files[test]))


def test_how_many_images_must_have_a_label(files):
    match(load(files["some"]), load(files["same"]), "test")  # some images of the training file may have none
    with pytest.raises(ValueError, match="some.beton has 1 of 9 images without label"):
        match(load(files["same"]), load(files["some"]), "test")
    match(load(files["train"]), load(files["none"]), "none")
    with pytest.raises(ValueError, match="different classes"):
        match(load(files["some"]), load(files["other"]), "none")


def test_columns_of_several_labels_are_matched(tmp_path):
    rows = {"a": np.float32([1, 0, 0]), "b": np.float32([0, 1, -1]), "c": np.float32([0, 0, 1])}
    made = []
    for name, order in (("train", "abc"), ("test", "cab"), ("two", "abd")):
        columns = ["abc".find(c) for c in order]
        images = [np.zeros((8, 8, 3), np.uint8)] * 3
        path = write_beton(tmp_path / f"{name}.beton", images, [rows[c][columns] for c in "abc"])
        made.append(load(write_card(path, images, list(order), "multi")))
    match(made[0], made[1])
    assert made[1].labels().tolist() == made[0].labels().tolist() == np.stack(list(rows.values())).tolist()
    assert made[1].classes == list("abc") and next(made[1].epoch(0)).label.tolist() == made[0].labels().tolist()
    with pytest.raises(ValueError, match="different classes: 'd' of the first"):
        match(made[0], made[2])


def top1(capsys, tmp_path, protocol, train, test, *options):
    out = tmp_path / "result.json"
    argv = [
        protocol,
        "--train",
        train,
        "--test",
        test,
        "--size",
        8,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        1,
        *options,
    ]
    assert fastssl.eval.main(list(map(str, argv))) == 0, capsys.readouterr().err
    (row, *_) = json.loads(out.read_text())["results"]
    return row.get("top1", row.get("precision", row.get("map")))


PIXELS = ("--features", "pixels")
NET = ("--features", "untrained", "--backbone", "resnet10", "--stem", "cifar", "--width", 8)
PROTOCOLS = {
    "knn": (*PIXELS, "--k", 3),
    "linear": (*PIXELS, "--epochs", 30),
    "svm": PIXELS,
    "neighbours": (*PIXELS, "--k", 3, "--queries", 2, "--folder", "FOLDER"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_matches_and_refuses(files, tmp_path, capsys, protocol):
    """100 % for any order of the classes in the test file; without matching it would be 0 %."""
    options = [tmp_path if word == "FOLDER" else word for word in PROTOCOLS[protocol]]
    assert top1(capsys, tmp_path, protocol, files["train"], files["turned"], *options) == 100
    argv = [protocol, "--train", files["train"], "--test", files["other"], "--device", "cpu", "--workers", 1, *options]
    assert fastssl.eval.main(list(map(str, argv))) == 2
    err = capsys.readouterr().err
    assert "have different classes" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "protocol, options",
    [
        ("finetune", ("--epochs", 1, "--train-batch", 6)),
        (
            "semisup",
            (
                "--epochs",
                1,
                "--train-batch",
                6,
                "--percent",
                50,
                "--weight-decay",
                0,
                "--lr",
                0.1,
                "--head-mult",
                1,
                "--held-out",
                0,
            ),
        ),
        ("linear", ("--recipe", "moco", "--epochs", 1, "--probe-batch", 6)),
    ],
)
@pytest.mark.parametrize("test", ["subset", "list"])
def test_fine_tuning_accepts_a_subset_of_the_classes(files, tmp_path, capsys, protocol, options, test):
    """A subset of the classes, and a list without class names."""
    assert top1(capsys, tmp_path, protocol, files["train"], files[test], *NET, *options) >= 0


TRAININGS = {
    "finetune": ("--epochs", 1, "--train-batch", 6),
    "linear": ("--recipe", "moco", "--epochs", 1, "--probe-batch", 6),
    "semisup": ("--epochs", 1, "--train-batch", 6, "--percent", 50, "--weight-decay", 0, "--lr", 0.1, "--head-mult", 1),
}


@pytest.mark.parametrize(
    "protocol, options",
    [
        ("knn", PIXELS),
        ("linear", PIXELS),
        ("svm", PIXELS),
        *((name, (*NET, *more)) for name, more in TRAININGS.items()),
    ],
)
@pytest.mark.parametrize(
    "data, text",
    [
        ("none", "has no labels, and this needs the class of each image: convert labelled data"),
        (
            "one",
            "has one class ('blue'), so that every prediction would be right: convert a folder with a sub-folder for",
        ),
    ],
)
def test_data_without_classes_is_refused_in_one_line(files, capsys, protocol, options, data, text):
    argv = [protocol, "--train", files[data], "--test", files[data], "--size", 8, "--device", "cpu", "--workers", 1]
    assert fastssl.eval.main(list(map(str, [*argv, *options]))) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "protocol, options",
    [
        ("knn", (*PIXELS, "--k", 3)),
        ("linear", (*PIXELS, "--epochs", 3)),
        ("svm", PIXELS),
        ("finetune", (*NET, *TRAININGS["finetune"])),
    ],
)
def test_equal_images_give_chance(tmp_path, capsys, protocol, options):
    equal = make(tmp_path / "equal.beton", ("red", "green", "blue"), 4, flat=True)
    assert top1(capsys, tmp_path, protocol, equal, equal, *options) == pytest.approx(100 / 3)


def test_a_map_of_equal_images_is_refused(tmp_path, capsys):
    """t-SNE of equal points crashes the process."""
    equal = make(tmp_path / "equal.beton", ("red", "green", "blue"), 4, flat=True)
    capsys.readouterr()
    argv = ["maps", "--test", equal, "--size", 8, "--folder", tmp_path, "--device", "cpu", "--workers", 1, *PIXELS]
    assert fastssl.eval.main(list(map(str, argv))) == 2
    err = capsys.readouterr().err
    assert "the features of all 12 images are equal" in err and err.count("\n") == 1


class Colour(nn.Module):
    dim = 3

    def forward(self, x):
        return x.mean((2, 3))


def trainer(train, test, bank=None):
    run = Run(method=None, data=Data(train=train, test=test, bank=bank, views=(View(size=8),)), optim=Optim(batch=6))
    return bare_trainer(run, load(train), backbone=Colour(), total_steps=10, step=10)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("bank", [None, "turned"])
def test_monitors_match_classes_by_name(files, bank, resident):
    """kNN against the bank, the probe against the training file, from one pass over the test file."""
    t = trainer(files["train"], files["subset"], files.get(bank))
    t.run.speed.resident = resident
    shared = hooks.FeatureCache()
    knn, probe = hooks.KnnMonitor(1, k=3, cache=shared), hooks.LinearProbe(1, cache=shared)
    knn.before_epoch(t), probe.before_epoch(t)
    x, y = shared(t, files["train"])
    for _ in range(30):
        probe.after_step(t, {"features": x}, SimpleNamespace(label=y))
    knn.after_epoch(t), probe.after_epoch(t)
    assert t.scalars["knn_top1"] == 100 and t.scalars["probe_top1"] == 100


def test_knn_needs_every_label_of_the_bank_whatever_the_probe_has_checked(files):
    t, shared = trainer(files["some"], files["same"]), hooks.FeatureCache()
    hooks.LinearProbe(1, cache=shared).before_epoch(t)
    with pytest.raises(ValueError, match="some.beton has 1 of 9 images without label"):
        hooks.KnnMonitor(1, cache=shared).before_epoch(t)


def test_a_resident_file_is_relabelled(files):
    whole = Loader(files["turned"], 8, Sampler.sequential(), device="cpu", workers=1, resident=True)
    other = whole.in_file_order(4)
    match(load(files["train"]), other)
    assert torch.cat([b.label for b in other.epoch(0)]).tolist() == [2] * 3 + [0] * 3 + [1] * 3
    assert torch.cat([b.label for b in whole.epoch(0)]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    "train, test, text",
    [
        ("train", "other", "different classes"),
        ("one", "one", "one class"),
        ("train", "some", "without label"),
        ("some", "same", "without label"),
    ],
)
def test_monitors_refuse_before_training(files, train, test, text):
    with pytest.raises(ValueError, match=f"{text}.*set log.knn_epochs=0 log.probe=False"):
        hooks.KnnMonitor(1).before_epoch(trainer(files[train], files[test]))
