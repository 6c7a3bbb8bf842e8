"""The file as a whole: the same bytes for any number of workers, stock FFCV reads it, nothing is lost on failure."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import read_image
from convert_tools import Stock, convert, folder, photo, save
from PIL import Image

from fastssl import data_prep
from fastssl.data_prep import ffcv_format, sources, write
from fastssl.data_prep.image import Options
from fastssl.files.datacard import DataCard


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of JPEGs, PNGs, one rotated photograph: 300 images, several chunks of work."""
    root = tmp_path_factory.mktemp("mixed")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(300):
        pixels = photo(i, 20 + i % 17, 20 + i % 23)
        options = {"exif": exif} if i == 30 else {}
        save(root / f"c{i % 3}" / (f"{i:03d}.png" if i % 7 == 0 else f"{i:03d}.jpg"), pixels, **options)
    return root


def test_layout_is_that_of_ffcv():
    from ffcv import types
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.HeaderType == ffcv_format.HEADER and types.CURRENT_VERSION == ffcv_format.VERSION
    assert types.ALLOC_TABLE_TYPE == ffcv_format.ALLOCATION and types.FieldDescType == ffcv_format.FIELD
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (ffcv_format.JPG, ffcv_format.RAW)
    for classes, label in ((None, IntField()), (20, NDArrayField(np.dtype("<f4"), (20,)))):
        fields = {"image": RGBImageField(), "index": IntField(), "label": label}
        assert ffcv_format.sample_table(1, classes is not None).dtype == types.get_metadata_type(list(fields.values()))
        for ours, (name, field) in zip(ffcv_format.field_descriptions(classes), fields.items()):
            assert types.TYPE_ID_HANDLER[ours["type_id"]] is type(field)
            assert bytes(ours["name"]).rstrip(b"\0").decode() == name
            assert np.array_equal(ours["arguments"], field.to_binary()[0])


@pytest.mark.parametrize("options", [[], ["--short-side", "16"], ["--mode", "jpg"], ["--mode", "raw"]], ids=str)
def test_workers_do_not_change_a_byte(mixed, tmp_path, options):
    for workers in (1, 4):
        assert convert("imagefolder", mixed, tmp_path / f"{workers}.beton", *options, workers=workers) == 0
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "4.beton").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "4.json").read_bytes()


def test_workers_do_not_change_what_is_skipped(mixed, tmp_path):
    root = folder(tmp_path / "in", 80)
    for i in range(0, 80, 9):
        (root / "cat" / f"{i}.jpg").write_bytes(b"broken")
    for workers in (1, 4):
        assert convert("imagefolder", root, tmp_path / f"{workers}.beton", "--max-bad", 9, workers=workers) == 0
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "4.beton").read_bytes()
    assert Stock(tmp_path / "4.beton").table["index"].tolist() == list(range(151))


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loads_every_image(tmp_path, monkeypatch, os_cache):
    """FFCV's Loader with its own decoders, with both of its memory managers, over many pages."""
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (97, 64, 48, 3), dtype=np.uint8)
    vectors = rng.integers(-1, 2, (97, 5)).astype(np.float32)
    monkeypatch.setattr(write, "MIN_PAGE", 1 << 17)  # 14 images a page, so that there are several
    with open(tmp_path / "o.beton", "wb") as file:
        beton = write.BetonWriter(file, 97, 5)
        for image, vector in zip(pixels, vectors):
            beton.add(write.Stored(image.tobytes(), ffcv_format.RAW, 64, 48), vector)
        beton.finish()
    loader = Loader(
        str(tmp_path / "o.beton"),
        batch_size=10,
        num_workers=1,
        os_cache=os_cache,
        drop_last=False,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "index": [IntDecoder()], "label": [NDArrayDecoder()]},
    )
    seen = [[part.copy() for part in batch] for batch in loader]
    images, index, labels = (np.concatenate(parts) for parts in zip(*seen))
    assert np.array_equal(images, pixels)
    assert index.ravel().tolist() == list(range(97))
    assert np.array_equal(labels, vectors)


def test_stock_ffcv_decodes_passed_through_jpegs(tmp_path):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    for i in range(20):
        pixels = photo(i)[..., 0] if i % 5 == 0 else photo(i)
        save(tmp_path / "in" / f"c{i % 2}" / f"{i:02d}.jpg", pixels, quality=90, progressive=i % 3 == 0)
    save(tmp_path / "in" / "c1" / "z.png", photo(99))
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    loader = Loader(
        str(tmp_path / "o.beton"),
        batch_size=21,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "index": [IntDecoder()], "label": [IntDecoder()]},
    )
    images, _, labels = next(iter(loader))
    for image, path in zip(images, sorted((tmp_path / "in").rglob("*.*"))):
        assert abs(image.astype(int) - np.asarray(read_image(path).convert("RGB"))).mean() < 1.5, path
    assert labels.ravel().tolist() == [0] * 10 + [1] * 11


def test_pages_grow_for_a_large_image(tmp_path):
    """What was laid out for small pages has to respect the larger ones."""
    small, large = np.zeros((900, 1000, 3), np.uint8), np.arange(27_000_000, dtype=np.uint8).reshape(3000, 3000, 3)
    for i, pixels in enumerate([small, small, small, small, large, small, small]):
        save(tmp_path / "in" / f"{i}.png", pixels, compress_level=0)
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    stock = Stock(tmp_path / "o.beton")
    assert np.array_equal(stock.pixels(4), large)
    page = int(stock.reader.page_size)
    assert page == 1 << 25
    table = stock.reader.alloc_table
    assert (table["ptr"] // page == (table["ptr"] + table["size"] - 1) // page).all()


def test_data_card(mixed, tmp_path):
    import hashlib

    assert convert("imagefolder", mixed, tmp_path / "o.beton") == 0
    card = json.loads((tmp_path / "o.json").read_text())
    data = (tmp_path / "o.beton").read_bytes()
    sizes = [read_image(p).size if p.name != "030.jpg" else read_image(p).size[::-1] for p in mixed.rglob("*.*")]
    areas = [w * h for w, h in sizes]
    assert card["format"] == 1 and card["kind"] == "imagefolder" and card["source"] == str(mixed)
    assert card["samples"] == 300 and card["classes"] == ["c0", "c1", "c2"]
    assert (card["max_width"], card["max_height"]) == tuple(max(side) for side in zip(*sizes))
    assert card["max_pixels"] == max(areas) and card["mean_pixels"] == pytest.approx(np.mean(areas))
    assert card["min_side"] == min(min(s) for s in sizes)
    assert card["raw"] == 43 and card["jpeg"] == 257 and card["copied"] == 256
    assert card["bytes"] == len(data) and card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["ffcv"] == "1.0.2" and card["fastssl"] and card["options"]["mode"] is None
    assert " ".join(card) == (  # the order since the first version
        "format source kind samples classes label max_height max_width max_pixels min_side mean_pixels jpeg raw copied "
        "resized bounded distrusted bad bytes options sha256 fastssl ffcv"
    )
    read = DataCard.read(tmp_path / "o.beton")
    assert read == DataCard(**card)
    read.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "o.json").read_bytes()


def test_bad_images_stop_the_conversion_with_a_complete_list(tmp_path, capsys):
    root = folder(tmp_path / "in", 4)
    whole = (root / "cat" / "1.jpg").read_bytes()
    (root / "cat" / "1.jpg").write_bytes(whole[:-60])
    (root / "dog" / "2.jpg").write_bytes(b"")
    (root / "dog" / "3.jpg").write_text("<html>404</html>")
    out = tmp_path / "o.beton"
    assert convert("imagefolder", root, out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 8 images cannot be read" in error and "--max-bad 3" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "o.bad.txt"]
    assert [line.split("\t")[0] for line in (tmp_path / "o.bad.txt").read_text().splitlines()] == [
        "cat/1.jpg",
        "dog/2.jpg",
        "dog/3.jpg",
    ]
    assert convert("imagefolder", root, out, "--max-bad", 2) == 2 and not out.exists()
    assert convert("imagefolder", root, out, "--max-bad", 3) == 0
    assert "skipped 3 unreadable images" in capsys.readouterr().out
    stock = Stock(out)
    assert stock.card["samples"] == 5 and stock.card["bad"] == 3 and len((tmp_path / "o.bad.txt").read_text()) > 0
    assert stock.table["label"].tolist() == [0, 0, 0, 1, 1] and stock.table["index"].tolist() == [0, 1, 2, 3, 4]
    (root / "cat" / "1.jpg").write_bytes(whole)
    for name in ("2.jpg", "3.jpg"):
        (root / "dog" / name).write_bytes(whole)
    assert convert("imagefolder", root, out, "--force") == 0
    assert not (tmp_path / "o.bad.txt").exists()


def test_nothing_but_bad_images(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton", "--max-bad", 5) == 2
    assert "none of the 1 images" in capsys.readouterr().err and not (tmp_path / "o.beton").exists()


def test_an_existing_target_needs_force(tmp_path, capsys):
    root = folder(tmp_path / "in", 1)
    out = tmp_path / "o.beton"
    out.write_bytes(b"precious")
    assert convert("imagefolder", root, out) == 2
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"precious"
    assert not (tmp_path / "o.json").exists()
    (root / "cat" / "0.jpg").write_bytes(b"x")
    assert convert("imagefolder", root, out, "--force") == 2 and out.read_bytes() == b"precious"
    assert convert("imagefolder", root, out, "--force", "--max-bad", 1) == 0 and Stock(out).card["samples"] == 1
    assert convert("imagefolder", root, tmp_path / "o.bin") == 2
    assert "must end in .beton" in capsys.readouterr().err


@pytest.mark.parametrize("bound, most", [(1 << 20, 6), (0, 1)])
def test_what_waits_for_a_worker_is_bounded_in_bytes(tmp_path, monkeypatch, bound, most):
    """Of a streamed archive, whose members are in memory: here the chunks that were read and are not yet written."""
    monkeypatch.setattr(write, "WAITING_BYTES", bound)
    monkeypatch.setattr(write, "CHUNK_SAMPLES", 1)
    data, ahead, written = save(tmp_path / "a.jpg").read_bytes(), [], 0

    def items():
        for i in range(20):
            ahead.append(i - written)
            yield f"{i}", data, -1

    source = sources.Source("tar", "x", "none", None, 20, items)
    for _ in write._encode(source, Options(), 2):
        written += 1
    assert written == 20 and max(ahead) == most - 1


def child(*argv, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastssl.data_prep", *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(mixed, tmp_path, workers):
    """A limit on the size of files stands for the disk: a write fails in the middle, and so does the flush after it."""
    out = tmp_path / "new" / "o.beton"
    process = child(
        "imagefolder",
        mixed,
        out,
        "--mode",
        "raw",
        "--workers",
        workers,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18)),
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == f"fastssl convert: {out}: File too large; nothing was kept\n"
    assert not out.parent.exists()


def test_a_full_disk_keeps_the_old_file(mixed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.beton"
    assert convert("imagefolder", folder(tmp_path / "in", 1), out) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("o.*")}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", full)
    assert convert("imagefolder", mixed, out, "--force") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.glob("o.*")} == before


WAITING = """
import sys, time
from pathlib import Path
from fastssl import data_prep
from fastssl.data_prep import write

def wait(refs, options):  # in place of store_many
    Path(sys.argv[1]).touch()
    time.sleep(600)

write.store_many = wait
data_prep.main(sys.argv[2:])
"""


def children(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle(mixed, tmp_path, workers):
    """kill -9: no target appears, the workers end, and the next conversion takes over what was left."""
    out, begun = tmp_path / "o.beton", tmp_path / "begun"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(begun), "imagefolder", str(mixed), str(out), "--workers", str(workers)]
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert data_prep.main(["imagefolder", str(mixed), str(out)]) == 2  # the name is taken while the process lives
    forked = children(process.pid)
    assert len(forked) == (2 if workers == 2 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / "o.beton.part").exists()
    assert convert("imagefolder", mixed, out) == 0
    assert not (tmp_path / "o.beton.part").exists()
    deadline = time.monotonic() + 60
    while any(WAITING[:40] in command_of(pid) for pid in forked):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_check_finds_a_sound_file_sound(mixed, tmp_path, capsys):
    out = tmp_path / "o.beton"
    assert convert("imagefolder", mixed, out) == 0
    assert data_prep.main(["check", str(out)]) == 0
    report = capsys.readouterr().out
    assert "sound. 300 images (257 JPEG, 43 raw)" in report and "images/s" in report
    sheet = np.asarray(read_image(tmp_path / "o.png"))
    first = np.asarray(read_image(mixed / "c0" / "000.png")).mean((0, 1))
    cell = sheet[2:110, 2:110].reshape(-1, 3)
    assert sheet.shape == (8 * 128, 1120, 3)
    assert abs(cell[cell.min(1) < 250].mean(0) - first).max() < 8


def damage(out: Path, how: str, stock: Stock) -> None:
    """Change one thing, and the hash in the card with it except where the hash is what has to find it."""
    data, card = bytearray(out.read_bytes()), json.loads(out.with_suffix(".json").read_text())
    table = ffcv_format.HEADER.itemsize + 3 * ffcv_format.FIELD.itemsize
    width = stock.reader.metadata.dtype.itemsize
    if how == "bit":
        data[-40] ^= 1
    elif how == "short":
        del data[-24:]
    elif how == "jpeg":
        pointer = int(stock.table["image"]["data_ptr"][1])
        data[pointer : pointer + 40] = bytes(40)
    elif how == "index":
        data[table + width + 16] ^= 1
    elif how == "label":
        data[table + width + 24] = 77
    elif how == "height":
        data[table + 3] += 100
    elif how == "card":
        card["samples"] += 1
    if how in ("jpeg", "index", "label", "height"):
        card["sha256"] = __import__("hashlib").sha256(data).hexdigest()
    out.write_bytes(data)
    out.with_suffix(".json").write_text("{" if how == "json" else json.dumps(card))


@pytest.mark.parametrize(
    "how, message",
    [
        ("bit", "sha256"),
        ("short", "bytes"),
        ("jpeg", "do not decode, the first is row 1"),
        ("index", "index"),
        ("label", "labels from"),
        ("height", "max_height"),
        ("card", "samples"),
        ("json", "is not valid JSON"),
    ],
)
def test_check_finds_damage(mixed, tmp_path, capsys, how, message):
    out = tmp_path / "o.beton"
    assert convert("imagefolder", mixed, out) == 0
    damage(out, how, Stock(out))
    assert data_prep.main(["check", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


def test_check_without_a_file_or_card(mixed, tmp_path, capsys):
    assert data_prep.main(["check", str(tmp_path / "o.beton")]) == 2
    assert convert("digits", "test", tmp_path / "o.beton") == 0
    (tmp_path / "o.json").unlink()
    assert data_prep.main(["check", str(tmp_path / "o.beton")]) == 2
    assert "data card" in capsys.readouterr().err


def test_help_names_every_source(capsys):
    assert data_prep.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "imagefolder",
        "list",
        "tar",
        "zip",
        "cifar10",
        "cifar100",
        "voc2007",
        "digits",
        "--short-side",
        "--max-pixels",
        "--quality",
        "--mode",
        "--max-bad",
        "--force",
        "check",
    ):
        assert word in text


def test_progress_is_quiet_in_a_short_run_and_plain_without_a_terminal(capsys):
    from fastssl.data_prep.cli import progress_bar

    with progress_bar() as progress:
        progress("images", 1, 2)
    assert capsys.readouterr().err == ""
    with progress_bar(every_s=0) as progress:
        progress("images", 1, 2)
    assert capsys.readouterr().err == "images: 1 of 2, 0 s\n"


def test_progress_on_a_terminal(mixed, tmp_path):
    """A pseudo-terminal shows a bar, and the workers were forked before its thread started."""
    import pty

    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-W",
        "error::DeprecationWarning",
        "-m",
        "fastssl.data_prep",
        "imagefolder",
        str(mixed),
        str(tmp_path / "o.beton"),
        "--workers",
        "2",
    ]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True, env=env) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a closed terminal reads on Linux
            while block := os.read(ours, 1 << 16):
                shown += block
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and "300 images" in out
    assert b"images" in shown and "300/300" in shown.decode(errors="replace")
