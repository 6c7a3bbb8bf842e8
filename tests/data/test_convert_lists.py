"""List files as source of `fastssl convert`."""

import pytest
from convert_tools import Stock, convert, converted, folder, photo, refused, save

from fastssl import data_prep


def test_list_files(tmp_path):
    save(tmp_path / "img" / "a b.jpg", photo(1))
    save(tmp_path / "img" / "c.jpg", photo(2))
    (tmp_path / "labelled.txt").write_text("img/c.jpg 3\n\nimg/a b.jpg 0\n")
    stock = converted("list", tmp_path / "labelled.txt", tmp_path / "o.beton")
    assert stock.table["label"].tolist() == [3, 0] and stock.card["classes"] == ["0", "1", "2", "3"]
    assert stock.payload(1) == (tmp_path / "img" / "a b.jpg").read_bytes()
    (tmp_path / "plain.txt").write_text("a b.jpg\nc.jpg\n")
    stock = converted("list", tmp_path / "plain.txt", tmp_path / "p.beton", "--root", tmp_path / "img")
    assert stock.table["label"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.jpg 0\na.jpg cat\n", "line 2: the label 'cat' is not a number, unlike"),
        ("a.jpg -2\na.jpg 0", "'-2' is below 0"),
        ("a.jpg 1.5\n", "'1.5' is neither"),
        ("a.jpg 0\na.jpg\n", "line 2: some lines have a label"),
        ("a.jpg cat dog\n", "3 columns: give those with labels, --label-columns 2"),
        ("a.jpg\tx\t1\n", "3 columns"),
        ('a.jpg,"x\n', "line 1"),
        ("a.jpg\0 1\n", "not a text file"),
        (",1\n,2\n", "the path is empty"),
        ("path,label\na.jpg,0\n,1\n", "line 3: the path is empty"),
        ("\n\n", "lists no image"),
        ("a.jpg 20000000\n", "too large for 1 lines"),
    ],
)
def test_invalid_list_files(tmp_path, capsys, text, message):
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


def test_a_list_of_missing_images_suggests_root(tmp_path, capsys):
    save(tmp_path / "images" / "a.jpg")
    (tmp_path / "o").mkdir()
    (tmp_path / "l.txt").write_text("a.jpg 0\nb.jpg 1\n")
    line = refused(capsys, "list", tmp_path / "l.txt", tmp_path / "o" / "o.beton")
    assert f"none of its 2 images exists, the first is {tmp_path / 'a.jpg'}" in line and "by --root" in line
    assert convert("list", tmp_path / "l.txt", tmp_path / "o.beton", "--root", tmp_path / "images", "--max-bad", 1) == 0


def listed(tmp_path, text: str | bytes, *options) -> Stock:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(tmp_path / name, photo(ord(name[0])))
    (tmp_path / "l.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return converted("list", tmp_path / "l.txt", tmp_path / "l.beton", "--force", *options)


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
        ("a.jpg 999\nb.jpg 0\n", [999, 0], [str(i) for i in range(1000)]),
        ("a.jpg , dog \nb.jpg, cat\n", [1, 0], ["cat", "dog"]),
    ],
)
def test_labels_in_a_list(tmp_path, text, labels, classes):
    stock = listed(tmp_path, text)
    assert stock.table["label"].tolist() == labels and stock.card["classes"] == classes
    assert stock.payload(0) == (tmp_path / "a.jpg").read_bytes()
    assert data_prep.main(["check", str(tmp_path / "l.beton")]) == 0


def test_a_note_for_a_list_of_one_class(tmp_path, capsys):
    for text, said in (("a.jpg 3\nb.jpg 3\nc.jpg -1\n", True), ("a.jpg 3\nb.jpg 0\n", False)):
        listed(tmp_path, text)
        assert ("all images with a label are of one class, '3'" in capsys.readouterr().out) == said


def test_tiny_imagenets_validation_list_gets_the_numbers_of_its_training_set(tmp_path, capsys):
    """val_annotations.txt: image, class, box, in columns; the order of wnids.txt is not that of the folders."""
    folder(tmp_path / "train", 1, ("n03", "n01", "n02"))
    assert convert("imagefolder", tmp_path / "train", tmp_path / "train.beton") == 0
    text = "a.jpg\tn02\t0\t32\t44\t62\nb.jpg\tn03\t52\t55\t57\t59\nc.jpg\tn02\t4\t0\t60\t55\n"
    for classes, labels in (("train.beton", [1, 2, 1]), ("train.json", [1, 2, 1]), ("wnids.txt", [0, 2, 0])):
        (tmp_path / "wnids.txt").write_text("n02\nn01\nn03\n")
        options = "--label-columns", 2, "--classes", tmp_path / classes
        stock = listed(tmp_path, text, *options)
        assert stock.table["label"].tolist() == labels and len(stock.card["classes"]) == 3
    (tmp_path / "wnids.txt").write_text("n01\nn03\n")
    line = refused(capsys, "list", tmp_path / "l.txt", tmp_path / "new" / "o.beton", *options)
    assert "line 1: the label 'n02' is not one of the 2 classes" in line


def test_a_label_is_a_name_first_and_otherwise_a_number(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("1\n0\ncat\n")
    stock = listed(tmp_path, "a.jpg 1\nb.jpg cat\nc.jpg 2\n", "--classes", tmp_path / "names.txt")
    assert stock.table["label"].tolist() == [0, 2, 2]
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\n")
    line = refused(
        capsys, "list", tmp_path / "l.txt", tmp_path / "new" / "o.beton", "--classes", tmp_path / "names.txt"
    )
    assert "the name 'cat' occurs more than once" in line
    (tmp_path / "l.txt").write_text("a.jpg 0\nb.jpg\n")
    line = refused(capsys, "list", tmp_path / "l.txt", tmp_path / "new" / "o.beton", "--label-columns", 2)
    assert "line 2 has 1 columns, and --label-columns is 2" in line


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg cat dog\nb.jpg\nc.jpg dog\n",
        "a.jpg,cat;dog\nb.jpg,\nc.jpg,dog\n",
        "a.jpg,cat|dog\nb.jpg,\nc.jpg,dog\n",
        "a.jpg\tcat\tdog\nb.jpg\t\t\nc.jpg\tdog\t\n",
        "a.jpg 0 1\nb.jpg -1\nc.jpg 1 -1\n",
    ],
)
def test_several_labels_per_line(tmp_path, text):
    stock = listed(tmp_path, text, "--label-columns", "2-")
    assert stock.card["label"] == "multi" and stock.card["classes"] == (["0", "1"] if "0" in text else ["cat", "dog"])
    assert [stock.vector(i).tolist() for i in range(3)] == [[1, 1], [0, 0], [0, 1]]
