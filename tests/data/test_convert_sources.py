"""Every source of `fastssl convert`: order, labels and class names, and what it refuses."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from convert_tools import Stock, convert, folder, photo, save, shared

from fastssl import data_prep
from fastssl.data_prep.plainpickle import read_pickle

BATCH_NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def refused(capsys, *argv) -> str:
    """The single line on stderr of a conversion that fails, having left nothing behind."""
    out = argv[2]
    before = {p for p in out.parent.parent.rglob("*") if not p.name.endswith(".bad.txt")}
    assert convert(*argv) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("fastssl convert: ")
    assert {p for p in out.parent.parent.rglob("*") if not p.name.endswith(".bad.txt")} == before
    return line


def archive(path, members: dict, mode="w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def files(root) -> dict:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


def test_class_folders(tmp_path):
    root = folder(tmp_path / "in", 3, ("zebra", "ant"))
    assert convert("imagefolder", root, tmp_path / "o.beton") == 0
    stock = Stock(tmp_path / "o.beton")
    assert stock.card["classes"] == ["ant", "zebra"] and stock.card["label"] == "int"
    assert stock.table["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert stock.table["index"].tolist() == list(range(6))
    assert [stock.payload(i) for i in range(6)] == list(files(root).values())


def test_one_class_is_said(tmp_path, capsys):
    for count, said in ((1, True), (2, False)):
        for name in "ab"[:count]:
            save(tmp_path / f"in{count}" / name / "0.jpg")
        assert convert("imagefolder", tmp_path / f"in{count}", tmp_path / f"{count}.beton") == 0
        assert ("all images are of one class ('a')" in capsys.readouterr().out) == said


def test_nested_class_folders_and_a_linked_one(tmp_path):
    save(tmp_path / "in" / "a" / "deep" / "x.jpg")
    save(tmp_path / "else" / "y.jpg")
    os.symlink(tmp_path / "else", tmp_path / "in" / "b")
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    assert Stock(tmp_path / "o.beton").card["classes"] == ["a", "b"]


def test_flat_folder_has_no_labels_and_other_files_are_announced(tmp_path, capsys):
    save(tmp_path / "in" / "b.jpg")
    save(tmp_path / "in" / "A.PNG")
    (tmp_path / "in" / "README.txt").write_text("hello")
    (tmp_path / "in" / ".DS_Store").write_text("x")
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    stock = Stock(tmp_path / "o.beton")
    assert stock.card["label"] == "none" and stock.card["classes"] is None
    assert stock.table["label"].tolist() == [-1, -1]
    out = capsys.readouterr().out
    assert "left out 1 files without an image's suffix, such as README.txt" in out
    assert "left out 1 hidden files" in out


def test_labels_none_and_split(tmp_path):
    folder(tmp_path / "in" / "train", 2)
    folder(tmp_path / "in" / "val", 1)
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton", "--split", "val", "--labels", "none") == 0
    assert Stock(tmp_path / "o.beton").table["label"].tolist() == [-1, -1]
    assert convert("imagefolder", tmp_path / "in", tmp_path / "p.beton", "--split", "train") == 0
    assert Stock(tmp_path / "p.beton").table["label"].tolist() == [0, 0, 1, 1]


def test_folders_that_make_no_sense(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    out = tmp_path / "new" / "deep" / "o.beton"
    assert "holds no image" in refused(capsys, "imagefolder", tmp_path / "in", out)
    assert "there is no file or folder" in refused(capsys, "imagefolder", tmp_path / "missing", out)
    folder(tmp_path / "in", 1)
    (tmp_path / "in" / "empty").mkdir()
    assert "'empty'" in refused(capsys, "imagefolder", tmp_path / "in", out)
    (tmp_path / "in" / "empty").rmdir()
    save(tmp_path / "in" / "stray.jpg")
    assert "stray.jpg" in refused(capsys, "imagefolder", tmp_path / "in", out)
    folder(tmp_path / "splits" / "train", 1)
    folder(tmp_path / "splits" / "test", 1)
    assert "--split train" in refused(capsys, "imagefolder", tmp_path / "splits", out)
    assert "'val'" in refused(capsys, "imagefolder", tmp_path / "splits", out, "--split", "val")
    os.symlink(tmp_path / "splits", tmp_path / "splits" / "train" / "loop")
    assert "was read already" in refused(capsys, "imagefolder", tmp_path / "splits", out)
    assert not out.parent.parent.exists()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz", "a.zip"])
def test_archives_equal_the_folder(tmp_path, name):
    members = files(folder(tmp_path / "in", 3))
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for member, data in members.items():
                z.writestr("wrapped/" + member, data)
            z.writestr("__MACOSX/wrapped/._0.jpg", b"x")
    else:
        archive(tmp_path / name, {"./wrapped/" + m: d for m, d in members.items()}, "w:" + name[6:])
    kind = "zip" if name.endswith("zip") else "tar"
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    for workers in (1, 2):
        assert convert(kind, tmp_path / name, tmp_path / "p.beton", "--force", workers=workers) == 0
        assert (tmp_path / "p.beton").read_bytes() == (tmp_path / "o.beton").read_bytes()
        assert Stock(tmp_path / "p.beton").card["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:/x.jpg"])
def test_members_that_point_outside(tmp_path, capsys, name):
    data = save(tmp_path / "a.jpg").read_bytes()
    archive(tmp_path / "in.tar", {"ok.jpg": data, name: data})
    archive(tmp_path / "in.tar.gz", {"ok.jpg": data, name: data}, "w:gz")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as z:
        z.writestr("ok.jpg", data)
        z.writestr(name, data)
    for kind, path in (("tar", "in.tar"), ("tar", "in.tar.gz"), ("zip", "in.zip")):
        assert "points outside the archive" in refused(capsys, kind, tmp_path / path, tmp_path / "new" / "o.beton")


@pytest.mark.parametrize("target, outside", [("/etc/passwd", True), ("../../x", True), ("../gone.jpg", False)])
def test_links_in_a_tar(tmp_path, capsys, target, outside):
    data = save(tmp_path / "a.jpg").read_bytes()
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, link in (("e/ok.jpg", ""), ("d/link.jpg", target)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            info.size = 0 if link else len(data)
            tar.addfile(info, None if link else io.BytesIO(data))
    if outside:
        assert "points outside" in refused(capsys, "tar", tmp_path / "in.tar", tmp_path / "new" / "o.beton")
    else:
        assert convert("tar", tmp_path / "in.tar", tmp_path / "o.beton") == 0
        assert "left out 1 hidden files and links" in capsys.readouterr().out


def test_broken_archives(tmp_path, capsys):
    members = files(folder(tmp_path / "in", 3))
    archive(tmp_path / "a.tar", members)
    archive(tmp_path / "a.tar.xz", members, "w:xz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for member, data in members.items():
            z.writestr(member, data)
    for name in ("a.tar", "a.tar.xz", "a.zip"):
        whole = (tmp_path / name).read_bytes()
        between = 10240  # of the tar: it ends between two members
        for size in (len(whole) // 3, len(whole) // 2, between if name == "a.tar" else len(whole) * 2 // 3):
            (tmp_path / name).write_bytes(whole[:size])
            line = refused(capsys, name.split(".")[1], tmp_path / name, tmp_path / "new" / "o.beton")
            assert "cannot read the archive" in line or "cut off" in line
    (tmp_path / "b.tar").write_bytes(b"")
    refused(capsys, "tar", tmp_path / "b.tar", tmp_path / "new" / "o.beton")


def test_list_files(tmp_path):
    save(tmp_path / "img" / "a b.jpg", photo(1))
    save(tmp_path / "img" / "c.jpg", photo(2))
    (tmp_path / "labelled.txt").write_text("img/c.jpg 3\n\nimg/a b.jpg 0\n")
    assert convert("list", tmp_path / "labelled.txt", tmp_path / "o.beton") == 0
    stock = Stock(tmp_path / "o.beton")
    assert stock.table["label"].tolist() == [3, 0] and stock.card["classes"] == ["0", "1", "2", "3"]
    assert stock.payload(1) == (tmp_path / "img" / "a b.jpg").read_bytes()
    (tmp_path / "plain.txt").write_text("a b.jpg\nc.jpg\n")
    assert convert("list", tmp_path / "plain.txt", tmp_path / "p.beton", "--root", tmp_path / "img") == 0
    assert Stock(tmp_path / "p.beton").table["label"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jpg 0\na.jpg cat\n", "line 2: the label 'cat' is no number, unlike"),
        ("a.jpg -2\na.jpg 0", "'-2' is below 0"),
        ("a.jpg 1.5\n", "'1.5' is neither"),
        ("a.jpg 0\na.jpg\n", "line 2: some lines have a label"),
        ("a.jpg cat dog\n", "3 columns: name those with labels, --label-columns 2"),
        ("a.jpg\tx\t1\n", "3 columns"),
        ('a.jpg,"x\n', "line 1"),
        ("a.jpg\0 1\n", "no text file"),
        (",1\n,2\n", "the path is empty"),
        ("\n\n", "lists no image"),
        ("a.jpg 20000000\n", "far beyond"),
    ],
)
def test_list_files_that_make_no_sense(tmp_path, capsys, text, message):
    save(tmp_path / "a.jpg")
    (tmp_path / "l.txt").write_text(text)
    assert message in refused(capsys, "list", tmp_path / "l.txt", tmp_path / "new" / "o.beton")


def test_a_list_with_a_missing_file(tmp_path, capsys):
    save(tmp_path / "a.jpg")
    (tmp_path / "l.txt").write_text("a.jpg 0\nmissing.jpg 1\n")
    (tmp_path / "o").mkdir()
    assert "missing.jpg (No such file or directory)" in refused(
        capsys, "list", tmp_path / "l.txt", tmp_path / "o" / "o.beton"
    )


def test_a_list_without_one_existing_image_names_root(tmp_path, capsys):
    save(tmp_path / "images" / "a.jpg")
    (tmp_path / "o").mkdir()
    (tmp_path / "l.txt").write_text("a.jpg 0\nb.jpg 1\n")
    line = refused(capsys, "list", tmp_path / "l.txt", tmp_path / "o" / "o.beton")
    assert f"none of its 2 images exists, the first is {tmp_path / 'a.jpg'}" in line and "by --root" in line
    assert convert("list", tmp_path / "l.txt", tmp_path / "o.beton", "--root", tmp_path / "images", "--max-bad", 1) == 0


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
            assert convert(kind, path, tmp_path / "o.beton", "--split", split, "--force") == 0
            stock = Stock(tmp_path / "o.beton")
            assert stock.table["label"].tolist() == truth[split][1]
            assert all(np.array_equal(stock.pixels(i), truth[split][0][i]) for i in range(len(truth[split][1])))
            assert stock.card["classes"][3] == "name3" and stock.card["raw"] == stock.card["samples"]


def listed(tmp_path, text: str | bytes, *options) -> Stock:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(tmp_path / name, photo(ord(name[0])))
    (tmp_path / "l.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert convert("list", tmp_path / "l.txt", tmp_path / "l.beton", "--force", *options) == 0
    return Stock(tmp_path / "l.beton")


@pytest.mark.parametrize(
    "text, labels, classes",
    [
        ("a.jpg dog\nb.jpg cat\nc.jpg dog\n", [1, 0, 1], ["cat", "dog"]),
        (b"\xef\xbb\xbfa.jpg 0\r\nb.jpg 1\r\n", [0, 1], ["0", "1"]),
        ("a.jpg,0\nb.jpg,1\n", [0, 1], ["0", "1"]),
        ('path,label\na.jpg,"polar bear"\nb.jpg,"cat, big"\n', [1, 0], ["cat, big", "polar bear"]),
        ("a.jpg\tn2\nb.jpg\tn1\n", [1, 0], ["n1", "n2"]),
        ("a.jpg 0\nb.jpg -1\nc.jpg 1\n", [0, -1, 1], ["0", "1"]),
        ("a.jpg -1\nb.jpg -1\n", [-1, -1], None),
    ],
)
def test_labels_in_a_list(tmp_path, text, labels, classes):
    stock = listed(tmp_path, text)
    assert stock.table["label"].tolist() == labels and stock.card["classes"] == classes
    assert stock.payload(0) == (tmp_path / "a.jpg").read_bytes()
    assert data_prep.main(["check", str(tmp_path / "l.beton")]) == 0


def test_a_list_of_one_class_is_said(tmp_path, capsys):
    for text, said in (("a.jpg 3\nb.jpg 3\nc.jpg -1\n", True), ("a.jpg 3\nb.jpg 0\n", False)):
        listed(tmp_path, text)
        assert ("all images with a label are of one class, '3'" in capsys.readouterr().out) == said


def test_tiny_imagenet_s_validation_list_gets_the_numbers_of_its_training_set(tmp_path, capsys):
    """val_annotations.txt: image, class, box, in columns; the order of wnids.txt is not that of the folders."""
    folder(tmp_path / "train", 1, ("n03", "n01", "n02"))
    assert convert("imagefolder", tmp_path / "train", tmp_path / "train.beton") == 0
    text = "a.jpg\tn02\t0\t32\t44\t62\nb.jpg\tn03\t52\t55\t57\t59\nc.jpg\tn02\t4\t0\t60\t55\n"
    for classes, labels in (("train.beton", [1, 2, 1]), ("train.json", [1, 2, 1]), ("wnids.txt", [0, 2, 0])):
        (tmp_path / "wnids.txt").write_text("n02\nn01\nn03\n")
        stock = listed(tmp_path, text, "--label-columns", 2, "--classes", tmp_path / classes)
        assert stock.table["label"].tolist() == labels and len(stock.card["classes"]) == 3
    (tmp_path / "wnids.txt").write_text("n01\nn03\n")
    line = refused(
        capsys,
        "list",
        tmp_path / "l.txt",
        tmp_path / "new" / "o.beton",
        "--label-columns",
        2,
        "--classes",
        tmp_path / "wnids.txt",
    )
    assert "line 1: the label 'n02' is none of the 2 classes" in line


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg cat dog\nb.jpg\nc.jpg dog\n",
        "a.jpg,cat;dog\nb.jpg,\nc.jpg,dog\n",
        "a.jpg\tcat\tdog\nb.jpg\t\t\nc.jpg\tdog\t\n",
    ],
)
def test_several_labels_a_line(tmp_path, text):
    stock = listed(tmp_path, text, "--label-columns", "2-")
    assert stock.card["label"] == "multi" and stock.card["classes"] == ["cat", "dog"]
    assert [stock.vector(i).tolist() for i in range(3)] == [[1, 1], [0, 0], [0, 1]]


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
        (b"O8", b"AAAAAAAA", "only whole numbers"),
        (b"f4", b"abcd", "only whole numbers"),
        (b"i8", b"1234", "is refused"),
        (b"V8", bytes(8), "only whole numbers"),
    ],
)
def test_arrays_of_pointers_in_a_cifar_pickle_are_refused(dtype, raw, message):
    """NumPy would follow the pointer and end the process."""
    assert read_pickle(pickled_array(b"u1", b"\x07"), "x")[b"labels"].tolist() == [7]
    with pytest.raises(ValueError, match=message):
        read_pickle(pickled_array(dtype, raw), "x")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_links_in_an_archive_are_read_as_the_files_they_name(tmp_path, name):
    root = folder(tmp_path / "in", 2)
    os.link(root / "cat" / "0.jpg", root / "cat" / "5.jpg")
    os.symlink("1.jpg", root / "dog" / "0a.jpg")  # stands in the archive before the file that it names
    with tarfile.open(tmp_path / name, "w:" + name[6:]) as tar:
        tar.add(root, "in")
    assert convert("imagefolder", root, tmp_path / "o.beton") == 0
    assert convert("tar", tmp_path / name, tmp_path / "p.beton") == 0
    ours, theirs = Stock(tmp_path / "p.beton"), Stock(tmp_path / "o.beton")
    pairs = [sorted((s.table["label"][i], s.payload(i)) for i in range(6)) for s in (ours, theirs)]
    assert ours.card["samples"] == 6 and pairs[0] == pairs[1]


def test_what_is_read_is_bounded(tmp_path, capsys, monkeypatch):
    """Declared sizes, pipes and devices; the bound is lowered for the test."""
    monkeypatch.setattr("fastssl.data_prep.file_sources.MAX_BYTES", 1 << 20)
    zeros = {"a.jpg": save(tmp_path / "a.jpg").read_bytes(), "z.jpg": bytes(2 << 20)}
    archive(tmp_path / "a.tar.gz", zeros, "w:gz")
    archive(tmp_path / "a.tar", zeros)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for member, data in zeros.items():
            z.writestr(member, data)
    (tmp_path / "new").mkdir()  # for NAME.bad.txt
    for kind, name in (("tar", "a.tar.gz"), ("tar", "a.tar"), ("zip", "a.zip")):
        line = refused(capsys, kind, tmp_path / name, tmp_path / "new" / "o.beton")
        assert "1 of 2 images" in line and "z.jpg (OSError: it has 2 MiB, at most 1 MiB are read)" in line
    save(tmp_path / "in" / "a.jpg")
    os.mkfifo(tmp_path / "in" / "b.jpg")
    os.symlink("/dev/zero", tmp_path / "in" / "c.jpg")
    line = refused(capsys, "imagefolder", tmp_path / "in", tmp_path / "new" / "o.beton")
    assert "2 of 3 images" in line and "not a regular file" in line
    for path in ("/dev/zero", tmp_path / "in" / "b.jpg"):
        assert "not a regular file" in refused(capsys, "list", path, tmp_path / "new" / "o.beton")


@pytest.mark.parametrize("count", ["0", "5000", "99999999999", "9" * 5000])
def test_workers_are_bounded(tmp_path, capsys, count):
    assert data_prep.main(["digits", "test", str(tmp_path / "o.beton"), "--workers", count]) == 2
    assert "--workers" in capsys.readouterr().err


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


def test_damaged_cifar(tmp_path, capsys):
    cifar(tmp_path / "py")
    (tmp_path / "py" / "data_batch_2").write_bytes(b"no pickle")
    assert "data_batch_2" in refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    (tmp_path / "py" / "data_batch_2").unlink()
    assert "incomplete" in refused(capsys, "cifar10", tmp_path / "py", tmp_path / "new" / "o.beton")
    assert convert("cifar10", tmp_path / "py", tmp_path / "o.beton", "--split", "test") == 0
    folder(tmp_path / "two" / "train", 1)
    assert "2 class folders" in refused(capsys, "cifar10", tmp_path / "two", tmp_path / "new" / "o.beton")


def test_cifar_class_folders(tmp_path):
    folder(tmp_path / "in" / "train", 2, [f"c{i}" for i in range(10)])
    folder(tmp_path / "in" / "test", 1, [f"c{i}" for i in range(10)])
    assert convert("cifar10", tmp_path / "in", tmp_path / "o.beton") == 0
    assert Stock(tmp_path / "o.beton").card["samples"] == 20
    assert convert("cifar10", tmp_path / "in" / "test", tmp_path / "p.beton") == 0
    assert Stock(tmp_path / "p.beton").card["samples"] == 10


def test_cifar10_from_the_shared_archive(tmp_path):
    path = shared("cifar10.tar.xz")
    assert convert("cifar10", path, tmp_path / "o.beton", "--split", "test") == 0
    stock = Stock(tmp_path / "o.beton")
    assert stock.card["samples"] == stock.card["copied"] == 10_000
    assert stock.card["classes"] == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
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
        assert convert("digits", split, tmp_path / f"{split}.beton") == 0
        stock = Stock(tmp_path / f"{split}.beton")
        assert stock.table["label"].tolist() == digits.target[rows].tolist()
        for i in (0, 17, len(rows) - 1):
            assert abs(stock.pixels(i)[..., 2] * (16 / 255) - digits.images[rows[i]]).max() < 0.04
    assert convert("digits", "-", tmp_path / "a.beton", "--split", "all", "--short-side", 32, "--upscale") == 0
    assert Stock(tmp_path / "a.beton").pixels(1796).shape == (32, 32, 3)


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
    assert convert("voc2007", path, tmp_path / "o.beton") == 0
    stock = Stock(tmp_path / "o.beton")
    assert stock.card["label"] == "multi" and stock.card["classes"] == ["cat", "dog"]
    names = {p.read_bytes(): i for i, p in enumerate(sorted((tmp_path / "VOCdevkit").rglob("*.jpg")))}
    for row in range(5):  # a tar keeps its own order, the label has to follow
        assert stock.vector(row).tolist() == truth[names[stock.payload(row)]]


def test_voc2007_that_is_incomplete(tmp_path, capsys):
    voc(tmp_path / "d" / "VOCdevkit")
    path, out = tmp_path / "d" / "VOCdevkit", tmp_path / "new" / "o.beton"
    assert "ImageSets/Main/test.txt" in refused(capsys, "voc2007", path, out, "--split", "test")
    main = path / "VOC2007" / "ImageSets" / "Main"
    text = (main / "cat_trainval.txt").read_text()
    (main / "cat_trainval.txt").write_text(text.replace("000005 -1", "000005  x"))
    assert "000005 x" in refused(capsys, "voc2007", path, out)
    (main / "cat_trainval.txt").write_text(text)
    (path / "VOC2007" / "JPEGImages" / "000007.jpg").unlink()
    assert "000007.jpg" in refused(capsys, "voc2007", path, out)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["imagefolders", "IN"], "invalid choice"),
        (["imagefolder", "IN", "--root", "x"], "--root is for list files"),
        (["digits", "half"], "'half'"),
        (["digits", "train", "--split", "test"], "PATH is the split"),
        (["imagefolder", "IN", "--upscale"], "needs --short-side"),
        (["imagefolder", "IN", "--quality", "101"], "1 to 100"),
        (["imagefolder", "IN", "--max-aspect", "3"], "needs --short-side"),
        (["zip", "IN"], "a folder"),
        (["imagefolder", "IN", "--short-side", "-3"], "positive"),
        (["imagefolder", "IN", "--nonsense"], "--nonsense"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, argv, message):
    save(tmp_path / "in" / "a.jpg")
    words = [str(tmp_path / "in") if word == "IN" else word for word in argv]
    assert message in refused(capsys, words[0], words[1], tmp_path / "new" / "o.beton", *words[2:])
