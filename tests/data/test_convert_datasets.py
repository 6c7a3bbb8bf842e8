"""CIFAR, digits and VOC2007 as sources of `fastssl convert`, and pickles that are refused."""

import os
import pickle
import tarfile

import numpy as np
import pytest
from convert_tools import convert, converted, folder, photo, refused, save, shared

from fastssl.data_prep.plainpickle import read_pickle

BATCH_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def cifar(root, kind="cifar10", protocol=2):
    """A small archive in the original layout; returns (pixels, labels) of train and test."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    parts = BATCH_NAMES if kind == "cifar10" else ["train", "test"]
    key = b"labels" if kind == "cifar10" else b"fine_labels"
    splits = {"train": ([], []), "test": ([], [])}
    for name in parts:
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = [int(v) for v in rng.integers(0, int(kind[5:]), 4)]
        (root / name).write_bytes(pickle.dumps({key: labels, b"data": data}, protocol))
        split = splits["test" if name.startswith("test") else "train"]
        split[0].append(data)
        split[1].extend(labels)
    names = [f"name{i}".encode() for i in range(int(kind[5:]))]
    meta = ("batches.meta", b"label_names") if kind == "cifar10" else ("meta", b"fine_label_names")
    (root / meta[0]).write_bytes(pickle.dumps({meta[1]: names}, protocol))
    return {
        split: (np.concatenate(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
        for split, (data, labels) in splits.items()
    }


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_python_archives(tmp_path, kind, protocol):
    truth = cifar(tmp_path / "py", kind, protocol)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "py", f"{kind}-batches-py")
    for path in (tmp_path / "py", tmp_path / "c.tar.gz"):
        for split in ("train", "test"):
            stock = converted(kind, path, tmp_path / "o.beton", "--split", split, "--force")
            assert stock.table["label"].tolist() == truth[split][1]
            assert all(np.array_equal(stock.pixels(i), truth[split][0][i]) for i in range(len(truth[split][1])))
            assert stock.card["classes"][3] == "name3" and stock.card["raw"] == stock.card["samples"]


def pickled_array(dtype: bytes, raw: bytes, shape=(1,)) -> bytes:
    """The pickle of a dictionary with such an array under "labels", written by hand."""
    return (
        b"\x80\x02}(C\x06labelscnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01"
        + pickle.dumps(shape, 2)[2:-1]
        + b"cnumpy\ndtype\nC"
        + bytes([len(dtype)])
        + dtype
        + b"K\x00K\x01\x87R(K\x03C\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb\x89C"
        + bytes([len(raw)])
        + raw
        + b"tbu."
    )


@pytest.mark.parametrize(
    "dtype, raw, message",
    [
        (b"O8", b"AAAAAAAA", "only arrays of whole numbers"),
        (b"f4", b"abcd", "only arrays of whole numbers"),
        (b"i8", b"1234", "is refused"),
        (b"V8", bytes(8), "only arrays of whole numbers"),
    ],
)
def test_arrays_of_objects_in_a_cifar_pickle_are_refused(dtype, raw, message):
    """NumPy would read the bytes as addresses and crash the process."""
    assert read_pickle(pickled_array(b"u1", b"\x07"), "x")[b"labels"].tolist() == [7]
    with pytest.raises(ValueError, match=message):
        read_pickle(pickled_array(dtype, raw), "x")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_was_here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path / "py")
    (tmp_path / "py" / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}))
    line = refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    assert "data_batch_2" in line and "mkdir" in line
    assert not (tmp_path / "evil_was_here").exists()


def test_incomplete_cifar(tmp_path, capsys):
    cifar(tmp_path / "py")
    (tmp_path / "py" / "data_batch_2").write_bytes(b"no pickle")
    assert "data_batch_2" in refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}
    (tmp_path / "py" / "data_batch_2").write_bytes(pickle.dumps(batch, 2))
    line = refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    assert "data_batch_2 has no 'labels' of 1 numbers from 0 to 9" in line
    (tmp_path / "py" / "data_batch_2").unlink()
    assert "incomplete" in refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    assert convert("cifar10", tmp_path / "py", tmp_path / "o.beton", "--split", "test") == 0
    folder(tmp_path / "two" / "train", 1)
    assert "2 class folders" in refused(capsys, "cifar10", tmp_path / "two", tmp_path / "new" / "o.beton")


def test_cifar_class_folders(tmp_path):
    folder(tmp_path / "in" / "train", 2, [f"c{i}" for i in range(10)])
    folder(tmp_path / "in" / "test", 1, [f"c{i}" for i in range(10)])
    assert converted("cifar10", tmp_path / "in", tmp_path / "o.beton").card["samples"] == 20
    assert converted("cifar10", tmp_path / "in" / "test", tmp_path / "p.beton").card["samples"] == 10


def test_cifar10_from_the_shared_archive(tmp_path):
    path = shared("cifar10.tar.xz")
    stock = converted("cifar10", path, tmp_path / "o.beton", "--split", "test")
    assert stock.card["samples"] == stock.card["copied"] == 10_000
    assert " ".join(stock.card["classes"]) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert np.bincount(stock.table["label"]).tolist() == [1000] * 10
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.startswith("test/horse/") and member.isfile():
                data = tar.extractfile(member).read()
                break
    assert stock.payload(7000) == data


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split, rows in (("train", range(1437)), ("test", range(1437, 1797))):
        stock = converted("digits", split, tmp_path / f"{split}.beton")
        assert stock.table["label"].tolist() == digits.target[rows].tolist()
        for i in (0, 17, len(rows) - 1):
            assert abs(stock.pixels(i)[..., 2] * (16 / 255) - digits.images[rows[i]]).max() < 0.04
    stock = converted("digits", "-", tmp_path / "a.beton", "--split", "all", "--short-side", 32, "--upscale")
    assert stock.pixels(1796).shape == (32, 32, 3)


def voc(root, split="trainval"):
    """Five images with two classes in the layout of VOCdevkit; returns their label rows."""
    words = {"1": 1, "-1": 0, "0": -1}
    columns = {"dog": ["1", "-1", "0", "-1", "1"], "cat": ["-1", "1", "1", "0", "-1"]}
    ids = [f"{i:06d}" for i in (5, 7, 9, 12, 16)]
    main = root / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for name in ids:
        save(root / "VOC2007" / "JPEGImages" / f"{name}.jpg", photo(int(name)), quality=90)
    save(root / "VOC2007" / "JPEGImages" / "000099.jpg")  # of another split
    (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    for label, values in columns.items():
        (main / f"{label}_{split}.txt").write_text("".join(f"{n} {v:>2}\n" for n, v in zip(ids, values)))
    return [[words[columns["cat"][i]], words[columns["dog"][i]]] for i in range(5)]


@pytest.mark.parametrize("packed", [None, "w", "w:gz"])
def test_voc2007(tmp_path, packed):
    truth = voc(tmp_path / "VOCdevkit")
    path = tmp_path / "VOCdevkit"
    if packed:
        path = tmp_path / "voc.tar"
        with tarfile.open(path, packed) as tar:
            tar.add(tmp_path / "VOCdevkit", "VOCdevkit")
    stock = converted("voc2007", path, tmp_path / "o.beton")
    assert stock.card["label"] == "multi" and stock.card["classes"] == ["cat", "dog"]
    names = {p.read_bytes(): i for i, p in enumerate(sorted((tmp_path / "VOCdevkit").rglob("*.jpg")))}
    for row in range(5):  # a compressed tar has an order of its own
        assert stock.vector(row).tolist() == truth[names[stock.payload(row)]]


def test_voc2007_that_is_incomplete(tmp_path, capsys):
    voc(tmp_path / "d" / "VOCdevkit")
    path, out = tmp_path / "d" / "VOCdevkit", tmp_path / "new" / "o.beton"
    assert "ImageSets/Main/test.txt" in refused(capsys, "voc2007", path, out, "--split", "test")
    main = path / "VOC2007" / "ImageSets" / "Main"
    text = (main / "cat_trainval.txt").read_text()
    (main / "cat_trainval.txt").write_text(text.replace("000005 -1", "000005  x"))
    assert "000005 x" in refused(capsys, "voc2007", path, out)
    (main / "cat_trainval.txt").write_text(text.replace("000005", "000099"))
    assert "cat_trainval.txt does not list the images of trainval.txt" in refused(capsys, "voc2007", path, out)
    (main / "cat_trainval.txt").write_text(text)
    (path / "VOC2007" / "JPEGImages" / "000007.jpg").unlink()
    assert "000007.jpg" in refused(capsys, "voc2007", path, out)
