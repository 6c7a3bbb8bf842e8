"""Folders and archives as sources of `fastssl convert`: order, labels and class names, and what it refuses."""

import io
import os
import tarfile
import zipfile

import pytest
from convert_tools import Stock, archive, convert, converted, files, folder, refused, save

from fastssl import data_prep


def test_class_folders(tmp_path):
    root = folder(tmp_path / "in", 3, ("zebra", "ant"))
    stock = converted("imagefolder", root, tmp_path / "o.beton")
    assert stock.card["classes"] == ["ant", "zebra"] and stock.card["label"] == "int"
    assert stock.table["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert stock.table["index"].tolist() == list(range(6))
    assert [stock.payload(i) for i in range(6)] == list(files(root).values())


def test_a_note_for_one_class(tmp_path, capsys):
    for count, said in ((1, True), (2, False)):
        for name in "ab"[:count]:
            save(tmp_path / f"in{count}" / name / "0.jpg")
        assert convert("imagefolder", tmp_path / f"in{count}", tmp_path / f"{count}.beton") == 0
        assert ("all images are of one class ('a')" in capsys.readouterr().out) == said


def test_nested_class_folders_and_a_linked_one(tmp_path):
    save(tmp_path / "in" / "a" / "deep" / "x.jpg")
    save(tmp_path / "else" / "y.jpg")
    os.symlink(tmp_path / "else", tmp_path / "in" / "b")
    assert converted("imagefolder", tmp_path / "in", tmp_path / "o.beton").card["classes"] == ["a", "b"]


def test_a_flat_folder_has_no_labels_and_other_files_are_noted(tmp_path, capsys):
    save(tmp_path / "in" / "b.jpg")
    save(tmp_path / "in" / "A.PNG")
    (tmp_path / "in" / "README.txt").write_text("hello")
    (tmp_path / "in" / ".DS_Store").write_text("x")
    stock = converted("imagefolder", tmp_path / "in", tmp_path / "o.beton")
    assert stock.card["label"] == "none" and stock.card["classes"] is None
    assert stock.table["label"].tolist() == [-1, -1]
    out = capsys.readouterr().out
    assert "left out 1 files without an image's suffix, such as README.txt" in out
    assert "left out 1 hidden files" in out


def test_labels_none_and_split(tmp_path):
    folder(tmp_path / "in" / "train", 2)
    folder(tmp_path / "in" / "val", 1)
    stock = converted("imagefolder", tmp_path / "in", tmp_path / "o.beton", "--split", "val", "--labels", "none")
    assert stock.table["label"].tolist() == [-1, -1]
    stock = converted("imagefolder", tmp_path / "in", tmp_path / "p.beton", "--split", "train")
    assert stock.table["label"].tolist() == [0, 0, 1, 1]


def test_invalid_folders(tmp_path, capsys):
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
    kind, root = ("zip", "wrapped/") if name.endswith("zip") else ("tar", "./wrapped/")
    hidden = {"__MACOSX/wrapped/._0.jpg": b"x"} if kind == "zip" else {}
    archive(tmp_path / name, {root + member: data for member, data in members.items()} | hidden)
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    for workers in (1, 2):
        assert convert(kind, tmp_path / name, tmp_path / "p.beton", "--force", workers=workers) == 0
        assert (tmp_path / "p.beton").read_bytes() == (tmp_path / "o.beton").read_bytes()
        assert Stock(tmp_path / "p.beton").card["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:/x.jpg"])
def test_members_that_point_outside(tmp_path, capsys, name):
    data = save(tmp_path / "a.jpg").read_bytes()
    for kind, path in (("tar", "in.tar"), ("tar", "in.tar.gz"), ("zip", "in.zip")):
        archive(tmp_path / path, {"ok.jpg": data, name: data})
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
    for name in ("a.tar", "a.tar.xz", "a.zip"):
        archive(tmp_path / name, members)
        whole = (tmp_path / name).read_bytes()
        between = 10240  # bytes: the tar then ends between two members
        for size in (len(whole) // 3, len(whole) // 2, between if name == "a.tar" else len(whole) * 2 // 3):
            (tmp_path / name).write_bytes(whole[:size])
            line = refused(capsys, name.split(".")[1], tmp_path / name, tmp_path / "new" / "o.beton")
            assert "cannot read the archive" in line or "cut off" in line
    (tmp_path / "b.tar").write_bytes(b"")
    refused(capsys, "tar", tmp_path / "b.tar", tmp_path / "new" / "o.beton")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_links_in_an_archive_are_read_as_the_files_they_point_to(tmp_path, name):
    root = folder(tmp_path / "in", 2)
    os.link(root / "cat" / "0.jpg", root / "cat" / "5.jpg")
    os.symlink("1.jpg", root / "dog" / "0a.jpg")  # comes before the file that it points to
    with tarfile.open(tmp_path / name, "w:" + name[6:]) as tar:
        tar.add(root, "in")
    assert convert("imagefolder", root, tmp_path / "o.beton") == 0
    ours, theirs = converted("tar", tmp_path / name, tmp_path / "p.beton"), Stock(tmp_path / "o.beton")
    pairs = [sorted((s.table["label"][i], s.payload(i)) for i in range(6)) for s in (ours, theirs)]
    assert ours.card["samples"] == 6 and pairs[0] == pairs[1]


def test_files_that_are_too_large_or_not_regular_are_refused(tmp_path, capsys, monkeypatch):
    """Declared sizes, pipes and devices; the limit is lowered for the test."""
    monkeypatch.setattr("fastssl.data_prep.file_sources.base.MAX_BYTES", 1 << 20)
    zeros = {"a.jpg": save(tmp_path / "a.jpg").read_bytes(), "z.jpg": bytes(2 << 20)}
    (tmp_path / "new").mkdir()  # for NAME.bad.txt
    for kind, name in (("tar", "a.tar.gz"), ("tar", "a.tar"), ("zip", "a.zip")):
        archive(tmp_path / name, zeros, zipfile.ZIP_DEFLATED)
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
def test_too_many_workers_are_refused(tmp_path, capsys, count):
    assert data_prep.main(["digits", "test", str(tmp_path / "o.beton"), "--workers", count]) == 2
    assert "--workers" in capsys.readouterr().err


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
def test_invalid_options(tmp_path, capsys, argv, message):
    save(tmp_path / "in" / "a.jpg")
    words = [str(tmp_path / "in") if word == "IN" else word for word in argv]
    assert message in refused(capsys, words[0], words[1], tmp_path / "new" / "o.beton", *words[2:])
